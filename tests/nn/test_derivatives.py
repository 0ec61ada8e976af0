"""Derivatives through quantized inputs are straight-through, backwards and forwards, in traced models too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

import ocs

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")

CASES = {
    "plain": {},
    "clipped": {"act_clip": 0.4},
    "split": {"act_r": 0.3, "r": 0.3},
    "folded": {"act_r": 0.3, "expand": False},
    "oracle": {"act_r": 0.3, "act_split": "oracle"},
    "a scale per row": {"act_scale": "dynamic", "r": 0.3},
}


def quantized(case: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(4, 6)
    calibration = None if case in ("oracle", "a scale per row") else lambda model: model(x)
    ocs.quantize(net, wbits=6, abits=4, calibration=calibration, **CASES[case])
    return net, x


@pytest.mark.parametrize("case", CASES)
def test_forwards_as_backwards(case: str) -> None:
    net, x = quantized(case)
    expected = jacrev(net)(x[0])
    assert expected.count_nonzero() > 0
    frozen = copy.deepcopy(net).requires_grad_(False)
    for model in (net, frozen):
        torch.testing.assert_close(jacfwd(model)(x[0]), expected)
    with torch.no_grad():
        torch.testing.assert_close(jvp(net, (x[0],), (torch.ones(6),))[1], expected.sum(1))
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(net(forward_ad.make_dual(x[0], torch.ones(6))))
    torch.testing.assert_close(tangent, expected.sum(1))
    torch.testing.assert_close(value, net(x[0]))


@pytest.mark.parametrize("case", [case for case in CASES if case != "oracle"])
def test_of_several_inputs_and_of_second_order(case: str) -> None:
    net, x = quantized(case)
    expected = torch.stack([jacrev(net)(each) for each in x])
    torch.testing.assert_close(vmap(jacfwd(net))(x), expected)
    torch.testing.assert_close(jacfwd(vmap(net))(x[:1])[0, :, 0], expected[0])

    def squares(x: Tensor) -> Tensor:
        return net(x).square().sum()

    torch.testing.assert_close(hessian(squares)(x[0]), jacrev(jacrev(squares))(x[0]))


def test_of_the_function_alone() -> None:
    x = torch.tensor([0.1, 0.3, -0.9, 0.6, torch.inf, torch.nan])
    slopes = jacfwd(lambda x: ocs.functional.fake_quantize(x, 0.25, 3))(x).diagonal()
    assert slopes.tolist() == [1, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("case", [case for case in CASES if case != "oracle"])
def test_traced(case: str) -> None:
    net, x = quantized(case)
    for traced in (torch.jit.trace(net, (x,)), torch.no_grad()(torch.jit.trace)(net, (x,))):
        assert torch.equal(traced(x), net(x))
        torch.testing.assert_close(torch.autograd.functional.jacobian(traced, x), jacrev(net)(x))


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.LSTM(6, 4), nn.MultiheadAttention(6, 2)])
def test_script_is_refused(layer: nn.Module) -> None:
    net = nn.Sequential(layer)
    ocs.quantize(net)
    with pytest.raises(RuntimeError, match=r"Quant\w+: torch.jit.script cannot take it: use torch.export"):
        torch.jit.script(net)
