"""The report: every number in it, and its four forms."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import SmallNet
from torch import nn

import ocs
from ocs import functional
from ocs.report.cells import MEANING
from ocs.report.words import size
from ocs.weight.apply_plan import AUTO


@pytest.fixture
def report(net: SmallNet) -> ocs.Report:
    return ocs.quantize(net, wbits=5, r=0.1, overrides={"head": {"granularity": "channel"}})


def test_numbers_of_a_layer(net: SmallNet, report: ocs.Report) -> None:
    torch.manual_seed(0)
    weight = SmallNet().body[3].weight.detach()
    layer = next(layer for layer in report.layers if layer.name == "body.3")
    q = functional.quantize_weight(weight, 5, 0.1, groups=4)
    assert (layer.kind, layer.shape, layer.bits, layer.granularity) == ("Conv2d", (16, 4, 3, 3), 5, "tensor")
    assert (layer.channels, layer.splits) == (16, 4)
    assert layer.sources == tuple(q.source.reshape(4, 5)[:, 4:].flatten().tolist())
    assert layer.threshold == float(q.threshold)
    assert layer.scale == float(q.scale)
    assert layer.max_before == float(weight.abs().max())
    assert layer.max_after == layer.threshold < layer.max_before
    assert layer.sqnr_db == functional.sqnr_db(*functional.weight_error(weight, q, 4))
    assert layer.float_bytes == 16 * 4 * 9 * 4
    assert layer.packed_bytes == 16 * 5 * 9 * 5 // 8 + 4 + 4 * 4
    assert (layer.weights, layer.expanded_weights) == (576, 720)


def test_per_channel_numbers(report: ocs.Report) -> None:
    head = report.layers[-1]
    assert len(head.threshold) == len(head.scale) == 5
    assert head.max_after == max(head.threshold)


def test_totals(report: ocs.Report) -> None:
    quantized = report.quantized
    assert len(quantized) == 4
    assert report.relative_size == sum(x.expanded_weights for x in quantized) / sum(x.weights for x in quantized)
    assert report.float_bytes == sum(x.float_bytes for x in quantized)
    assert report.mean_sqnr_db == pytest.approx(sum(x.sqnr_db for x in quantized) / 4)


def test_text_of_all(report: ocs.Report) -> None:
    lines = report.to_text(all=True).splitlines()
    rows = lines[lines.index("") + 1 :]
    assert len(rows) == len(report.layers) + 1
    names = [name for name in MEANING if name not in ("input", "outputs dB", "clipped at")]
    assert rows[0].split() == " ".join(names).split()
    assert "skipped: first convolution" in rows[1]
    assert "depthwise: not split" in rows[4]
    assert lines[0].startswith("4 layers quantized, 1 left float")


def test_inputs_have_a_column(net: SmallNet) -> None:
    report = ocs.quantize(
        net, abits=4, act_r=0.2, act_clip="mse", act_signed="auto", calibration=torch.randn(8, 3, 8, 8),
        overrides={"head": {"act_split": "oracle", "act_clip": 0.5}, "body.3": {"abits": None}},
    )  # fmt: skip
    text = report.to_text(all=True).splitlines()
    assert any(line.startswith("layer ") and " input" in line for line in text)
    assert ">input</th>" in report.to_html()
    for name, shown in (
        ("body.0 ", r"4 bits, 0 to [\d.]+ \(mse\), 2 split"),
        ("head ", "4 bits, by each batch, 4 split"),
    ):
        line = next(line for line in text if line.startswith(name))
        assert re.search(shown, line)
    plain = report.to_dict()["layers"][1]
    assert (plain["act_bits"], plain["act_signed"], plain["act_clip"], plain["act_splits"]) == (4, False, "mse", 2)
    assert len(plain["act_sources"]) == 2
    assert plain["act_scale"] * 15 == pytest.approx(plain["act_threshold"])


def test_the_clip_method_is_shown(net: SmallNet) -> None:
    report = ocs.quantize(net, wbits=3, clip="auto", overrides={"head": {"clip": 0.5}})
    for line in report.quantized:
        text = report.to_text(all=True).splitlines()
        shown = next(each for each in text if each.startswith(f"{line.label} "))
        assert line.clip == 0.5 if line.label == "head" else line.clip in AUTO
        method = line.clip if isinstance(line.clip, str) else f"{line.clip:g} of max"
        assert (f" ({method})" in shown) == (line.clip != "none")
    assert json.loads(report.to_json())["layers"][1]["clip"] in AUTO


def test_html_is_well_formed(report: ocs.Report) -> None:
    class Balance(HTMLParser):
        open: list[str] = []  # noqa: RUF012

        def handle_startendtag(self, tag: str, attrs: object) -> None:
            """An element of a picture that ends at once."""

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag != "meta":
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    parser = Balance()
    parser.feed(report.to_html())
    assert parser.open == []
    assert report._repr_html_().count("<tbody") == len(report.layers)


def test_html_escapes_names() -> None:
    model = torch.nn.ModuleDict({"<b>&": torch.nn.Linear(2, 2)})
    assert "&lt;b&gt;&amp;" in ocs.quantize(model)._repr_html_()


def test_the_legend_says_where_ratios_of_outputs_are_from() -> None:
    how = {"wbits": 3, "rounding": "gptq", "calibration": [torch.eye(4)], "explain": True}
    for overrides, said in (
        ({}, "outputs, from calibration"),
        ({"1": {"rounding": "nearest"}}, "outputs, estimated or from calibration"),
    ):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        assert said in ocs.quantize(net, overrides=overrides, **how).to_html()


def test_dict_and_json(report: ocs.Report, tmp_path: Path) -> None:
    content = report.to_dict()
    assert content["settings"]["wbits"] == 5
    assert content["settings"]["skip"] == ["ocs.FIRST_LAYER"]
    assert content["settings"]["overrides"] == {"head": {"granularity": "channel"}}
    assert [layer["name"] for layer in content["layers"]] == ["stem", "body.0", "body.3", "body.5", "head"]
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == content
    report.save(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == report.to_html()
    with pytest.raises(ValueError, match=r"end it in .json or .html"):
        report.save(tmp_path / "report.txt")


def test_what_cannot_be_written_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    lone = ocs.LayerReport(name="a", kind="\ud800", weight="", shape=(), status="float", reason="no weights")
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        ocs.Report((lone,)).save(tmp_path / "report.html")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.html", "old")]


def test_exact_layers_are_valid_json() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[7.0, 0], [-7, 1]])
    report = ocs.quantize(model, wbits=4)
    assert report.layers[0].sqnr_db == report.mean_sqnr_db == math.inf
    assert json.loads(report.to_json())["layers"][0]["sqnr_db"] is None


def test_what_is_known_of_inputs_is_a_field(net: SmallNet) -> None:
    report = ocs.quantize(torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 2, 1), net), recipe="best")
    known = {layer.input_known for layer in report.quantized}
    assert known == {layer.input_mean != "nothing is known of its input" for layer in report.quantized}
    assert {layer.input_known for layer in ocs.quantize(SmallNet()).layers} == {None}


# --- How much of the model it was -------------------------------------------------------------------------------------


class Experts(torch.nn.Module):
    """Several weights that stay float, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Parameter(torch.randn(4, 64, 32)), torch.nn.Parameter(torch.randn(4, 32, 64))
        self.gain = torch.nn.Parameter(torch.ones(64))


def test_the_share_of_the_model(tmp_path: Path) -> None:
    """What stays float counts in full: three blocks of experts, an embedding and a head tied to it."""
    blocks = (torch.nn.Sequential(torch.nn.Linear(64, 64), Experts()) for _ in range(3))
    model = torch.nn.Sequential(*blocks, torch.nn.Embedding(100, 64), torch.nn.Linear(64, 100, bias=False))
    model[4].weight = model[3].weight
    model.register_buffer("steps", torch.zeros(7), persistent=False)
    quantized, experts, tied, vectors = 3 * 64 * 64 * 4, 3 * 2 * 4 * 64 * 32 * 4, 100 * 64 * 4, 3 * (64 + 64) * 4
    with pytest.warns(UserWarning, match="only 18% of the matmul weights"):
        report = ocs.quantize(model, wbits=4, skip=None)
    assert (report.float_bytes, report.packed_bytes) == (quantized, quantized // 8 + 3 * 4)
    assert report.weight_bytes == quantized + experts + tied
    assert report.model_bytes == quantized + experts + tied + vectors
    assert report.quantized_share == pytest.approx(quantized / (quantized + experts + tied))
    ocs.save(model, tmp_path / "m")
    assert report.file_bytes == pytest.approx((tmp_path / "m").stat().st_size, rel=0.01)
    assert f"size      {size(report.model_bytes)} -> {size(report.file_bytes)} as a file; quantized: 18 %" in str(
        report
    )
    shown = "18 % of the weights (49.2 KB of 271 KB), x1.000 with their copies, 49.2 KB -> 6.2 KB packed, the file 2"
    assert f": {shown}" in repr(report)
    assert " KB of 273 KB, mean SQNR" in repr(report)
    totals = report.to_dict()["totals"]
    assert {name: totals[name] for name in ("weight_bytes", "model_bytes", "file_bytes")} == {
        "weight_bytes": report.weight_bytes, "model_bytes": report.model_bytes, "file_bytes": report.file_bytes,
    }  # fmt: skip


def test_a_share_is_never_rounded_up() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(2, 2))
    assert "99 % of the weights" in repr(ocs.quantize(model, skip="1"))
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(2, 2))
    assert "less than 1 % of the weights" in repr(ocs.quantize(model, skip="0"))


def test_a_folded_norm_and_a_new_bias_are_counted(net: SmallNet, tmp_path: Path) -> None:
    report = ocs.quantize(net, wbits=4, r=0.1, fold_bn=True, correct_bias=True, recipe="best")
    ocs.save(net, tmp_path / "m")
    assert report.file_bytes == pytest.approx((tmp_path / "m").stat().st_size, rel=0.05)


def test_equal_reasons_share_a_line_of_the_text_alone() -> None:
    """Rows, dict and page have every weight with its shape and size."""
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(64, 64), Experts()) for _ in range(12)))
    with pytest.warns(UserWarning, match="of the matmul weights"):
        report = ocs.quantize(model, skip=["[12].0", "3.0"])
    left = [layer for layer in report.layers if layer.name == "3.1"]
    assert [(layer.label, layer.shape, layer.float_bytes) for layer in left] == [
        ("3.1.up", (4, 64, 32), 32768), ("3.1.down", (4, 32, 64), 32768),
    ]  # fmt: skip
    text = report.to_text(all=True).splitlines()
    assert len(text[text.index("") + 1 :]) == 1 + len(report.layers)
    shown = " ".join(str(report).split())
    for reason in (
        r"float 12 layers, 0\.1 to 11\.1 786 KB: up, down of Experts, ",
        r"float 1\.0 and 2\.0 \(skipped\) 32\.8 KB: skip='\[12\]\.0'",
        r"float 3\.0 \(skipped\) 16\.4 KB: skip='3\.0'",
    ):
        assert re.search(reason, shown), reason
    assert report.to_html().count("<tbody") == len(report.layers) == len(report.to_dict()["layers"])


def test_repr_is_short_however_many_scales_there_are() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(300, 300) for _ in range(30)))
    report = ocs.quantize(model, r=0.5, granularity="channel")
    assert len(repr(report)) < 300 < 300 * 30 < len(report.to_json())


def test_a_histogram_is_in_steps_of_each_groups_own_scale():
    model = nn.Sequential(nn.Linear(96, 64))
    with torch.no_grad():
        model[0].weight[:, 32:64] *= 50  # without its own scale this block would reach 50 times as far
    [line] = ocs.quantize(model, wbits=4, granularity="group", group=32).quantized
    assert line.histogram.reach == 7.5
    assert sum(line.histogram.before) == sum(line.histogram.after) == line.histogram.channels * 96
