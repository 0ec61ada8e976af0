"""torchvision's networks, with random weights: every layer accounted for, close to float at 8 bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from zoo import torchvision_models

import ocs

models = torchvision_models()

# name, constructor options, input size, quantized layers
NETWORKS = {
    "resnet18": ({}, 64, 20),
    "resnet50": ({}, 64, 53),
    "vgg16_bn": ({}, 32, 15),
    "densenet121": ({}, 64, 120),
    "inception_v3": ({"init_weights": False}, 128, 97),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor, int]:
    options, size, layers = NETWORKS[request.param]
    torch.manual_seed(0)
    model = getattr(models, request.param)(weights=None, **options).eval()
    return model, torch.randn(2, 3, size, size), layers


def first_output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(x)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of what varies between the images and classes."""
    return float((a - b).norm() / (b - b.mean()).norm())


def test_quantizes_every_layer_and_stays_close(network: tuple[nn.Module, torch.Tensor, int]) -> None:
    model, x, layers = network
    expected = first_output(model, x)
    outputs = {}
    for expand in (True, False):
        ours = copy.deepcopy(model)
        report = ocs.quantize(ours, wbits=8, r=0.02, expand=expand)
        assert len(report.quantized) == layers
        assert [layer.status for layer in report.layers if layer.status != "quantized"] == ["skipped"]
        assert 1.02 <= report.relative_size < 1.03
        outputs[expand] = first_output(ours, x)
    assert relative_error(outputs[True], expected) < 0.1
    assert relative_error(outputs[True], outputs[False]) < 1e-3
