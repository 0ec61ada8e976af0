"""torchvision's classification networks: every layer accounted for, wired as in torch, as close to float as 8 bits are.

By default the smallest of each family and the paper's networks; `pytest -m slow` runs all below 100 million parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from conftest import folded_twin
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from zoo import torchvision_models

import ocs
from ocs.nn.registry import REPLACEMENTS

models = torchvision_models()

PAPER = {"resnet50": 53, "vgg16_bn": 15, "densenet121": 120, "inception_v3": 97}  # quantized layers
PATCHES = ("convnext", "swin", "vit")  # whose first convolution embeds patches: it is quantized
MILLION = 1_000_000


def parameters(name: str) -> int:
    """Known without building the network."""
    return models.get_model_weights(name).DEFAULT.meta["num_params"]


def networks() -> Iterator[object]:
    """Every classification network that some run takes, with the mark of the slow run."""
    families: dict[str, list[str]] = {}
    for name in sorted(models.list_models(module=models), key=parameters):
        families.setdefault(models.get_model_builder(name).__module__, []).append(name)
    for smallest, *others in families.values():
        yield smallest
        for name in others:
            if name in PAPER:
                yield name
            elif parameters(name) < 100 * MILLION:
                yield pytest.param(name, marks=pytest.mark.slow)


def build(name: str) -> nn.Module:
    """Random weights, under which signals neither vanish nor come out as zero."""
    torch.manual_seed(0)
    options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    model = models.get_model(name, weights=None, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight)
    return model


def images(count: int, size: int) -> Tensor:
    """Smooth, so that they differ also where a network pools them."""
    return F.interpolate(torch.randn(count, 3, 4, 4), size=size, mode="bilinear")


def small_images(name: str) -> Tensor:
    """Of the smallest size that the network takes, and enough of them for the statistics of batch norms."""
    if name.startswith(("vit", "maxvit")):
        return images(4, 224)
    return images(16, 128 if name in ("inception_v3", "googlenet") else 64)


def settle(model: nn.Module, x: Tensor) -> None:
    """Batch norms take the statistics of the images, as trained ones have."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    run(model, x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def relative_error(a: Tensor, b: Tensor) -> float:
    """Of what varies between the images and classes; of the median image, as a network amplifies some at random."""
    return float(((a - b).norm(dim=1) / (b - b.mean()).norm(dim=1)).median())


def noisy(model: nn.Module, report: ocs.Report) -> nn.Module:
    """The float model with noise of half a step on every quantized weight: what rounding to 8 bits may do to it."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for line in report.quantized:
            weight = twin.get_submodule(line.name)._parameters[line.weight]
            weight += (torch.rand_like(weight) - 0.5) * line.scale
    return twin


@pytest.mark.parametrize("name", list(networks()))
def test_quantized_networks(name: str) -> None:
    model, x = build(name), small_images(name)
    settle(model, x)
    expected = run(model, x)
    folded, expanded = copy.deepcopy(model), copy.deepcopy(model)
    report = ocs.quantize(folded, wbits=8, r=0.02, expand=False)
    ocs.quantize(expanded, wbits=8, r=0.02)

    # every layer is reported, and none of these kinds is left float
    with_weights = [n for n, m in model.named_modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))]
    assert list(dict.fromkeys(line.name for line in report.layers)) == with_weights
    skipped = [line.reason for line in report.layers if line.status == "skipped"]
    assert skipped == ([] if name.startswith(PATCHES) else ["first convolution"])
    left = [line for line in report.layers if line.status == "float"]
    assert all(line.reason and not isinstance(model.get_submodule(line.name), tuple(REPLACEMENTS)) for line in left)
    assert len(report.quantized) == PAPER.get(name, len(report.quantized))

    # every layer computes what torch's does with the dequantized weights; deep random networks amplify rounding
    ours = run(expanded, x)
    assert relative_error(run(folded, x), run(folded_twin(model, folded), x)) < 1e-5
    assert relative_error(ours, run(folded, x)) < 2e-3
    draws = [relative_error(run(noisy(model, report), x), expected) for _ in range(3)]
    assert relative_error(ours, expected) < 2 * sum(draws) / len(draws)


@pytest.mark.parametrize(("name", "auxiliary"), [("inception_v3", ["AuxLogits"]), ("googlenet", ["aux1", "aux2"])])
def test_auxiliary_heads_and_tuples(name: str, auxiliary: list[str]) -> None:
    """In train mode these networks return a named tuple."""
    model = build(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ours = copy.deepcopy(model)
    report = ocs.quantize(ours, wbits=8, r=0.02)
    heads = {line.name.split(".")[0] for line in report.quantized} & set(auxiliary)
    assert heads == set(auxiliary)
    x = images(2, 299 if name == "inception_v3" else 224)
    outputs, expected = run(ours, x), run(folded_twin(model, ours), x)
    assert type(outputs).__name__ == type(expected).__name__
    assert len(outputs) == 1 + len(auxiliary)
    for a, b in zip(outputs, expected, strict=True):
        assert relative_error(a, b) < 2e-3
