"""Pointwise convolutions of inputs with channels last: copies beside the other channels, or added to the outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import outlier_weight
from torch import Tensor, nn

import ocs
from ocs.nn import convolution

CHANNELS, OUTPUTS = 20, 48
LAST = torch.channels_last
INPUTS: dict[str, Callable[[], Tensor]] = {
    "channels last": lambda: torch.randn(3, CHANNELS, 30, 41).contiguous(memory_format=LAST),
    "channels of a wider one": lambda: torch.randn(3, CHANNELS + 5, 30, 41).contiguous(memory_format=LAST)[:, 3:-2],
    "every other pixel": lambda: torch.randn(3, CHANNELS, 60, 82).contiguous(memory_format=LAST)[:, :, ::2, ::2],
    "one row, expanded": lambda: torch.randn(3, 1, 41, CHANNELS).expand(3, 30, 41, CHANNELS).permute(0, 3, 1, 2),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "weights": {},
    "inputs, too": {"abits": 8, "act_r": 0.1},
    "inputs by each batch": {"abits": 8, "act_r": 0.1, "act_split": "oracle"},
    "no bias": {},
}


def layers(name: str) -> tuple[nn.Module, nn.Module]:
    """One layer, expanded and folded."""
    torch.manual_seed(0)
    layer = nn.Conv2d(CHANNELS, OUTPUTS, 1, bias=name != "no bias")
    layer.weight.data = torch.from_numpy(outlier_weight((OUTPUTS, CHANNELS, 1, 1)))
    options = OPTIONS[name] | ({"calibration": [torch.randn(2, CHANNELS, 5, 5)]} if OPTIONS[name] else {})
    made = [nn.Sequential(copy.deepcopy(layer)).to(memory_format=LAST) for _ in range(2)]
    for model, expand in zip(made, (True, False), strict=True):
        ocs.quantize(model, wbits=5, r=0.2, skip=None, expand=expand, **options)
    return made[0], made[1]


def with_gradient(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and what a loss gives to the input."""
    x = x.detach().requires_grad_()
    y = model(x)
    return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What each call decided."""
    found: list[bool] = []
    decide = convolution._widens
    monkeypatch.setattr(convolution, "_widens", lambda *args: found.append(decide(*args)) or found[-1])
    return found


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("given", INPUTS)
def test_both_ways_agree(given: str, options: str, answers: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    (expanded, folded), x = layers(options), INPUTS[given]()
    beside = with_gradient(expanded, x)
    assert answers == [True]
    monkeypatch.setattr(convolution, "_widens", lambda x, copied: False)
    for other in (with_gradient(expanded, x), with_gradient(folded, x)):
        torch.testing.assert_close(beside, other, rtol=1e-4, atol=1e-4)
    assert beside[0].is_contiguous(memory_format=LAST)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:DeprecationWarning")
def test_copies_are_added_where_that_costs_less_or_is_written_down(answers: list[bool]) -> None:
    expanded, _ = layers("weights")
    x = INPUTS["channels last"]()
    for other in (x.contiguous(), x[:, :, :2, :2], x[0], x[:0]):
        assert expanded(other).shape == (*other.shape[:-3], OUTPUTS, *other.shape[-2:])
    assert not any(answers)
    answers.clear()
    torch.jit.trace(expanded, x, check_trace=False)  # the check runs the layer itself
    written = torch.export.export(expanded, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
    assert not any(answers)
    torch.testing.assert_close(written(x[:2]), expanded(x[:2]), rtol=1e-4, atol=1e-4)
    traced = torch.fx.symbolic_trace(expanded)
    torch.testing.assert_close(traced(x), expanded(x), rtol=0, atol=0)


def test_each_of_many_inputs_and_other_dtypes(answers: list[bool]) -> None:
    expanded, folded = layers("weights")
    x = INPUTS["channels last"]()
    many = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.func.vmap(expanded)(many)[1], folded(2 * x), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert expanded(x).dtype == torch.bfloat16
    assert expanded.double()(x.double()).dtype == torch.float64
    assert answers[-1]
