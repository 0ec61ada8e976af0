"""Subclasses of torch's layers: what their code proves to be harmless is quantized, and keeps what it could do."""

from __future__ import annotations

import pickle
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ocs
from ocs.nn import QuantConv3d, QuantLinear


class HandsOn(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        """Do what the base does."""
        return super().forward(x)


class HandsAnyOn(nn.Linear):
    def forward(self, *args: object, **kwargs: object) -> Tensor:
        return super().forward(*args, **kwargs)


class Copied(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class CanDoMore(nn.Linear):
    """Static and class methods, a property, a constant, and methods that call the layer."""

    factor = 2

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.note = "mine"

    @staticmethod
    def stride(x: int) -> int:
        return 2 * x

    @classmethod
    def name(cls) -> str:
        return cls.__name__

    @property
    def area(self) -> int:
        return self.in_features * self.out_features

    def scaled(self, x: Tensor) -> Tensor:
        return self.factor * self(x)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return "more"


class Conv3DSimple(nn.Conv3d):
    """As torchvision's r3d_18 has it."""

    @staticmethod
    def get_downsample_stride(stride: int) -> tuple[int, int, int]:
        return stride, stride, stride


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OtherF:
    """Not torch.nn.functional."""

    @staticmethod
    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return 3 * nn.functional.linear(x, weight, bias)


class CopiedInWords(nn.Linear):
    """The words of torch's forward, where F is something else."""

    words: ClassVar[dict[str, object]] = {}
    exec("from torch.nn import functional as F\ndef forward(self, input):\n"
         "    return F.linear(input, self.weight, self.bias)", words)  # fmt: skip
    words["F"] = OtherF
    forward = words["forward"]


class PadsInside(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(F.pad(x, (1, 1)), weight, bias)


class ChecksLess(nn.LSTM):
    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None: ...


HARMLESS = {
    "hands on": lambda: HandsOn(4, 4),
    "hands any on": lambda: HandsAnyOn(4, 4),
    "copied": lambda: Copied(4, 4),
    "can do more": CanDoMore,
}
CHANGED = {
    "forward": (lambda: Doubled(4, 4), "forward"),
    "other names": (lambda: CopiedInWords(4, 4), "forward"),
    "inner method": (lambda: PadsInside(4, 4, 1), "_conv_forward"),
    "recurrent": (lambda: ChecksLess(4, 4), "check_input"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_ones_are_quantized(name: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(HARMLESS[name]()), torch.randn(3, 4)
    plain = nn.Sequential(nn.Linear(4, 4))
    plain.load_state_dict(model.state_dict())
    options = {"wbits": 4, "r": 0.5, "abits": 8, "rounding": "gptq", "calibration": [x]}
    ocs.quantize(model, **options)
    ocs.quantize(plain, **options)
    assert type(model[0]) is QuantLinear
    assert torch.equal(model(x), plain(x))


def test_what_they_could_do_they_can_do() -> None:
    model, x = nn.Sequential(CanDoMore(), Conv3DSimple(2, 4, 3)), torch.randn(3, 4)
    ocs.quantize(model, skip=None)
    layer, conv = pickle.loads(pickle.dumps(model))
    assert (layer.stride(3), layer.name(), layer.area, layer.factor, layer.note) == (6, "CanDoMore", 16, 2, "mine")
    assert torch.equal(layer.scaled(x), 2 * layer(x))
    assert type(conv) is QuantConv3d
    assert conv.get_downsample_stride(2) == (2, 2, 2)
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing


def test_they_compile() -> None:
    model, x = nn.Sequential(CanDoMore(), HandsOn(4, 4)), torch.randn(3, 4)
    ocs.quantize(model, r=0.5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("name", CHANGED)
def test_what_changes_a_call_stays_float(name: str) -> None:
    build, method = CHANGED[name]
    model = nn.Sequential(build(), nn.Linear(40, 40))
    line = ocs.quantize(model, skip=None).layers[0]
    assert f"has a {method} of its own" in line.reason
