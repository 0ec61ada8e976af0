"""What models on a device give: what the same gives on the CPU. Without a CUDA device the CPU stands in for one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Everything
from torch import Tensor, nn

import ocs
from ocs import training
from ocs.nn.base import QuantizedLayer

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_cuda])])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """TensorFloat-32 off: convolutions in float32, as on the CPU."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield torch.device(request.param)


@pytest.fixture
def model() -> Everything:
    torch.manual_seed(0)
    return Everything().eval()


def batches() -> list[tuple[Tensor, Tensor]]:
    """Three inputs of Everything."""
    torch.manual_seed(1)
    return [Everything.inputs() for _ in range(3)]


def outputs(model: nn.Module, device: torch.device) -> list[Tensor]:
    """Those of the first batch, on the CPU."""
    with torch.no_grad():
        return [y.cpu() for y in model(*(x.to(device) for x in batches()[0]))]


def seen(device: torch.device) -> Callable[[nn.Module], object]:
    """Calibration that runs all batches where the model is."""
    return lambda net: [net(*(x.to(device) for x in batch)) for batch in batches()]


def states(model: nn.Module) -> dict[str, Tensor]:
    """Integers, scales and sources of every weight."""
    return {
        f"{name}.{weight}.{i}": tensor
        for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)
        for weight in layer.channels for i, tensor in enumerate(layer.weight_state(weight))
    }  # fmt: skip


def assert_on(tensors: list[Tensor], device: torch.device) -> None:
    """Fail where one has moved."""
    assert {x.device.type for x in tensors} == {device.type}


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Sums run in another order on a device."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


WITHOUT_DATA: dict[str, dict[str, Any]] = {
    "tensor": {},
    "channel": {"granularity": "channel", "clip": "mse"},
    "group": {"granularity": "group", "group": 32},
    "even, KL": {"split": "even", "clip": "kl"},
    "squant": {"rounding": "squant", "clip": "auto"},
    "errors": {"select": "error", "allocate": "error"},
    "best": {"recipe": "best", "correct_bias": True},
    "equalized": {"equalize": True, "fold_bn": True},
    "auto": {"wbits": "auto", "budget": 4000},
    "rows": {"overrides": {"lstm": {"abits": 8, "act_scale": "dynamic"}}},
    "embeddings": {"embeddings": True},
}


@pytest.mark.parametrize("how", WITHOUT_DATA)
def test_the_same_integers_without_data(model: Everything, device: torch.device, how: str) -> None:
    moved = copy.deepcopy(model).to(device)
    options = {"wbits": 5, "r": 0.2, "skip": None, "progress": False} | WITHOUT_DATA[how]
    ours, theirs = ocs.quantize(moved, **options), ocs.quantize(model, **options)
    assert [line.name for line in ours.quantized] == [line.name for line in theirs.quantized]
    here, there = states(moved), states(model)
    assert_on([*here.values(), *moved.parameters()], device)
    for name, expected in there.items():
        assert torch.equal(here[name].cpu(), expected), name
    assert_close(outputs(moved, device), outputs(model, torch.device("cpu")))


WITH_DATA: dict[str, dict[str, Any]] = {
    "inputs": {"abits": 8},
    "split inputs": {"abits": 8, "act_r": 0.2, "act_select": "max", "act_clip": "mse"},
    "oracle": {"abits": 8, "act_r": 0.2, "act_split": "oracle"},
    "best": {"recipe": "best", "abits": 8},
    "gptq": {"rounding": "gptq", "clip": "auto"},
    "learned": {"overrides": {"decoder": {"rounding": "learned"}}},
    "equalized": {"equalize": True, "abits": 8},
}


@pytest.mark.parametrize("how", WITH_DATA)
def test_close_outputs_with_data(model: Everything, device: torch.device, how: str) -> None:
    """Statistics round otherwise on a device, which may turn an integer here and there."""
    expected = outputs(model, torch.device("cpu"))
    found = []
    for where in (device, torch.device("cpu")):
        ours = copy.deepcopy(model).to(where)
        ocs.quantize(ours, wbits=8, r=0.1, calibration=seen(where), progress=False, **WITH_DATA[how])
        assert_on([*states(ours).values(), *ours.parameters(), *ours.buffers()], where)
        found.append(sum((a - b).square().mean().item() for a, b in zip(outputs(ours, where), expected, strict=True)))
    assert found[0] == pytest.approx(found[1], rel=0.25)


def test_files_go_from_device_to_device(model: Everything, device: torch.device, tmp_path: Path) -> None:
    other, moved = Everything().eval(), copy.deepcopy(model).to(device)
    for each in (moved, model):
        ocs.quantize(each, wbits=4, r=0.2, progress=False)
    ocs.save(moved, tmp_path / "there.safetensors")
    ocs.save(model, tmp_path / "here.safetensors")
    assert (tmp_path / "there.safetensors").read_bytes() == (tmp_path / "here.safetensors").read_bytes()
    for packed in (False, True):
        here, there = copy.deepcopy(other), copy.deepcopy(other).to(device)
        ocs.load(tmp_path / "there.safetensors", here, packed=packed)
        ocs.load(tmp_path / "here.safetensors", there, packed=packed)
        assert_on([*there.parameters(), *there.buffers()], device)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(states(here).values(), states(there).values(), strict=True))
        assert_close(outputs(there, device), outputs(here, torch.device("cpu")))


def test_models_move(model: Everything, device: torch.device) -> None:
    """Quantized, or packed, before they are moved."""
    for finish in (lambda each: each, ocs.pack):
        quantized = copy.deepcopy(model)
        ocs.quantize(quantized, wbits=5, r=0.2, progress=False)
        finish(quantized)
        expected = outputs(quantized, torch.device("cpu"))
        assert_close(outputs(quantized.to(device), device), expected)
        assert_close(outputs(quantized.cpu(), torch.device("cpu")), expected)


def test_packing_on_a_device(model: Everything, device: torch.device) -> None:
    model.to(device)
    ocs.quantize(model, wbits=4, r=0.2, progress=False, overrides={"lstm": {"abits": 8, "act_scale": "dynamic"}})
    expected, before = outputs(model, device), states(model)
    ocs.pack(model)
    assert_close(outputs(model, device), expected)
    ocs.unpack(model)
    assert all(torch.equal(a, b) for a, b in zip(states(model).values(), before.values(), strict=True))


def test_a_default_device_changes_nothing(model: Everything, device: torch.device, tmp_path: Path) -> None:
    quantized = copy.deepcopy(model)
    ocs.quantize(quantized, wbits=4, r=0.1, recipe="best", progress=False)
    with device:
        ocs.quantize(model, wbits=4, r=0.1, recipe="best", progress=False)
        ocs.save(model, tmp_path / "model.safetensors")
        ocs.load(tmp_path / "model.safetensors", loaded := Everything().eval())
        assert_on([*loaded.parameters()], device)
    for mine in (states(model), {name: x.cpu() for name, x in states(loaded).items()}):
        assert all(torch.equal(a, b) for a, b in zip(mine.values(), states(quantized).values(), strict=True))


def test_training_on_a_device(device: torch.device) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).to(device)
    x = torch.randn(8, 12).to(device)
    training.prepare(net, wbits=3, r=0.1, skip=None)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        expected = net.eval()(x)
        training.convert(net)
        assert torch.equal(net(x), expected)


def test_comparing_and_synthesizing_on_a_device(device: torch.device) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval().to(device)
    images = ocs.synthesize(net, (3, 8, 8), images=4, steps=2)
    assert_on(list(images), device)
    quantized = copy.deepcopy(net)
    ocs.quantize(quantized, wbits=8, skip=None, progress=False)
    ocs.reestimate_batchnorm(quantized, images, reference=net)
    assert "dB" in str(ocs.compare(net, quantized, images))
