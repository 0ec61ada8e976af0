"""Layers that keep the forward of their class: registered ones, transformers' Conv1D, and experts in one parameter."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ocs
from ocs.functional import quantize_weight
from ocs.nn import QuantLinear, QuantOwnForward
from ocs.nn.registry import REPLACEMENTS


class OtherLinear(nn.Linear):
    """A linear layer in other words."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T + self.bias


class Narrower(OtherLinear):
    """A subclass of a registered class, with a forward of its own."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden)[..., :2]


class SamePadded(nn.Conv2d):
    """Pads its input by its size."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(F.pad(x, (0, x.shape[-1] % 2 + 2, 0, 2)), self.weight, self.bias)


class Strange(nn.Module):
    """No subclass of torch's layers, with a buffer and a child of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6))
        self.register_buffer("factor", torch.tensor(2.0))
        self.norm, self._private = nn.LayerNorm(6), 3.0

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.factor * F.linear(x, self.weight, self.shift)) * self._private


class Conv1D(nn.Module):
    """The layer of GPT-2, under its full name."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self) -> None:
        super().__init__()
        self.nf = 6
        self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Experts(nn.Module):
    """Experts [E, O, C], or [E, C, O]; which ones, a router says."""

    def __init__(self, *, inputs_first: bool) -> None:
        super().__init__()
        self.num_experts, self.inputs_first = 3, inputs_first
        up, down = ((8, 20), (10, 8)) if inputs_first else ((20, 8), (8, 10))
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(3, *up)), nn.Parameter(torch.randn(3, *down))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(3, 20))

    def forward(self, x: Tensor, expert: int = 1) -> Tensor:
        up, down = self.gate_up_proj[expert], self.down_proj[expert]
        if self.inputs_first:
            up, down = up.T, down.T
        gate, up = F.linear(x, up, self.gate_up_proj_bias[expert]).chunk(2, -1)
        return F.linear(gate.sigmoid() * up, down)


@pytest.fixture(autouse=True)
def _registered() -> None:
    before = dict(REPLACEMENTS)
    ocs.register(OtherLinear)
    ocs.register(Strange)
    ocs.register(SamePadded, like=nn.Conv2d)
    yield
    REPLACEMENTS.clear()
    REPLACEMENTS.update(before)


LAYERS = {
    "other linear": (lambda: OtherLinear(8, 6), (5, 8)),
    "subclass of a registered one": (lambda: Narrower(8, 6), (5, 8)),
    "same padding": (lambda: SamePadded(8, 6, 3, groups=2), (2, 8, 5, 5)),
    "strange": (Strange, (5, 8)),
    "Conv1D": (Conv1D, (2, 5, 8)),
    "experts": (lambda: Experts(inputs_first=False), (5, 8)),
    "experts, inputs first": (lambda: Experts(inputs_first=True), (5, 8)),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(build()).eval()
    return model, torch.randn(shape)


def by_hand(model: nn.Module, **options: object) -> nn.Module:
    """Quantize each weight, or each expert's, as functional does it, and write it into the float model."""
    twin = copy.deepcopy(model)
    for name, parameter in twin[0].named_parameters(recurse=False):
        if parameter.dim() == 1 or name == "gate_up_proj_bias":
            continue
        flipped = isinstance(twin[0], Conv1D) or getattr(twin[0], "inputs_first", False)
        for weight in parameter.data if parameter.dim() == 3 else [parameter.data]:
            w, groups = weight.T if flipped else weight, getattr(twin[0], "groups", 1)
            q = quantize_weight(w.contiguous(), groups=groups, **options)
            folded = torch.ops.ocs.fold(q.ints, q.scale, q.source, groups, w.shape[1])
            weight.copy_(folded.T if flipped else folded)
    return twin


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("name", LAYERS)
def test_computes_with_the_quantized_weight(name: str, granularity: str) -> None:
    model, x = make(name)
    expected = by_hand(model, bits=4, r=0.2, granularity=granularity)(x)
    report = ocs.quantize(model, wbits=4, r=0.2, granularity=granularity)
    assert isinstance(model[0], QuantOwnForward)
    assert model[0].splits > 0
    assert torch.equal(model(x), expected)
    assert "runs folded: its forward is its own" in report.quantized[0].reason


def test_every_expert_has_a_plan_and_a_scale_of_its_own() -> None:
    model, _ = make("experts, inputs first")
    model[0].gate_up_proj.data[1] *= 100
    report = ocs.quantize(model, wbits=4, r=0.1)
    lines = {line.label: line for line in report.quantized}
    assert list(lines) == [f"0.{name}.{expert}" for name in ("gate_up_proj", "down_proj") for expert in range(3)]
    first, large = lines["0.gate_up_proj.0"], lines["0.gate_up_proj.1"]
    assert (first.shape, first.channels, first.splits, first.float_bytes) == ((8, 20), 8, 1, 640)
    assert large.scale > 30 * first.scale
    assert {line.sources for line in report.quantized} != {first.sources}


@pytest.mark.parametrize("name", LAYERS)
def test_travels(name: str, tmp_path) -> None:
    model, x = make(name)
    fresh = copy.deepcopy(model)
    for parameter in fresh.parameters():
        nn.init.ones_(parameter)
    ocs.quantize(model, wbits=3, r=0.2)
    expected = model(x)
    ocs.save(model, tmp_path / "model.safetensors")
    assert torch.equal(ocs.load(tmp_path / "model.safetensors", fresh)(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)
    assert model.double()(x.double()).dtype == torch.float64
    if name != "Conv1D":  # whose module is not there
        assert torch.equal(pickle.loads(pickle.dumps(model))(x.double()), model(x.double()))


@pytest.mark.parametrize("name", LAYERS)
def test_inputs_and_second_moments(name: str) -> None:
    """Rounded where the input is one; experts stay rounded to nearest, and their inputs float."""
    model, x = make(name)
    calibration = ocs.calibrate(model, [x], moments=True)
    (first, *_) = ocs.quantize(model, abits=8, rounding="gptq", calibration=calibration).quantized
    if "experts" in name:
        assert first.reason.startswith("rounded to nearest: what each expert meets is not seen")
        assert first.reason.endswith("input stays float")
        assert model[0].input_grid is None
    else:
        assert (first.rounding, first.act_bits) == ("gptq", 8)
        assert first.act_threshold == pytest.approx(float(x.abs().max()))
        grid = torch.round(x / model[0].input_scale) * model[0].input_scale
        torch.testing.assert_close(model(x), model(grid))
        assert not torch.equal(model[0].round_input(x), x)


def test_without_a_promise_it_stays_float_and_says_how_to_give_it() -> None:
    del REPLACEMENTS[OtherLinear]
    with pytest.warns(UserWarning, match="only 20%"):
        report = ocs.quantize(nn.Sequential(OtherLinear(8, 8), nn.Linear(8, 2)))
    assert report.layers[0].reason == (
        "OtherLinear has a forward of its own; ocs.register(OtherLinear, like=nn.Linear) quantizes it"
    )


@pytest.mark.parametrize(
    ("cls", "like", "error"),
    [(nn.Linear, nn.Linear, TypeError), (3, nn.Linear, TypeError), (QuantLinear, nn.Linear, TypeError),
     (OtherLinear, nn.LSTM, ValueError), (OtherLinear, "Linear", ValueError)],
)  # fmt: skip
def test_promises_that_make_no_sense(cls: object, like: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"cls=|like="):
        ocs.register(cls, like=like)


def test_a_name_that_quantized_layers_use_is_the_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].scale = 2.0
    assert "an attribute scale" in ocs.quantize(model).layers[0].reason
