"""The ranges of what residual additions add."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ocs
from ocs.calibration.additions import Additions, Term


class Block(nn.Module):
    """A normed convolution and a plain one, added to its input in each of the ways that Python has."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv, self.norm, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.apart = nn.Conv2d(4, 4, 1)  # its output goes into no addition of two tensors

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 4, H, W] -> the same."""
        y, z = self.norm(self.conv(x)), self.other(x)
        if self.way == "+":
            y = y + z
        elif self.way == "+=":
            y += z
        elif self.way == "torch.add":
            y = torch.add(y, z)
        else:
            y = y.add_(z)
        return y + 1 + self.apart(x).mean()


@pytest.mark.parametrize("way", ["+", "+=", "torch.add", "add_"])
def test_ranges(way: str) -> None:
    torch.manual_seed(0)
    model, data = Block(way).eval(), [torch.randn(2, 4, 3, 3) for _ in range(3)]
    found = ocs.calibrate(model, data).terms
    with torch.no_grad():
        normed = torch.cat([model.norm(model.conv(x)) for x in data])
        other = torch.cat([model.other(x) for x in data])
    assert found == {
        Term("conv", True): (float(normed.min()), float(normed.max())),
        Term("other", False): (float(other.min()), float(other.max())),
    }


@pytest.mark.parametrize("fold_bn", [False, True])
def test_layers_keep_the_range_of_their_own_output(fold_bn: bool) -> None:
    """Of a convolution whose BatchNorm is folded, that of the BatchNorm; of one with a norm of its own none."""
    torch.manual_seed(0)
    model, x = Block("+").eval(), torch.randn(2, 4, 3, 3)
    calibration = ocs.calibrate(model, [x])
    ocs.quantize(model, wbits=8, abits=8, calibration=calibration, fold_bn=fold_bn, skip=None)
    assert model.other.output_range == calibration.terms[Term("other", False)]
    assert model.conv.output_range == (calibration.terms[Term("conv", True)] if fold_bn else None)
    assert model.apart.output_range is None


def test_nothing_is_left_behind() -> None:
    model = Block("+").eval()
    ocs.calibrate(model, [torch.randn(2, 4, 3, 3)])
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.overrides._get_current_function_mode() is None
    with pytest.raises(ValueError, match="batch 1"):
        ocs.calibrate(model, [torch.randn(2, 4, 3, 3), torch.randn(2, 5, 3, 3)])
    assert torch.overrides._get_current_function_mode() is None


def test_ranks_merge_to_the_range_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this rank never saw comes from the other one; what none saw stays unknown."""
    model = Block("+")
    here, there = (Additions(dict(model.named_modules())) for _ in range(2))
    here.ranges = {Term("conv", True): (-1.0, 2.0)}
    there.ranges = {Term("conv", True): (-3.0, 1.0), Term("other", False): (4.0, 5.0)}
    sent = []
    monkeypatch.setattr("ocs.calibration.additions.rank_count", lambda: 2)
    monkeypatch.setattr("ocs.calibration.additions.reduced", lambda x, op: sent.append(x) or x)
    there.reduce()
    monkeypatch.setattr("ocs.calibration.additions.reduced", lambda x, op: torch.maximum(x, sent[0]))
    here.reduce()
    assert here.ranges == {Term("conv", True): (-3.0, 2.0), Term("other", False): (4.0, 5.0)}
