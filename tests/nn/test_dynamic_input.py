"""act_scale="dynamic": each row of an input has its own scale, also each hidden state that meets a recurrent weight."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SmallNet, assert_unchanged, folded_twin, header_of, outlier_weight, state
from test_own_forward import Conv1D, OtherLinear, SamePadded
from test_recurrent import flat, heavy
from torch import Tensor, nn

import ocs
from ocs.formats import reader
from ocs.nn import QuantizedLayer
from ocs.nn.input import InputGrid, check_grid
from ocs.nn.input_rows import round_rows, row_scales
from ocs.weight.threshold import scale_for

DYNAMIC = {"abits": 8, "act_scale": "dynamic"}


def quantized(layer: nn.Module, bits: int = 8, **options: Any) -> QuantizedLayer:
    """The layer after quantize(), without calibration."""
    model = nn.Sequential(copy.deepcopy(layer))
    options = {"wbits": 5, "r": 0.2, "abits": bits, "act_scale": "dynamic", **options}
    ocs.quantize(model, overrides={"0": {"abits": bits}}, **options)
    return model[0]


def literal_rows(x: Tensor, bits: int) -> Tensor:
    """Round row by row in numpy's float32, in the dtype of x."""
    qmax = 2 ** (bits - 1) - 1
    rows = x.detach().float().numpy().reshape(-1, x.shape[-1])
    found = np.zeros_like(rows)
    for row, out in zip(rows, found, strict=True):
        largest = np.abs(row).max()
        scale = largest / np.float32(qmax) if largest != 0 else np.float32(1)
        out[:] = scale * np.clip(np.rint(row / scale), -qmax, qmax) if np.isfinite(largest) else np.nan
    return torch.from_numpy(found).view(x.shape).to(x.dtype)


def inputs(*shape: int, seed: int = 0) -> Tensor:
    """Rows of very different sizes, one of zeros."""
    x = torch.from_numpy(outlier_weight(shape, seed))
    x.view(-1, shape[-1])[:: max(1, x[..., 0].numel() // 3)] *= 50
    x.view(-1, shape[-1])[-1] *= shape[:-1] == ()
    return x


# --- Rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(10,), (7, 10), (2, 3, 4, 10), (5, 1)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_are_rounded_as_defined(bits: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = inputs(*shape).to(dtype)
    ours = round_rows(x, bits)
    assert ours.dtype == dtype
    assert torch.equal(ours, literal_rows(x, bits))


def test_rows_that_are_odd() -> None:
    x = torch.tensor([[0.0, -0.0, 0.0], [1.0, torch.nan, 2.0], [1.0, 3.0, -torch.inf], [2.5, -0.1, 0.0], [1e-45, 0, 0]])
    ours = round_rows(x, 3)
    assert ours[0].tolist() == [0, 0, 0]
    assert not ours[0].signbit().any()
    assert ours[1:3].isnan().all()
    assert torch.equal(ours[3], torch.tensor([3.0, 0.0, 0.0]) * (torch.tensor(2.5) / 3))
    assert ours[4, 0] == x[4, 0]
    assert row_scales(x, 3)[0] == 1
    for shape in ((0, 5), (3, 0)):
        assert round_rows(torch.zeros(shape), 4).shape == shape


def test_ties_go_to_even() -> None:
    x = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert round_rows(x, 4).tolist() == [[7, 0, 2, 2, 0, -2]]


def test_quotients_decide_beside_ties() -> None:
    """Where a product with 1 / scale would often fall to the other side."""
    largest = torch.rand(200, 1) + 0.1
    x = torch.cat([largest, (torch.arange(127) + 0.5) * (largest / 127)], 1)
    assert torch.equal(round_rows(x, 8), literal_rows(x, 8))


def test_scales_are_those_of_other_grids() -> None:
    x = inputs(100, 6)
    expected = scale_for(x.abs().amax(-1, keepdim=True), 127)
    assert torch.equal(row_scales(x, 8), expected)


# --- Layers that multiply by one weight -------------------------------------------------------------------------------


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12)])
@pytest.mark.parametrize("make_layer", [lambda: nn.Linear(12, 6), lambda: OtherLinear(12, 6)])
def test_linear(make_layer: Callable[[], nn.Module], shape: tuple[int, ...], expand: bool) -> None:
    if make_layer().__class__ is OtherLinear:
        ocs.register(OtherLinear)
    ours, x = quantized(make_layer(), 4, expand=expand), inputs(*shape)
    assert ours.splits
    expected = F.linear(literal_rows(x, 4), ours.folded("weight"), ours.bias)
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    ours, x = quantized(nn.Linear(12, 6)), inputs(5, 12)
    expected = ours(x)
    x[1, 3], x[2, 0] = torch.nan, torch.inf
    found = ours(x)
    assert found[1:3].isnan().all()
    assert torch.equal(found[[0, 3, 4]], expected[[0, 3, 4]])
    assert torch.equal(expected[4], ours.bias)


def test_bfloat16() -> None:
    ours, x = quantized(nn.Linear(12, 6)).bfloat16(), inputs(5, 12).bfloat16()
    expected = F.linear(literal_rows(x, 8), ours.weight, ours.bias)
    assert ours(x).dtype == torch.bfloat16
    torch.testing.assert_close(ours(x), expected, rtol=0.05, atol=0.05 * float(expected.detach().abs().max()))


def test_conv1d_of_transformers() -> None:
    ours, x = quantized(Conv1D()), inputs(2, 5, 8)
    expected = literal_rows(x, 8) @ ours.folded("weight").T + ours.bias
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sizes", [{}, {"kdim": 8, "vdim": 10}])
def test_attention(sizes: dict[str, int]) -> None:
    layer = nn.MultiheadAttention(12, 3, **sizes).eval()
    ours = quantized(layer, r=0.0)
    twin = folded_twin(nn.Sequential(layer), nn.Sequential(ours))[0]
    given = [inputs(4, 2, size, seed=i) for i, size in enumerate((12, sizes.get("kdim", 12), sizes.get("vdim", 12)))]
    expected = twin(*(literal_rows(x, 8) for x in given))
    for found, wanted in zip(ours(*given), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    if not sizes:
        rounded = literal_rows(given[0], 8)
        torch.testing.assert_close(ours(*[given[0]] * 3)[0], twin(*[rounded] * 3)[0], rtol=1e-4, atol=1e-5)


def test_the_gradient_is_one_everywhere() -> None:
    ours, x = quantized(nn.Linear(12, 6), 2), inputs(5, 12).requires_grad_()
    ours(x).sum().backward()
    torch.testing.assert_close(x.grad, ours.weight.sum(0).expand(5, -1))
    assert torch.equal(ours(x), ours(x.detach()))


# --- What quantize() says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act_scale": "row"}, "act_scale='row': use 'static' or 'dynamic'"),
        ({"abits": None}, "0: an act_ option without abits has no effect: set abits, too"),
        ({"act_clip": "mse"}, "act_clip='mse' with act_scale='dynamic'.*use act_clip='none', or act_scale='static'"),
        ({"act_r": 0.1}, "0: act_r=0.1 needs calibration=: batches of inputs, say"),
        ({"act_select": "max"}, "act_select='max' has no effect: it is for act_r"),
        ({"act_split": "oracle"}, "act_split='oracle' with act_scale='dynamic'.*use act_split='static', or"),
        ({"act_signed": "auto"}, "act_signed='auto' with act_scale='dynamic'.*use act_signed=True, or"),
        ({"calibration": torch.randn(2, 3)}, "calibration= has no effect.*abits= with act_scale='static' or act_r="),
        ({"act_scale": "static"}, "0: abits=8 needs calibration"),
        (
            {"act_scale": "static", "act_clip": "mse", "overrides": {"0": {"act_scale": "dynamic"}}},
            r"0: overrides\['0'\]: act_clip='mse' with act_scale='dynamic'",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    before = state(model)
    with pytest.raises(ValueError, match=message):
        ocs.quantize(model, **DYNAMIC | options)
    assert_unchanged(model, before)


def test_convolutions_have_no_rows(net: SmallNet) -> None:
    before = state(net)
    message = (
        r"body\.0: act_scale='dynamic' is for inputs whose channels are the last axis, which those of a Conv2d are not:"
        r" use overrides=\{'body\.0': dict\(act_scale='static'\)\} with calibration=, or skip='body\.0'"
    )
    with pytest.raises(ValueError, match=message):
        ocs.quantize(net, **DYNAMIC)
    assert_unchanged(net, before)
    ocs.register(SamePadded, like=nn.Conv2d)
    with pytest.raises(ValueError, match="which those of a SamePadded are not"):
        ocs.quantize(nn.Sequential(SamePadded(3, 4, 3)), skip=None, **DYNAMIC)
    x, overrides = torch.randn(4, 3, 8, 8), {"body.*": {"act_scale": "static"}}
    ocs.quantize(net, calibration=x, overrides=overrides, **DYNAMIC)
    assert [net.body[0].input_grid.dynamic, net.head.input_grid.dynamic] == [False, True]
    assert net.head._buffers["input_scale"] is None
    assert net.head.input_range is None
    assert net(x).isfinite().all()


def test_the_best_recipe_neither_clips_nor_asks_for_signs() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    report = ocs.quantize(model, recipe="best", **DYNAMIC)
    assert (report.settings["act_clip"], report.settings["act_signed"]) == ("none", True)
    assert model[2].input_grid == InputGrid(8, act_scale="dynamic")


@pytest.mark.parametrize(
    "options",
    [
        {"allocate": "error", "r": 0.2, "wbits": 4},
        {"wbits": "auto", "budget": 130, "r": 0.1},
        {"correct_bias": True},
        {"rounding": "gptq", "wbits": 4},
    ],
)
def test_with_other_options(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)), inputs(30, 12)
    ocs.quantize(model, calibration=[x], **DYNAMIC, **options)
    expected = x
    for layer in (model[0], model[2]):
        assert layer.input_grid.dynamic
        expected = F.linear(literal_rows(expected, 8), layer.folded("weight"), layer.bias)
        expected = expected.relu() if layer is model[0] else expected
    torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)  # a tie may fall otherwise


def test_reports_and_repr_show_it() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    report = ocs.quantize(model, **DYNAMIC)
    (line,) = report.quantized
    assert (line.act_bits, line.act_dynamic, line.act_scale, line.act_threshold) == (8, True, None, None)
    assert "8 bits, a scale per row" in report.to_text(all=True)
    assert "8 bits, a scale per row" in report.to_html()
    assert "input of 8 bits, a scale per row" in repr(model)
    assert json.loads(report.to_json())["settings"]["act_scale"] == "dynamic"
    assert line.packed_bytes == 30 + 4


# --- They travel ------------------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """Every kind of layer whose inputs have rows."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.cell = heavy(nn.LSTM(10, 12, 2, bidirectional=True)), heavy(nn.GRUCell(24, 12))
        self.attention, self.head = nn.MultiheadAttention(12, 3), nn.Linear(12, 5)

    def forward(self, words: Tensor) -> Tensor:
        """[T, N, 10] -> [1, N, 5]."""
        query = self.cell(self.lstm(words)[0][-1])[None]
        return self.head(self.attention(query, query, query)[0])


OVERRIDES = {"lstm": {"abits": 6}, "cell": {"abits": 7}}
WORDS = torch.randn(5, 2, 10, generator=torch.Generator().manual_seed(0))


def rows(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = Rows().eval()
    ocs.quantize(model, **{"wbits": 5, "r": 0.1, "overrides": OVERRIDES, **DYNAMIC, **options})
    return model


def test_copies_states_and_files(tmp_path: Path) -> None:
    model, other = rows(), rows(1)
    expected = model(WORDS)
    assert not torch.equal(other(WORDS), expected)
    other.load_state_dict(model.state_dict())
    path = tmp_path / "rows.safetensors"
    ocs.save(model, path)
    loaded = [ocs.load(path, Rows().eval()), ocs.load(path, Rows().eval().to("meta"))]
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other, *loaded):
        assert torch.equal(each(WORDS), expected)
        assert repr(each) == repr(model)
        assert each.lstm.input_grid == InputGrid(6, act_scale="dynamic")
    names = {name.rpartition(".")[2] for name in model.state_dict()}
    assert "input_form" in names
    assert not names & {"input_scale", "input_source"}


def test_older_readers_are_told_by_files_with_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {"dynamic": tmp_path / "dynamic", "static": tmp_path / "static"}
    for act_scale, path in paths.items():
        calibration = [WORDS] if act_scale == "static" else None
        ocs.save(rows(act_scale=act_scale, calibration=calibration), path)
    headers = {name: header_of(path) for name, path in paths.items()}
    assert {name: header["format"] for name, header in headers.items()} == {"dynamic": 4, "static": 2}
    assert headers["dynamic"]["layers"]["head"]["input"]["act_scale"] == "dynamic"
    assert "act_scale" not in headers["static"]["layers"]["head"]["input"]
    monkeypatch.setattr(reader, "FORMAT", 3)
    ocs.load(paths["static"], Rows())
    with pytest.raises(ValueError, match="wrote it in format 4, newer than 3: upgrade torch-ocs"):
        ocs.load(paths["dynamic"], Rows())


def test_states_of_the_other_kind_are_refused() -> None:
    dynamic, static = rows(), rows(act_scale="static", calibration=[WORDS])
    for model, other, message in (
        (
            dynamic,
            static,
            r"head: input_form is \[8, 1, 1, 0\]: the state is of another input than one of 8 b",
        ),
        (static, dynamic, "head: input_scale is missing"),
        (dynamic, rows(abits=7), r"head: input_form is \[7, 1, 1, 2\]"),
    ):
        before = state(model)
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(other.state_dict())
        assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_scale": "row"}, "act_scale='row'"),
        ({"act_scale": ["dynamic"]}, "act_scale="),
        ({"act_scale": "dynamic", "splits": -1}, "splits=-1"),
        ({"act_scale": "dynamic", "act_split": "oracle"}, "act_scale='dynamic'"),
        ({"act_scale": "dynamic", "signed": False}, "act_scale='dynamic'"),
        ({"act_scale": "dynamic", "clip": "mse"}, "act_scale='dynamic'"),
    ],
)
def test_grids_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_grid(InputGrid(**{"bits": 8, **change}))


def test_a_file_cannot_give_rows_to_a_convolution(tmp_path: Path, net: SmallNet) -> None:
    ocs.quantize(net, abits=8, act_split="oracle")
    net.body[0].input_grid = InputGrid(8, act_scale="dynamic")
    ocs.save(net, tmp_path / "net")
    with pytest.raises(ValueError, match=r"body\.0: it was saved with an input of 8 bits, a scale per row, which this"):
        ocs.load(tmp_path / "net", SmallNet())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch's own tracer
def test_compile_export_and_trace() -> None:
    model, x = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)), inputs(6, 12)
    ocs.quantize(model, wbits=5, r=0.2, **DYNAMIC)
    expected = model(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)


@pytest.mark.parametrize("part", ["attention", "lstm", "cell"])
def test_compile_and_export_of(part: str) -> None:
    layer, x = getattr(rows(), part), torch.randn(4, 2, {"attention": 12, "lstm": 10, "cell": 24}[part])
    given = {"attention": (x, x, x), "lstm": (x,), "cell": (x[0],)}[part]
    expected = flat(layer(*given))
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(*given)
    exported = torch.export.export(layer, given).module()(*given)
    for found in (compiled, exported):
        for a, b in zip(flat(found), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
