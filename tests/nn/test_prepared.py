"""Gradients of weights and inputs that are trained as quantized, against the formulas written out; and their values."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import outlier_weight
from torch import Tensor, nn

import ocs
from ocs.functional import fake_quantize, fold, plan_splits, quantize_weight
from ocs.kernels import ops
from ocs.nn.input_parts import parts_of
from ocs.nn.straight_through import TrainedGrid, trained_weight

pytestmark = pytest.mark.usefixtures("one_thread")


def lsq(v: Tensor, s: Tensor, smallest: int, largest: int, rounded: Tensor) -> tuple[Tensor, Tensor]:
    """Give d v_hat / d v and d v_hat / d s by Esser et al., ICLR 2020, equations 5 and 3, of v off the thresholds."""
    inside = (smallest < v / s) & (v / s < largest)
    beyond = torch.where(v / s >= largest, float(largest), float(smallest))
    return inside.float(), torch.where(inside, rounded - v / s, beyond)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_weights_without_splits_have_the_gradients_of_lsq(bits: int, granularity: str) -> None:
    w = torch.from_numpy(outlier_weight((6, 4, 3))).requires_grad_()
    quantized = quantize_weight(w, bits, clip=0.4, granularity=granularity)
    s, largest = quantized.scale.requires_grad_(), 2 ** (bits - 1) - 1
    grad = torch.randn(6, 4, 3)
    w_hat = trained_weight(w, s, quantized.source, TrainedGrid(bits, "qa", "nearest", 1, True))
    of_w, of_s = torch.autograd.grad(w_hat, (w, s), grad)
    steps = s.detach().view(-1, 1, 1).expand(6, 1, 1)
    expected_w, expected_s = lsq(w.detach(), steps, -largest, largest, torch.floor(w.detach() / steps + 0.5))
    assert 0 < expected_w.mean() < 1
    torch.testing.assert_close(of_w, grad * expected_w)
    each = (grad * expected_s).flatten(1).sum(1)
    count = 12 if granularity == "channel" else 72
    torch.testing.assert_close(of_s, (each if s.dim() else each.sum()) / math.sqrt(count * largest))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("split", ["qa", "naive", "even"])
def test_copies_pass_what_is_within_their_threshold(split: str, groups: int) -> None:
    w = torch.from_numpy(outlier_weight((6, 8, 2)))
    w[:, 2] *= 8
    w[:3, 5] *= 4
    plan = plan_splits(w, 0.7, groups=groups, split=split)
    assert plan.parts.max() >= 4
    q = quantize_weight(w, 3, 0.7, clip=0.25, split=split, groups=groups)
    w.requires_grad_()
    q.scale.requires_grad_()
    w_hat = trained_weight(w, q.scale, q.source, TrainedGrid(3, split, "nearest", groups, True))
    assert torch.equal(w_hat, fold(q._replace(scale=q.scale.detach()), 8, groups))
    grad = torch.randn_like(w)
    of_w, of_s = torch.autograd.grad(w_hat, (w, q.scale), grad)
    share, rows = torch.zeros_like(w), 6 // groups
    for j, channel in enumerate(q.source.tolist()):
        g, c = divmod(channel, 8)
        part = w.detach()[g * rows : (g + 1) * rows, c] / int(plan.parts[j])
        share[g * rows : (g + 1) * rows, c] += (part.abs() / q.scale.detach() <= 3) / int(plan.parts[j])
    assert ((share > 0.1) & (share < 0.9)).any() == (split != "even")  # equal parts pass all, or none
    torch.testing.assert_close(of_w, grad * share)
    expected = grad * (w_hat - share * w).detach() / q.scale.detach()
    torch.testing.assert_close(of_s, expected.sum() / math.sqrt(96 * 3))


def test_what_rounds_to_the_grid_passes_where_thresholds_are_searched() -> None:
    w = torch.tensor([[3.4, -3.6, 1.0, 2.9]], requires_grad=True)
    for learned, expected in ((False, [1, 0, 1, 1]), (True, [0, 0, 1, 1])):
        grid = TrainedGrid(3, "qa", "nearest", 1, learned)
        (of_w,) = torch.autograd.grad(trained_weight(w, torch.tensor(1.0), torch.arange(4), grid).sum(), w)
        assert of_w.tolist() == [expected]


@pytest.mark.parametrize("split", ["qa", "even"])
@pytest.mark.parametrize(("r", "groups"), [(0.4, 1), (1.0, 1), (0.7, 2)])
def test_the_order_of_copies_says_their_places(r: float, groups: int, split: str) -> None:
    w = torch.from_numpy(outlier_weight((4, 30, 2)))
    plan = plan_splits(w, r, groups=groups, split=split)
    parts, offset = parts_of(plan.source, groups * 30, split)
    assert torch.equal(parts.int(), plan.parts)
    assert torch.equal(offset.int(), plan.offset)


def test_no_number_stays_none() -> None:
    w = torch.tensor([[1.0, torch.nan, torch.inf, 2.0]])
    w_hat = trained_weight(w, torch.tensor(1.0), torch.arange(4), TrainedGrid(8, "qa", "nearest", 1, True))
    assert w_hat.isfinite().tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("signed", [True, False])
def test_inputs_have_the_gradients_of_lsq(signed: bool) -> None:
    x, s = (2 * torch.randn(5, 7)).requires_grad_(), torch.tensor(0.3, requires_grad=True)
    grad, (smallest, largest) = torch.randn(5, 7), (-3, 3) if signed else (0, 7)
    x_hat = ops.fake_quantize(x, s, 3, signed)
    assert torch.equal(x_hat, fake_quantize(x.detach(), 0.3, 3, signed))
    of_x, of_s = torch.autograd.grad(x_hat, (x, s), grad)
    expected_x, expected_s = lsq(x.detach(), s.detach(), smallest, largest, torch.round(x.detach() / s.detach()))
    torch.testing.assert_close(of_x, grad * expected_x)
    torch.testing.assert_close(of_s, (grad * expected_s).sum())


@pytest.mark.parametrize("act_r", [0.0, 0.5])
def test_a_layer_scales_the_gradient_of_its_inputs_scale(act_r: float) -> None:
    """By 1 / sqrt(N qmax), N the features of an example; parts of split channels add up."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(6, 5, 3)), torch.randn(4, 6, 5, 5)
    x[:, 2] *= 5
    given = {"act_r": act_r, "act_select": "max"} if act_r else {}
    ocs.training.prepare(net, wbits=8, abits=3, act_clip=0.5, calibration=[x], skip=None, **given)
    layer, grad = net[0], torch.randn(4, 5, 3, 3)
    net(x).backward(grad)
    (of_input,) = torch.autograd.grad(nn.functional.conv2d(y := x.requires_grad_(), layer.weight), y, grad)
    s, copies, expected = layer.input_scale.detach(), [2**k for k in range(3)], 0.0
    sources = layer._buffers.get("input_source", torch.arange(6)).tolist()
    for c in range(6):
        n = sources.count(c)
        assert n in copies, "the test takes equal parts only"
        for k in range(n):
            part = x.detach()[:, c] / n + s * ((k + 0.5) / n - 0.5)
            inside, of_s = lsq(part, s, -3, 3, torch.round(part / s))
            expected += (of_input[:, c] * (of_s + ((k + 0.5) / n - 0.5) * inside)).sum()
    torch.testing.assert_close(layer.input_scale.grad, expected / math.sqrt(6 * 5 * 5 * 3), rtol=1e-4, atol=1e-5)


def test_a_scale_that_crossed_zero_is_its_size() -> None:
    net = nn.Sequential(nn.Linear(6, 4))
    ocs.training.prepare(net, wbits=3, r=0.3)
    weight = net[0].weight.detach()
    with torch.no_grad():
        net[0].scale.neg_()
    assert torch.equal(net[0].weight, weight)
    with torch.no_grad():
        net[0].scale.zero_()
    assert net[0].weight.isfinite().all()
