"""Inputs that are split, with a scale for each row: static splitting, row by row, on the scale of its parts."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_unchanged, forge, header_of, state
from torch import Tensor, nn

import ocs
from ocs import training
from ocs.formats import reader
from ocs.nn.input import InputGrid
from ocs.nn.input_parts import InputParts, round_folded, static_parts, with_row_scales

OPTIONS = {"wbits": 5, "r": 0.2, "abits": 6, "act_scale": "dynamic", "act_r": 0.4, "act_select": "max"}
SOURCE = torch.tensor([*range(12), 3, 3, 7, 3, 3])  # channel 3 in five parts, 7 in two


def inputs(rows: int = 30, channels: int = 12, seed: int = 0) -> Tensor:
    """Rows of very different sizes, channels 3 and 7 with outliers."""
    x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))
    x[:, 3] *= 40
    x[:, 7] *= 9
    return x * torch.logspace(-2, 2, rows)[:, None]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)).eval()


def quantized(**options: Any) -> nn.Module:
    model = net()
    ocs.quantize(model, **{"calibration": [inputs()], **OPTIONS, **options})
    return model


def rounded(x: Tensor, split: str, bits: int) -> tuple[Tensor, InputParts]:
    grid = InputGrid(bits, splits=5, split=split, act_scale="dynamic")
    parts = with_row_scales(x, grid, static_parts(grid, None, SOURCE, 1))
    return round_folded(x, grid, parts, -1), parts


# --- Definition -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("split", ["qa", "naive", "even"])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_each_row_is_what_static_splits_give_with_its_scale(bits: int, split: str, dtype: torch.dtype) -> None:
    x, largest = (
        inputs().to(dtype),
        np.float32(1 / 5 if split == "even" else 1 / 4),
    )  # of channel 3: 4 eighths, a fourth
    ours, parts = rounded(x, split, bits)
    assert ours.dtype == dtype
    grid = InputGrid(bits, splits=5, split=split)
    for row, found, scale in zip(x, ours, parts.scale, strict=True):
        size = np.ones(12, np.float32)
        size[3], size[7] = largest, 0.5
        expected = (np.abs(row.float().numpy()) * size).max() / np.float32(2 ** (bits - 1) - 1)
        assert float(scale) == expected
        assert torch.equal(found, round_folded(row[None], grid, parts._replace(scale=scale[0]), -1)[0])


@pytest.mark.parametrize("split", ["qa", "even"])
def test_quantization_aware_parts_add_up_to_what_is_rounded_whole(split: str) -> None:
    """Hermite's identity: as if the narrow grid of each row had no end; the row of one scale is coarser."""
    x = inputs()
    ours, parts = rounded(x, split, 4)
    torch.testing.assert_close(ours, torch.round(x / parts.scale) * parts.scale, rtol=1e-6, atol=0)
    assert (ours[:, 3] / parts.scale[:, 0]).abs().max() > 8
    whole = round_folded(x, InputGrid(4, act_scale="dynamic"), InputParts(x.abs().amax(1, keepdim=True) / 7), -1)
    assert (ours - x).square().sum() < 0.3 * (whole - x).square().sum()


def test_rows_that_are_odd() -> None:
    x = inputs(6)
    x[0], x[1, 5], x[2, 3], x[3] = 0, torch.nan, -torch.inf, torch.tensor([1e-45] * 12)
    for expand in (True, False):
        layer = quantized(expand=expand)[0]
        y = layer(x)
        assert torch.equal(y[0], layer.bias)
        assert y[1:3].isnan().all()
        assert y[3:].isfinite().all()
        torch.testing.assert_close(y[4], layer(x[4]))
        assert layer(x[:0]).shape == (0, 10)
        with pytest.raises(RuntimeError, match="cannot be a nested tensor"):
            layer(torch.nested.nested_tensor([x[:2], x[:3]], layout=torch.jagged))
    assert not rounded(x, "qa", 4)[0][0].signbit().any()


# --- Layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch's own tracer
@pytest.mark.parametrize(("select", "split"), [("max", "qa"), ("percentile", "naive"), ("error", "even")])
def test_every_form_computes_the_same(select: str, split: str) -> None:
    model, x = quantized(act_select=select, split=split), inputs(seed=1)
    layer = model[0]
    assert layer.input_grid == InputGrid(6, splits=5, split=split, act_scale="dynamic")
    assert layer._buffers["input_scale"] is None
    parts = with_row_scales(x, layer.input_grid, layer.static_parts())
    expected = F.linear(round_folded(x, layer.input_grid, parts, -1), layer.folded("weight"), layer.bias)
    forms = {
        "expanded": layer,
        "folded": quantized(act_select=select, split=split, expand=False)[0],
        "packed": ocs.pack(copy.deepcopy(model))[0],
        "lowered": ocs.lower(copy.deepcopy(model))[0],
        "compiled": torch.compile(layer, fullgraph=True, backend="aot_eager"),
        "exported": torch.export.export(layer, (x,)).module(),
        "traced": torch.fx.symbolic_trace(layer),
    }
    torch._dynamo.reset()
    for form, each in forms.items():
        scaled = (each(x) - expected) / parts.scale
        assert scaled.abs().max() < 1e-3, form


def test_a_lowered_layer_in_bfloat16_rounds_in_float32() -> None:
    model, x = quantized(abits=8).bfloat16(), inputs().bfloat16()
    error = (ocs.lower(copy.deepcopy(model))[0](x).float() - model[0](x).float()).norm() / model[0](x).float().norm()
    assert error < 0.005


def test_the_gradient_is_one_everywhere_and_values_stay() -> None:
    for expand in (True, False):
        layer, x = quantized(expand=expand)[0], inputs(5).requires_grad_()
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(5, -1))
        assert torch.equal(layer(x), layer(x.detach()))


@pytest.mark.parametrize("thresholds", ["learned", "searched"])
def test_training(thresholds: str) -> None:
    model, x = net(), inputs()
    given = {name: value for name, value in OPTIONS.items() if name != "wbits"}
    training.prepare(model, wbits=4, thresholds=thresholds, calibration=[x], **given)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    expected = model.eval()(x)
    training.convert(model)
    assert torch.equal(model(x), expected)
    assert model[0].input_grid == InputGrid(6, splits=5, act_scale="dynamic")


# --- What quantize() does ---------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Layers whose inputs can and cannot be split, and one that calibration never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.attention = nn.LSTM(12, 12), nn.MultiheadAttention(12, 3)
        self.head, self.unused = nn.Linear(12, 4), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[T, N, 12] -> [T, N, 4]."""
        x = self.lstm(x)[0]
        return self.head(self.attention(x, x, x)[0])


def test_layers_whose_inputs_are_not_split_keep_their_rows() -> None:
    model = Mixed()
    before = state(model)
    with pytest.raises(ValueError, match=r"head: act_r=0\.4 needs calibration="):
        ocs.quantize(model, **OPTIONS)
    assert_unchanged(model, before)
    given = OPTIONS | {"overrides": {"lstm": {"abits": 8}}, "calibration": [inputs(10).view(5, 2, 12)]}
    report = ocs.quantize(model, **given)
    lines = {line.name: line for line in report.layers}
    assert "calibration never reached it" in lines["unused"].reason
    assert [lines[name].act_splits for name in ("lstm", "attention", "head")] == [0, 0, 5]
    assert "input not split" in lines["lstm"].reason
    assert "input not split" in lines["attention"].reason
    assert "6 bits, a scale per row, 5 split" in report.to_text(all=True)
    assert "input of 6 bits, a scale per row, 5 splits" in repr(model)
    head = lines["head"]
    assert (head.act_scale, len(head.act_sources)) == (None, 5)
    assert head.packed_bytes == 38 + 4 * (1 + 3 + 5)  # 4 x 15 integers, a scale, the copies of weight and input


def test_which_channels_are_split_is_said_by_calibration() -> None:
    each = ({}, {"act_select": None}, {"act_select": None, "recipe": "best"})
    again, once, best = (quantized(**options)[0].input_copies().tolist() for options in each)
    assert again == best == [3, 7, 3, 3, 7]
    assert len(set(once)) == 5
    calibration = ocs.calibrate(net(), [inputs()])
    assert torch.equal(quantized(calibration=calibration)[0].input_source, quantized()[0].input_source)


# --- They travel ------------------------------------------------------------------------------------------------------


def test_copies_states_and_files(tmp_path: Path) -> None:
    model, x = quantized(), inputs(seed=1)
    expected, path = model(x), tmp_path / "net"
    other = quantized(calibration=[inputs()[:, torch.arange(11, -1, -1)]])
    assert not torch.equal(other(x), expected)
    other.load_state_dict(model.state_dict())
    ocs.save(model, path)
    loaded = [ocs.load(path, each) for each in (net(), net().to("meta"))]
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other, *loaded):
        assert torch.equal(each(x), expected)
        assert repr(each) == repr(model)
    packed, again = ocs.load(path, net(), packed=True), ocs.pack(copy.deepcopy(model))
    assert torch.equal(packed(x), again(x))
    assert {*model.state_dict()} >= {"0.input_form", "0.input_source"}
    assert "0.input_scale" not in model.state_dict()
    assert torch.equal(ocs.unpack(packed)(x), expected)


def test_older_readers_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {7: {}, 4: {"act_r": 0.0, "act_select": None, "calibration": None}, 5: {"act_scale": "static"}}
    for expected, options in cases.items():
        ocs.save(quantized(**options), tmp_path / str(expected))
        assert header_of(tmp_path / str(expected))["format"] == expected
    monkeypatch.setattr(reader, "FORMAT", 6)
    ocs.load(tmp_path / "5", net())
    with pytest.raises(ValueError, match="wrote it in format 7, newer than 6: upgrade torch-ocs"):
        ocs.load(tmp_path / "7", net())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, tensors: tensors["0.input_source"].add_(7), "0: input_source is no split plan of this layer"),
        (lambda header, tensors: header["layers"]["0"]["input"].update(splits=4), r"input_source"),
        (
            lambda header, tensors: header["layers"]["0"]["input"].update(splits=13),
            "5 bits|which this layer cannot have",
        ),
        (lambda header, tensors: header["layers"]["0"]["input"].update(clip="mse"), "act_scale='dynamic'"),
        (lambda header, tensors: tensors.update({"0.input_scale": torch.ones(())}), r"it has besides 0\.input_scale"),
    ],
)
def test_forged_files_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    path, model = tmp_path / "net", net()
    ocs.save(quantized(), path)
    forge(path, change)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        ocs.load(path, model)
    assert_unchanged(model, before)


def test_states_of_other_inputs_are_refused() -> None:
    split, whole = quantized(), quantized(act_r=0.0, act_select=None, calibration=None)
    static, bad = quantized(act_scale="static"), dict(split.state_dict())
    bad["0.input_source"] = bad["0.input_source"] - 50
    for model, given, message in (
        (split, whole.state_dict(), "0: input_source is missing"),
        (whole, split.state_dict(), r"Unexpected key.*0\.input_source"),
        (split, static.state_dict(), r"0: input_form is \[6, 1, 1, 0\].*a scale per row, 5 splits"),
        (static, split.state_dict(), "0: input_scale is missing"),
        (split, bad, "0: input_source is no split plan of this layer"),
    ):
        before = state(model)
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(given)
        if model is not whole:  # torch itself loads what fits before it complains of keys
            assert_unchanged(model, before)
