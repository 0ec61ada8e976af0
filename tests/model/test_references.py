"""Layers that a model holds outside of its children are exchanged with them, or left float with the reason."""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ocs
from ocs.nn.base import QuantizedLayer

Pair = namedtuple("Pair", "first second")


@dataclass(frozen=True)
class Frozen:
    """A record that cannot be changed in the ordinary way."""

    first: nn.Module
    second: nn.Module


class Slotted:
    """An object without a table of attributes."""

    __slots__ = ("first", "second")

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        self.first, self.second = first, second

    def run(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Own(tuple):
    """A tuple of a kind that nobody knows how to make again."""


def closure(first: nn.Module, second: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: second(first(x))


def default(first: nn.Module, second: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x, first=first, *, second=second: second(first(x))


def called_with(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    return second(first(x))


def suspended(first: nn.Module, second: nn.Module) -> Iterator[nn.Module]:
    """Be a generator, whose variables nobody can set."""

    def layers(first: nn.Module, second: nn.Module) -> Iterator[nn.Module]:
        while True:
            yield first
            yield second

    held = layers(first, second)
    assert (next(held), next(held)) == (first, second)
    return held


def one_by_one(layers: Any) -> Callable[[Any, Tensor], Tensor]:
    def run(held: Any, x: Tensor) -> Tensor:
        for layer in layers(held):
            x = layer(x)
        return x

    return run


each = one_by_one(lambda held: held)
HOLDERS = {  # what is made of the layers, and how the model runs it
    "list": (lambda a, b: [a, b], each),
    "tuple": (lambda a, b: (a, b), each),
    "nested": (lambda a, b: {"x": [1, ({"y": a}, (b,))]}, one_by_one(lambda h: (h["x"][1][0]["y"], h["x"][1][1][0]))),
    "OrderedDict": (lambda a, b: OrderedDict(a=a, b=b), one_by_one(lambda h: h.values())),
    "deque": (lambda a, b: deque([a, b]), each),
    "named tuple": (Pair, each),
    "set": (lambda a, b: [{a}, frozenset([b])], one_by_one(lambda h: [*h[0], *h[1]])),
    "array": (lambda a, b: np.array([a, b], dtype=object), each),
    "forward": (lambda a, b: [a.forward, b.__call__], each),
    "method of another": (lambda a, b: Slotted(a, b).run, lambda held, x: held(x)),
    "partial": (lambda a, b: partial(called_with, first=a, second=b), lambda held, x: held(x)),
    "closure": (closure, lambda held, x: held(x)),
    "defaults": (default, lambda held, x: held(x)),
    "slots": (Slotted, lambda held, x: held.run(x)),
    "frozen": (Frozen, one_by_one(lambda h: (h.first, h.second))),
    "namespace": (lambda a, b: SimpleNamespace(a=a, b=b), one_by_one(lambda h: (h.a, h.b))),
    "hidden module": (lambda a, b: [nn.Sequential(a, b)], lambda held, x: held[0](x)),
    "weak": (lambda a, b: [weakref.ref(a), weakref.ref(b)], one_by_one(lambda h: (h[0](), h[1]()))),
}
FIXED = {  # no other layer can be put there
    "keys": (lambda a, b: {a: 1, b: 2}, each),
    "own tuple": (lambda a, b: Own((a, b)), each),
    "generator": (suspended, one_by_one(lambda h: (next(h), next(h)))),
    "own method": (lambda a, b: [a._conv_forward, b.extra_repr, a, b], one_by_one(lambda h: h[2:])),
}


class Holds(nn.Module):
    """Two layers that it calls through something else."""

    def __init__(self, case: str) -> None:
        super().__init__()
        make, self.run = {**HOLDERS, **FIXED}[case]
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.held = make(self.first, self.second)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.held, x)


@pytest.mark.parametrize("case", HOLDERS)
def test_they_are_exchanged(case: str, tmp_path: Path) -> None:
    model, x = Holds(case), torch.randn(2, 4, 3, 3)
    expected = model(x)
    report = ocs.quantize(model, wbits=2, skip=None)
    assert len(report.quantized) == 2
    assert not torch.equal(model(x), expected)
    assert torch.equal(model(x), model.second(model.first(x)))
    ocs.save(model, tmp_path / "file")
    other = ocs.load(tmp_path / "file", Holds(case))
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("case", FIXED)
def test_they_stay_float_with_the_reason(case: str) -> None:
    model, x = Holds(case), torch.randn(2, 4, 3, 3)
    expected = model(x)
    report = ocs.quantize(nn.Sequential(model, nn.Linear(3, 64)), wbits=2, skip=None)
    reasons = {line.name: line.reason for line in report.layers if line.status == "float"}
    names = ["0.first"] if case == "own method" else ["0.first", "0.second"]
    assert reasons == dict.fromkeys(names, "it is also held by 'held' of Holds, which cannot be given another layer")
    assert torch.equal(model(x), expected) == (case != "own method")


def test_the_float_layers_go_on_elsewhere() -> None:
    """Another model may share them."""
    shared, x = nn.Linear(4, 4), torch.randn(2, 4)
    model, other = nn.Sequential(shared, nn.Linear(4, 4)), nn.Sequential(shared)
    expected = other(x)
    ocs.quantize(model, wbits=2)
    assert other[0] is shared
    assert torch.equal(other(x), expected)


class FoldsInto(nn.Module):
    """A convolution and a norm that are called through a list, or held by keys."""

    def __init__(self, holder: type) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)
        self.held = holder((layer, layer) for layer in (self.conv, self.norm))

    def forward(self, x: Tensor) -> Tensor:
        (_, conv), (_, norm) = self.held.items() if isinstance(self.held, dict) else self.held
        return norm(conv(x))


def test_batch_norms_fold_there_or_stay_with_the_reason() -> None:
    model, fixed, x = FoldsInto(list).eval(), FoldsInto(dict).eval(), torch.randn(1, 2, 4, 4)
    for net in (model, fixed):
        net.norm.running_mean.uniform_(1, 2)
    expected = model(x)
    report = ocs.quantize(model, wbits=8, skip=None, fold_bn=True)
    assert report.batch_norms == {"norm": ""}
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)
    with_linear = nn.Sequential(fixed, nn.Linear(4, 64))
    report = ocs.quantize(with_linear, skip=None, fold_bn=True)
    assert "is also held by 'held' of FoldsInto" in report.batch_norms["0.norm"]
    assert "1 batch norm not folded, 0.norm: " in " ".join(str(report).split())


class OfTheClass(nn.Module):
    """It fills a list that belongs to its class."""

    layers: ClassVar[list[nn.Module]] = []
    last: tuple[nn.Module]

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layers.append(self.first)
        type(self).last = (self.second,)

    def forward(self, x: Tensor) -> Tensor:
        return self.last[0](self.layers[0](x))


def test_what_a_class_holds_is_exchanged() -> None:
    model, x = OfTheClass(), torch.randn(2, 4)
    expected = model(x)
    ocs.quantize(model, wbits=2)
    assert torch.equal(model(x), model.second(model.first(x)))
    assert not torch.equal(model(x), expected)


def test_sensitivity_runs_what_is_quantized() -> None:
    """One layer at a time is exchanged wherever it stands, and put back."""
    model, x = Holds("tuple"), torch.randn(2, 4, 3, 3)
    ocs.quantize(model, wbits=3, r=0.5, allocate="error", calibration=[x], skip=None)
    assert all(isinstance(layer, QuantizedLayer) for layer in model.held)
