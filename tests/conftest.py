"""What several test files need."""

from __future__ import annotations

import copy
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; so do the processes that tests start
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(share, 1)))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait take another's core

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ocs.formats.contents import crc32
from ocs.kernels import ops
from ocs.nn.base import QuantizedLayer


def repeats(few: int, many: int) -> int:
    """How often a test of faults tries its luck: `make faults` and `make fuzz` want many."""
    return many if os.environ.get("OCS_FAULTS") else few


def available_isas() -> list[str]:
    """List the instruction sets of this build and CPU, plain first."""
    return list(ops.isas())


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test with each instruction set."""
    before = ops.isa()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(before)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs a test with different numbers of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class SmallNet(nn.Module):
    """Every kind of layer that is quantized, with outliers to split."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(8, 16, 3, padding=1, stride=2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=4, padding_mode="reflect"),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
        )
        self.head = nn.Linear(16, 5)
        with torch.no_grad():
            for layer in (self.stem, self.body[0], self.body[3], self.body[5], self.head):
                layer.weight[:, 0] *= 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, 3, H, W] -> [N, 5]."""
        return self.head(self.body(self.stem(x).relu()).mean((2, 3)))


@pytest.fixture
def net() -> SmallNet:
    """A fresh SmallNet with the same weights each time, in eval mode."""
    torch.manual_seed(0)
    return SmallNet().eval()


class Everything(nn.Module):
    """Every kind of layer, what stays float, a tie, and buffers of several dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallNet()
        self.up = nn.ConvTranspose2d(8, 4, 3, groups=2)
        self.lstm = nn.LSTM(10, 12, 2, bidirectional=True)
        self.cell = nn.GRUCell(10, 12)
        self.attention = nn.MultiheadAttention(12, 3)
        self.embedding, self.decoder = nn.Embedding(20, 12), nn.Linear(12, 20)
        self.decoder.weight = self.embedding.weight
        self.again = self.net.head
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("phase", torch.tensor([1 + 2j]))
        self.register_buffer("table", torch.randn(3, dtype=torch.bfloat16))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_buffer("nothing", None)
        for i, p in enumerate(self.parameters()):
            if p.dim() > 1:
                p.data = torch.from_numpy(outlier_weight(tuple(p.shape), seed=i)) * 0.1

    @staticmethod
    def inputs() -> tuple[Tensor, Tensor]:
        """An image batch, and a batch of sequences."""
        return torch.randn(2, 3, 8, 8), torch.randn(5, 2, 10)

    def forward(self, image: Tensor, words: Tensor) -> list[Tensor]:
        """Some output of every layer."""
        steps, (h, _) = self.lstm(words)
        query = self.cell(words[0])[None]
        attended, _ = self.attention(query, query, query)
        return [self.net(image), self.up(self.net.stem(image)), steps, h, self.decoder(attended)]


def outlier_weight(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Heavy-tailed float32 weights, as trained layers have."""
    return np.random.default_rng(seed).standard_t(2.5, shape).astype(np.float32)


def state(model: nn.Module) -> tuple[str, dict[str, torch.Tensor], list[int]]:
    """Everything that must not change when quantize fails: the modules, their identity and every byte."""
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    return repr(model), tensors, [id(m) for m in model.modules()] + [id(p) for p in model.parameters()]


def assert_unchanged(model: nn.Module, before: tuple) -> None:
    text, tensors, identities = state(model)
    assert text == before[0]
    assert all(torch.equal(tensors[name], t) for name, t in before[1].items())
    assert identities == before[2]


def folded_twin(model: nn.Module, ours: nn.Module) -> nn.Module:
    """The float model with the weights that the integers of `ours` stand for, on which torch's own layers run."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in ours.named_modules():
            if isinstance(layer, QuantizedLayer):
                for weight in layer.channels:
                    folded = layer.in_float_layout(layer.folded(weight))
                    twin.get_submodule(name)._parameters[weight].copy_(folded)
    return twin


def header_of(path: Path) -> dict[str, Any]:
    """What ocs.save says of a model in its file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["ocs"])


def forge(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """A file with valid sums that only ocs.save's reader can refuse: change(header, tensors)."""
    from safetensors.torch import load_file, save_file

    header, tensors = header_of(path), load_file(path)
    change(header, tensors)
    if isinstance(header.get("tensors"), dict):
        header["tensors"] = {name: crc32(tensor) for name, tensor in tensors.items()}
    text = json.dumps(header)
    save_file(tensors, path, metadata={"ocs": text, "crc32": str(zlib.crc32(text.encode()))})


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For what is so small that threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
