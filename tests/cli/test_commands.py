"""What the commands do, on a tiny network: inspect, quantize, compare, export, env and demo."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SmallNet
from PIL import Image
from safetensors.torch import load_file, save_file

import ocs
from ocs.cli import commands, demo
from ocs.cli.command_line import main
from ocs.cli.models import load_model
from ocs.cli.say import Notes
from ocs.kernels import ops

MODEL = "conftest:SmallNet"
SHAPE = ("--shape", "1,3,16,16")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that must succeed; gives its JSON, or with text=True what it printed."""

    def runs(*argv: str, text: bool = False) -> Any:
        assert main([*argv, *([] if text else ["--json"])]) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        return out if text else json.loads(out)

    return runs


def small_net() -> SmallNet:
    """The network that MODEL is."""
    return load_model(MODEL, None, Notes()).module


def test_inspect(run: Any) -> None:
    found = run("inspect", MODEL, "--wbits", "3", "--r", "0.1")
    net = small_net()
    assert [each["ratio"] for each in found["weights"]] == sorted((e["ratio"] for e in found["weights"]), reverse=True)
    assert {each["name"] for each in found["weights"]} == {"stem", "body.0", "body.3", "body.5", "head"}
    for each in found["weights"]:
        w = net.get_submodule(each["name"]).weight.detach()
        assert each["ratio"] == pytest.approx(float(w.abs().max() / w.std(correction=0)), rel=1e-5)
    report = ocs.quantize(small_net(), wbits=3, r=0.1, skip=None, explain=True)
    assert {e["name"]: e["gain_db"] for e in found["weights"]} == pytest.approx(
        {line.name: line.gains["OCS"] for line in report.quantized}, abs=1e-9
    )
    text = run("inspect", MODEL, "--top", "2", text=True)
    assert text.startswith("5 weights in ")
    assert "... and 3 more: --top 5" in text
    assert text.index(found["weights"][0]["name"] + " ") < text.index(found["weights"][1]["name"] + " ")
    assert "body.5" not in text or "body.3" not in text


def test_quantize_writes_what_quantize_and_save_would(run: Any) -> None:
    found = run("quantize", MODEL, "--wbits", "4", "--r", "0.1", "-o", "q.safetensors", "--report", "r.html")
    expected = small_net()
    report = ocs.quantize(expected, wbits=4, r=0.1)
    loaded = ocs.load("q.safetensors", SmallNet().eval())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(x), expected(x))
    assert found["totals"]["packed_bytes"] == report.packed_bytes
    assert found["settings"]["wbits"] == 4
    assert Path("r.html").read_text().startswith("<!doctype html>")
    run("quantize", MODEL, "--wbits", "4", "--report", "r.json")
    assert json.loads(Path("r.json").read_text())["settings"]["wbits"] == 4
    Path("link.json").symlink_to("elsewhere")
    run("quantize", MODEL, "--wbits", "4", "--report", "link.json")
    assert json.loads(Path("elsewhere").read_text())["settings"]["wbits"] == 4
    assert not [*Path().glob(".ocs*")]


def test_quantize_with_calibration(run: Any) -> None:
    Path("images").mkdir()
    for i in range(5):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 20, 3), np.uint8)).save(f"images/{i}.png")
    options = ("--abits", "8", "--calibration", "images", "--fold-bn", "-o", "q.safetensors")
    found = run("quantize", MODEL, *options, *SHAPE)
    assert {each["act_bits"] for each in found["layers"] if each["status"] == "quantized"} == {8}
    assert found["notes"][0].startswith("calibrated on 5 images of images, cropped to 3x16x16")
    found = run("quantize", MODEL, "--rounding", "gptq", "--synthesize", "4", *SHAPE)
    assert found["settings"]["rounding"] == "gptq"
    assert "calibrated on 4 synthetic inputs" in found["notes"][0]


def test_what_needs_inputs_says_how_they_are_given_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", MODEL, "--abits", "8"]) == 1
    error = capsys.readouterr().err
    assert "abits=8 needs calibration=" in error
    assert error.endswith("(here --calibration PATH, or --synthesize N without data)\n")


def test_quantize_a_layer_at_a_time(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(small_net().state_dict(), "w.safetensors")
    options = (MODEL, "--weights", "w.safetensors", "--wbits", "4", "--r", "0.1")
    whole = run("quantize", *options, "-o", "q.safetensors")
    found = run("quantize", *options, "--stream", "-o", "q", "--report", "r.json", "--shard-size", "400")
    assert found["settings"] == whole["settings"]
    assert found["totals"]["packed_bytes"] == whole["totals"]["packed_bytes"]
    assert json.loads(Path("r.json").read_text())["totals"]["seconds"] == found["totals"]["seconds"]
    assert len([*Path("q").glob("model-*.safetensors")]) > 1
    x = torch.randn(2, 3, 16, 16)
    expected = ocs.load("q.safetensors", small_net())(x)
    assert torch.equal(ocs.load("q", small_net())(x), expected)
    for wrong, says in (
        ((*options, "--stream"), "--stream needs -o FOLDER"),
        ((MODEL, "--stream", "-o", "a"), f"{MODEL} --stream: say where its weights are"),
        (
            (*options, "--stream", "-o", "a", "--synthesize", "4"),
            "--synthesize needs the whole model: use --calibration PATH",
        ),
        ((*options, "--shard-size", "4"), "--shard-size is for --stream"),
    ):
        assert main(["quantize", *wrong]) == 2
        assert says in capsys.readouterr().err
    assert main(["quantize", *options, "--stream", "-o", "q"]) == 1
    assert "q: it holds a model already" in capsys.readouterr().err
    assert main(["quantize", *options, "--stream", "-o", "b", "--fold-bn"]) == 1
    assert "fold_bn=True needs the whole model in memory" in capsys.readouterr().err


def test_calibrate_a_layer_at_a_time(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(small_net().state_dict(), "w.safetensors")
    np.save("x.npy", np.random.default_rng(0).standard_normal((6, 3, 16, 16), np.float32))
    options = (
        MODEL,
        "--weights",
        "w.safetensors",
        "--wbits",
        "4",
        "--abits",
        "8",
        "--rounding",
        "gptq",
        "--batch",
        "2",
    )
    assert main(["quantize", *options, "--stream", "-o", "q"]) == 1
    assert capsys.readouterr().err.endswith("(here --calibration PATH)\n")
    whole = run("quantize", *options, "--calibration", "x.npy", "-o", "q.safetensors")
    found = run("quantize", *options, "--calibration", "x.npy", "--stream", "-o", "q")
    assert found["notes"] == ["calibrated on at most 128 inputs of x.npy, as they are"] == whole["notes"][:1]
    assert found["settings"] == whole["settings"]
    expected, streamed = load_file("q.safetensors"), load_file("q/model.safetensors")
    assert expected.keys() == streamed.keys()
    assert all(torch.equal(each, streamed[name]) for name, each in expected.items())


def test_an_existing_file_is_kept_where_it_is_read_or_the_report_fails(capsys: pytest.CaptureFixture[str]) -> None:
    save_file(small_net().state_dict(), "w.safetensors")
    before = Path("w.safetensors").read_bytes()
    assert main(["quantize", MODEL, "--weights", "w.safetensors", "-o", "w.safetensors"]) == 2
    assert "-o w.safetensors: it is read, too" in capsys.readouterr().err
    assert Path("w.safetensors").read_bytes() == before
    Path("r.html").write_text("old")
    Path("r.html").chmod(0o400)
    assert main(["quantize", MODEL, "--report", "r.html"]) == 1
    assert "read-only" in capsys.readouterr().err
    assert Path("r.html").read_text() == "old"


def test_compare(run: Any) -> None:
    net = small_net()
    quantized = copy.deepcopy(net)
    ocs.quantize(quantized, wbits=4)
    ocs.save(quantized, "q.safetensors")
    save_file(net.state_dict(), "w.safetensors")
    x = np.random.default_rng(0).normal(size=(6, 3, 16, 16)).astype(np.float32)
    np.save("x.npy", x)
    expected = ocs.compare(net, quantized, torch.from_numpy(x)).to_dict()
    for a, b, more in (
        (MODEL, "q.safetensors", ()),
        ("w.safetensors", "q.safetensors", ("--model", MODEL)),
        (MODEL, "q.safetensors", ("--weights", "w.safetensors")),
    ):
        found = run("compare", a, b, "--images", "x.npy", *more)
        assert found["outputs"] == expected["outputs"]
        assert found["layers"] == expected["layers"]
        assert found["random_inputs"] is False
    found = run("compare", MODEL, "w.safetensors", *SHAPE, "--limit", "3")
    assert found["outputs"][0]["sqnr_db"] is None  # infinite
    assert found["random_inputs"] is True
    text = run("compare", "q.safetensors", "q.safetensors", "--model", MODEL, *SHAPE, "--limit", "3", text=True)
    assert "3 random inputs 3x16x16 (normal): no data was given" in text


def test_compare_refuses_random_weights_where_the_file_has_others(capsys: pytest.CaptureFixture[str]) -> None:
    name = "torchvision:shufflenet_v2_x0_5"
    torch.save(load_model(name, None, Notes()).module.state_dict(), "w.pt")
    assert main(["quantize", name, "--weights", "w.pt", "-o", "q.safetensors"]) == 0
    assert main(["compare", name, "q.safetensors", "--limit", "2"]) == 2
    assert f"{name} has random weights, q.safetensors those of w.pt: give --weights" in capsys.readouterr().err
    assert main(["compare", name, "q.safetensors", "--weights", "w.pt", "--limit", "2", *("--shape", "1,3,32,32")]) == 0


def test_export(run: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    run("quantize", MODEL, "--wbits", "4", "-o", "q.safetensors", *SHAPE)
    found = run("export", "q.safetensors", "-o", "m.onnx", "--model", MODEL)  # of the shape that quantize was given
    assert found["shape"] == [1, 3, 16, 16]
    x = torch.randn(5, 3, 16, 16)
    session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), ocs.load("q.safetensors", SmallNet().eval())(x).detach())
    np.save("x.npy", x.numpy())
    expected = small_net().eval()(x).detach()
    sqnr_db = 10 * float(torch.log10(expected.square().sum() / (torch.from_numpy(output) - expected).square().sum()))
    found = run("compare", MODEL, "m.onnx", "--images", "x.npy")
    assert found["outputs"][0]["sqnr_db"] == pytest.approx(sqnr_db, abs=0.01)


def test_what_export_gets(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    def written(model: object, path: str, example: torch.Tensor, **options: object) -> None:
        seen.update(options, shape=tuple(example.shape))
        Path(path).write_bytes(b"1234")

    seen: dict[str, object] = {}
    monkeypatch.setattr(commands, "export", written)
    run("quantize", MODEL, "--wbits", "4", "-o", "q.safetensors")
    more = ("--form", "program", "--no-additions", "--target", "avx2")
    found = run("export", "q.safetensors", "-o", "m.pt2", "--model", MODEL, *SHAPE, *more)
    expected = {"form": "program", "additions": False, "target": "avx2", "dynamic_lstm": False}
    assert seen == {**expected, "shape": (1, 3, 16, 16)}
    assert found["bytes"] == 4
    found = run("export", "q.safetensors", "-o", "m.pt2", "--model", MODEL)
    guess, floats = found["notes"]
    assert guess == "inputs of 1,3,224,224 are a guess (by stem, a Conv2d): --shape says otherwise"
    assert floats.startswith("inputs of layers are floats, so products run in floats: quantize with --abits 8")
    run("quantize", MODEL, "--abits", "8", "--synthesize", "4", "-o", "q.safetensors", *SHAPE)
    assert not any(
        "floats" in note for note in run("export", "q.safetensors", "-o", "m.pt2", "--model", MODEL)["notes"]
    )


def test_export_of_files_that_name_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    net = small_net()
    ocs.quantize(net, wbits=4)
    ocs.save(net, "q.safetensors")
    assert main(["export", "q.safetensors", "-o", "m.onnx"]) == 2
    assert "it does not say which model it is of: give --model MODEL" in capsys.readouterr().err
    torch.save(small_net().state_dict(), "w.pt")
    assert main(["export", "w.pt", "-o", "m.onnx", "--model", MODEL]) == 1
    assert "w.pt: it holds no quantized model" in capsys.readouterr().err
    assert not Path("m.onnx").exists()


def test_env(run: Any) -> None:
    found = run("env")
    assert found["ocs"] == ocs.__version__
    assert found["torch"] == torch.__version__
    assert found["isa"] == ops.isa()
    assert found["threads"] == torch.get_num_threads()
    assert found["packages"]["safetensors"]
    assert f"ocs {ocs.__version__}, torch" in run("env", text=True)


def test_env_says_what_saturates(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setattr("ocs.runtime.arithmetic.saturates_here", lambda: True)
    assert "saturate in silence on this CPU where weights are beyond 64" in run("env", text=True)
    assert run("env")["largest_exact_weight"] == 64


def test_demo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortened, and timed on weights that are too small to say anything, in no engine."""
    monkeypatch.setattr(demo, "compile", lambda model, *_, **__: model)
    args = argparse.Namespace(json=False, keep="kept")
    values = demo.run_demo(args, Notes(), train=80, test=50, width=32).values
    out = capsys.readouterr().out
    assert "the same outputs" in out
    assert list(values["accuracy"]) == ["8", "4", "3", "2"]
    assert values["files"]["same_outputs"]
    assert values["files"]["quantized_bytes"] == Path("kept/3-bits.safetensors").stat().st_size
    assert values["comparison"]["outputs"][0]["sqnr_db"] > 5
    assert values["times"]["packed"] > 0
