"""Convolutions that standardize their weight at every call are quantized with the weight that they use."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ocs
from ocs.functional import quantize_weight
from ocs.model.standardized import made_permanent
from ocs.nn import QuantConv2d


class ScaledStdConv2d(nn.Conv2d):
    """Like timm's, under its full name: in words of our own."""

    __module__ = "timm.layers.std_conv"

    def __init__(self, *args: int, same: bool = False, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        self.scale, self.eps, self.same_pad = 0.3, 1e-6, same
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def standardized(self) -> Tensor:
        flat = self.weight.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, correction=0, keepdim=True) + self.eps).sqrt()
        return flat.view_as(self.weight) * self.gain * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.standardized(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class Unknown(ScaledStdConv2d):
    __module__ = "somewhere"


def network(kind: type[nn.Module] = ScaledStdConv2d, **more: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(kind(8, 6, 3, stride=2, padding=1, groups=2, **more), nn.Conv2d(6, 40, 3)).eval()


def test_the_plain_convolution_computes_the_same() -> None:
    layer, x = network()[0], torch.randn(2, 8, 9, 9)
    plain = made_permanent(layer)
    assert type(plain) is nn.Conv2d
    torch.testing.assert_close(plain(x), layer(x))


def test_quantized_with_the_weight_that_it_uses(tmp_path: Path) -> None:
    model, x = network(), torch.randn(2, 8, 9, 9)
    fresh, standardized = copy.deepcopy(model), model[0].standardized().detach()
    expected = quantize_weight(standardized, 4, 0.2, groups=2)
    line = ocs.quantize(model, wbits=4, r=0.2).layers[0]
    assert type(model[0]) is QuantConv2d
    assert line.reason == "its weight as it was standardized, for good"
    assert torch.equal(model[0].weight_int, expected.ints)
    torch.testing.assert_close(model[0].scale, expected.scale)
    ocs.save(model, tmp_path / "model")
    nn.init.ones_(fresh[0].weight)
    assert torch.equal(ocs.load(tmp_path / "model", fresh)(x), model(x))


def test_inputs_biases_and_second_moments() -> None:
    model, x = network(), torch.randn(2, 8, 9, 9)
    y = model[0](x).detach()
    ocs.quantize(model, abits=8, rounding="gptq", correct_bias=True, calibration=[x])
    assert model[0].input_grid.bits == 8
    assert float((model[0](x).detach() - y).norm() / y.norm()) < 0.02


@pytest.mark.parametrize("model", [network(same=True), network(Unknown)], ids=["pads by size", "unknown"])
def test_others_stay_float(model: nn.Module) -> None:
    line = ocs.quantize(model, skip=None).layers[0]
    assert line.status == "float"
    assert "has a forward of its own; ocs.register(" in line.reason
