"""Threads that quantize their own models get what they would get alone; other threads notice nothing."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch
import torch._dynamo.eval_frame as frames
from torch import Tensor, fx, nn

import ocs

pytestmark = pytest.mark.usefixtures("one_thread")
x, words = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8)


class Block(nn.Module):
    """A convolution and a norm, and a function that torch.fx keeps whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu() / math.sqrt(x.size(1))


layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
transformer = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(8, 2)).eval()
net = nn.Sequential(nn.Conv2d(3, 4, 1), *(Block() for _ in range(6))).eval()


def of_the_process() -> tuple[Any, ...]:
    functions = (nn.Module.__call__, nn.Module.__getattr__, math.sqrt)
    return *functions, fx._symbolic_trace._is_fx_tracing_flag, torch.backends.mha.get_fastpath_enabled(), frames._stance


def fold() -> dict[str, str]:
    return ocs.quantize(copy.deepcopy(net), fold_bn=True).batch_norms


def calibrated() -> Tensor:
    model = copy.deepcopy(transformer)
    ocs.quantize(model, abits=8, calibration=[words], recipe="best")
    with torch.no_grad():
        return model(words)


def test_results_are_the_serial_ones() -> None:
    before, done = of_the_process(), threading.Event()
    folded, outputs = fold(), calibrated()
    assert list(folded.values()) == [""] * 6

    @torch.no_grad()
    def run_others() -> int:
        """Run two models, one of them fused, until the others are done: the same each time."""
        models, count = (net, transformer), 0
        expected = [models[0](x), models[1](words)]
        while not done.is_set():
            assert torch.equal(models[0](x), expected[0])
            assert torch.equal(models[1](words), expected[1])
            assert (nn.Module.__call__, torch.backends.mha.get_fastpath_enabled()) == (before[0], True)
            count += 1
        return count

    with ThreadPoolExecutor(5) as pool:
        others = pool.submit(run_others)
        runs = [pool.submit(call) for _ in range(4) for call in (fold, calibrated)]
        found = [run.exception() or run.result() for run in runs]
        done.set()
    assert others.result() > 0
    assert found[::2] == [folded] * 4
    assert all(torch.equal(each, outputs) for each in found[1::2])
    assert of_the_process() == before


class Fails(nn.Module):
    """Raises while it is traced."""

    def __init__(self, raises: Callable[[], Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.raises = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), raises

    def forward(self, x: Tensor) -> Tensor:
        self.raises()
        return self.norm(self.conv(x))


def interrupt() -> None:
    assert isinstance(math.sqrt(4.0), float)
    raise KeyboardInterrupt


def test_nothing_is_left_of_a_trace_that_is_interrupted() -> None:
    before = of_the_process()
    with pytest.raises(KeyboardInterrupt):
        ocs.quantize(Fails(interrupt).eval(), fold_bn=True, skip=None)
    assert of_the_process() == before
    assert list(fold().values()) == [""] * 6


class Listed(nn.Module):
    """A class that keeps a list of its subclasses, and whose parts look at each other's class."""

    kinds: ClassVar[list[type]] = []

    def __init_subclass__(cls) -> None:
        cls.kinds.append(cls)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self, Listed)
        assert isinstance(self.norm, nn.BatchNorm2d)
        return self.norm(self.conv(x))


def test_classes_made_for_a_trace_are_not_listed() -> None:
    model = Listed().eval()
    assert ocs.quantize(model, fold_bn=True, skip=None).batch_norms == {"norm": ""}
    assert (Listed.kinds, type(model)) == ([], Listed)


class Itself(nn.Module):
    """Its copies are itself, so that it could not be traced apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def test_a_model_that_cannot_be_copied_is_left_alone() -> None:
    model = Itself().eval()
    report = ocs.quantize(model, fold_bn=True, skip=None)
    assert "it cannot be copied" in report.batch_norms["norm"]
    assert type(model) is Itself
    assert model(x).shape == x.shape
