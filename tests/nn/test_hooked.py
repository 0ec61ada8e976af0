"""Layers whose forward accelerate wraps: the hook goes over to the quantized layer."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

import ocs
from ocs.nn import QuantLinear


class Hook:
    """Like accelerate's."""

    no_grad, offload = False, False

    def pre_forward(self, module: nn.Module, *args: Tensor, **kwargs: Tensor) -> tuple[tuple, dict]:
        return tuple(x.float() for x in args), kwargs

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return output + 100


def add_hook(module: nn.Module, hook: Hook) -> nn.Module:
    """As accelerate does it."""
    module._old_forward, module._hf_hook = module.forward, hook

    def new_forward(module: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
        args, kwargs = module._hf_hook.pre_forward(module, *args, **kwargs)
        return module._hf_hook.post_forward(module, module._old_forward(*args, **kwargs))

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), module._old_forward)
    return module


def test_the_hook_goes_over() -> None:
    torch.manual_seed(0)
    model, plain, x = nn.Sequential(nn.Linear(6, 4)), nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 6)
    plain.load_state_dict(model.state_dict())
    add_hook(model[0], Hook())
    options = {"wbits": 4, "r": 0.2, "abits": 8, "calibration": [x]}
    ocs.quantize(model, **options)
    ocs.quantize(plain, **options)
    assert type(model[0]) is QuantLinear
    for each in (model, copy.deepcopy(model)):
        assert torch.equal(each(x.double()), plain(x) + 100)
    assert copy.deepcopy(model)[0]._old_forward.__self__ is not model[0]


def test_a_hook_that_was_removed_leaves_no_trace() -> None:
    model, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 6)
    model[0].forward = model[0].forward
    ocs.quantize(model)
    assert torch.equal(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))
    assert "forward" not in vars(model[0])


@pytest.mark.parametrize("loads", [True, False])
def test_what_cannot_go_over_stays_float(loads: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(40, 4))
    hook = Hook()
    hook.offload = loads
    add_hook(model[0], hook)
    if not loads:
        model[0]._old_forward = lambda x: x
    reason = ocs.quantize(model).layers[0].reason
    assert reason == (
        "accelerate loads its weights at each call" if loads
        else "this Linear has a forward of its own, as wrappers give it"
    )  # fmt: skip
