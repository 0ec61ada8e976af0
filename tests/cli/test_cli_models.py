"""MODEL and --weights: what is built and loaded, and what is refused."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import SmallNet
from safetensors.torch import save, save_file
from torch import nn

import ocs
from ocs.cli.command_line import main
from ocs.cli.files import load_quantized, made_of, saved_shape
from ocs.cli.input_form import guessed_form
from ocs.cli.models import RANDOM, load_model, torchvision_module
from ocs.cli.say import Notes, UsageError
from ocs.cli.weights import put_weights, read_weights
from ocs.formats.storage import write_model

MODEL = "conftest:SmallNet"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Evil:
    """Loading it unguarded would leave a file."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("code-has-run",)


def same(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


# --- MODEL ------------------------------------------------------------------------------------------------------------


def test_a_factory_in_the_current_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("own_nets.py").write_text(
        "from torch import nn\nclass Nets:\n    make = staticmethod(lambda: nn.Linear(3, 2))\nnet = nn.Linear(4, 2)\n"
        "def broken():\n    raise KeyError('x')\nnumber = 3\nnone = lambda: 3\n"
        "def leaves():\n    raise SystemExit(0)\n"
        "def talks():\n    print('hello')\n    return nn.Sequential(nn.Linear(3, 2))\n"
    )
    Path("needs_more.py").write_text("import not_installed_anywhere\n")
    before = [*sys.path]
    loaded = load_model("own_nets:Nets.make", None, Notes())
    assert loaded.module.in_features == 3
    assert not loaded.module.training
    assert loaded.form.shape == (1, 3)
    assert same(loaded.module, load_model("own_nets:Nets.make", None, Notes()).module)  # random weights repeat
    assert load_model("own_nets:net", None, Notes()).module.in_features == 4
    assert sys.path == before
    for model, kind, says in (
        ("own_nets:nothing", ValueError, "own_nets has no nothing"),
        ("own_nets:number", TypeError, "it is int: use a callable"),
        ("own_nets:none", TypeError, "it gives int, no nn.Module"),
        ("own_nets:broken", KeyError, "x"),
        ("nowhere_at_all:make", ValueError, "there is no module nowhere_at_all here"),
        ("needs_more:make", ModuleNotFoundError, "not_installed_anywhere"),
    ):
        with pytest.raises(kind, match=says):
            load_model(model, None, Notes())
    assert main(["inspect", "own_nets:leaves"]) == 1
    assert "the model's own code called sys.exit(0)" in capsys.readouterr().err
    assert main(["inspect", "own_nets:talks", "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["weights"]) == 1
    assert err == "hello\n"
    monkeypatch.delitem(sys.modules, "own_nets")


def test_torchvision(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_model("torchvision:shufflenet_v2_x0_5", None, Notes())
    assert loaded.weights == RANDOM
    assert "its weights are random" in capsys.readouterr().err
    assert loaded.form.shape == (1, 3, 224, 224)
    assert loaded.form.share == pytest.approx(224 / 256)
    torch.manual_seed(7)
    again = load_model("torchvision:shufflenet_v2_x0_5", None, Notes())
    assert same(loaded.module, again.module)
    torch.save(again.module.state_dict(), "w.pt")
    assert load_model("torchvision:shufflenet_v2_x0_5", "w.pt", Notes()).weights == "w.pt"
    with pytest.raises(ValueError, match=r"no such network; near it: resnet50"):
        load_model("torchvision:resnet5", None, Notes())


def test_pretrained_weights_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has fetched before is found; a pickle there that holds code is refused as everywhere."""
    models = torchvision_module("torchvision.models")
    name, entry = "shufflenet_v2_x0_5", models.ShuffleNet_V2_X0_5_Weights.DEFAULT
    torch.manual_seed(3)
    network = models.get_model(name)
    monkeypatch.setenv("TORCH_HOME", os.getcwd())
    Path("hub/checkpoints").mkdir(parents=True)
    cached = Path("hub/checkpoints") / entry.url.rpartition("/")[2]
    torch.save(network.state_dict(), cached)
    loaded = load_model(f"torchvision:{name}", "pretrained", Notes())
    assert loaded.weights == "pretrained"
    assert same(loaded.module, network)
    torch.save({"x": Evil()}, cached)
    with pytest.raises(Exception, match=r"[Ww]eights"):
        load_model(f"torchvision:{name}", "pretrained", Notes())
    assert not Path("code-has-run").exists()
    with pytest.raises(UsageError, match="pretrained is for torchvision"):
        load_model(MODEL, "pretrained", Notes())


def test_timm() -> None:
    torchvision_module("torchvision")
    pytest.importorskip("timm")
    loaded = load_model("timm:resnet10t", None, Notes())
    assert loaded.form.shape == (1, 3, 176, 176)
    with pytest.raises(ValueError, match="no such network"):
        load_model("timm:hf-hub:someone/something", None, Notes())


def test_transformers() -> None:
    torchvision_module("torchvision")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertModel(config)
    model.save_pretrained("bert")
    loaded = load_model("hf:bert", None, Notes())
    assert same(loaded.module, model)
    assert (loaded.form.names, loaded.form.words) == (("input_ids",), 50)
    torch.save(model.state_dict(), "bert/pytorch_model.bin")
    Path("bert/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pickled: name them, --weights bert/pytorch_model.bin"):
        load_model("hf:bert", None, Notes())
    assert same(load_model("hf:bert", "bert/pytorch_model.bin", Notes()).module, model)
    assert main(["quantize", "hf:bert", "--weights", "bert/pytorch_model.bin", "-o", "q.safetensors"]) == 0
    Path("bert/pytorch_model.bin").unlink()  # a quantized file needs no float weights
    assert load_quantized("q.safetensors", None).model == "hf:bert"


@pytest.mark.parametrize("model", ["timm:resnet10t", "hf:nowhere"])
def test_what_is_not_there(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision_module("torchvision")
    monkeypatch.setitem(sys.modules, "timm", None)  # an import of it fails
    with pytest.raises((ImportError, FileNotFoundError), match=r"pip install timm|there is no nowhere"):
        load_model(model, None, Notes())


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Sequential(nn.ReLU(), nn.Conv1d(2, 3, 1)), (1, 2, 1024)),
        (nn.Sequential(nn.LSTM(5, 6)), (32, 1, 5)),
        (nn.Sequential(nn.GRU(5, 6, batch_first=True)), (1, 32, 5)),
        (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), (1, 32)),
    ],
)
def test_shapes_are_guessed_by_the_first_layer(module: nn.Module, shape: tuple[int, ...]) -> None:
    assert guessed_form(module).shape == shape
    assert guessed_form(nn.ReLU()) is None


# --- Weights ----------------------------------------------------------------------------------------------------------


def test_weights_of_every_form(net: SmallNet) -> None:
    state = net.state_dict()
    save_file(state, "w.safetensors")
    torch.save(state, "w.pt")
    torch.save({"epoch": 3, "model": {f"module.{name}": tensor for name, tensor in state.items()}}, "checkpoint.pt")
    for path in ("w.safetensors", "w.pt", "checkpoint.pt"):
        other = SmallNet()
        put_weights(other, path, Notes())
        assert same(net, other)


def test_tied_weights_may_be_there_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    state = {name: tensor + 1 for name, tensor in model.state_dict().items() if name != "b.weight"}
    save_file(state, "w.safetensors")
    put_weights(model, "w.safetensors", Notes())
    assert torch.equal(model["b"].weight, state["a.weight"])


def test_pickles_are_not_run(net: SmallNet) -> None:
    torch.save({"x": Evil()}, "evil.pt")
    torch.save(net, "whole.pt")
    for path, named in (("evil.pt", "posix.mkdir"), ("whole.pt", "conftest.SmallNet")):
        with pytest.raises(ValueError, match=rf"{path}: a pickle that holds more than tensors \({named}\).*refused"):
            read_weights(path)
    assert not Path("code-has-run").exists()


def test_weights_that_do_not_fit(net: SmallNet) -> None:
    Path("noise").write_bytes(bytes(range(7, 200)))
    Path("empty").write_bytes(b"")
    Path("cut.safetensors").write_bytes((100).to_bytes(8, "little") + b"{")
    whole = save(net.state_dict())
    Path("half.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save([torch.ones(3)], "list.pt")
    torch.save({"a": 3}, "numbers.pt")
    torch.save({"a.weight": torch.ones(3)}, "other.pt")
    torch.save(net.state_dict() | {"head.weight": torch.ones(5, 17)}, "wide.pt")
    for path, says in (
        ("noise", "neither a safetensors file nor"),
        ("empty", "neither a safetensors file nor"),
        ("cut.safetensors", "neither a safetensors file nor"),
        ("half.safetensors", "it is no complete safetensors file"),
        ("list.pt", "it holds no state_dict"),
        ("numbers.pt", "it holds no state_dict"),
        ("other.pt", r"of another model: the file lacks stem.weight, .* and \d+ more; the model has no place for a"),
        ("wide.pt", r"head.weight is \[5, 17\], in the model \[5, 16\]"),
    ):
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        with pytest.raises(ValueError, match=f"{path}: .*{says}"):
            put_weights(net, path, Notes())
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


# --- What a file is of ------------------------------------------------------------------------------------------------


def test_a_file_names_its_model_but_runs_no_code(net: SmallNet) -> None:
    ocs.quantize(net, wbits=4)
    write_model(net, "q.safetensors", {"made_of": '{"model": "conftest:SmallNet", "weights": ""}'})
    assert made_of("q.safetensors")["model"] == MODEL
    with pytest.raises(UsageError, match=r"it is of 'conftest:SmallNet', code that runs only where you name it"):
        load_quantized("q.safetensors", None)
    assert same(load_quantized("q.safetensors", MODEL).module, net)
    assert same(ocs.load("q.safetensors", SmallNet()), net)  # as any other
    for shape, found in (("[1, 3]", (1, 3)), ("[]", None), ("[1, -3]", None), ("[true]", None), ('"x"', None)):
        write_model(net, "q.safetensors", {"made_of": f'{{"model": "m:f", "shape": {shape}}}'})
        assert saved_shape("q.safetensors") == found
    for note in ("{}", "[]", "{", '{"model": 3}', "[" * 100_000):
        write_model(net, "q.safetensors", {"made_of": note})
        with pytest.raises(UsageError, match="does not say which model it is of: give --model"):
            load_quantized("q.safetensors", None)
