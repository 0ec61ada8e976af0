"""Weights as large and as small as a dtype holds: quantized, or one error that names layer and weight."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import assert_unchanged, state
from torch import nn

import ocs
from ocs import functional
from ocs.kernels.constants import CLIP_METHODS

LARGEST = float(np.finfo(np.float32).max)
CLIPS = ("none", "auto", 0.5, *CLIP_METHODS)
w = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))


def scaled(largest: float) -> torch.Tensor:
    """Weights of which the largest is just this, as float32."""
    return (w.double() / w.abs().max() * largest).float()


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("largest", [LARGEST, 1e38, 1e-38, 1e-44])
def test_every_clip_method(largest: float, clip: str | float) -> None:
    """Without splits nothing is rounded up beyond the largest: all works, as for weights of one."""
    for granularity, kind in itertools.product(("tensor", "channel"), (torch.Tensor, np.ndarray)):
        x = scaled(largest) if kind is torch.Tensor else scaled(largest).numpy()
        quantized = functional.quantize_weight(x, 4, clip=clip, granularity=granularity)
        expected = functional.quantize_weight(w, 4, clip=clip, granularity=granularity)
        assert math.isfinite(float(abs(quantized.scale).max()))
        beyond = clip == "aciq-release" and largest == LARGEST  # its threshold may be above the largest value
        if largest > 1 and clip != "auto" and not beyond:
            assert np.abs(np.asarray(quantized.ints, int) - np.asarray(expected.ints, int)).max() <= 1


@pytest.mark.parametrize("rounding", ["nearest", "squant", "gptq"])
@pytest.mark.parametrize("clip", CLIPS)
def test_split_weights_are_finite_or_an_error(rounding: str, clip: str | float) -> None:
    """Halves are rounded up, and add up to more than float32 holds, where these are large: never a domain error."""
    more = {"calibration": [torch.randn(9, 16)]} if rounding == "gptq" else {}
    for granularity, select in itertools.product(("tensor", "channel"), ("max", "error")):
        model = nn.Sequential(nn.Linear(16, 8))
        model[0].weight.data = scaled(LARGEST)
        before = state(model)
        options = {"clip": clip, "granularity": granularity, "select": select, "rounding": rounding, **more}
        try:
            report = ocs.quantize(model, wbits=4, r=0.2, **options)
        except ValueError as error:
            assert str(error).startswith("0: w reaches 3.4e+38, and rounded to 4 bits it leaves what float32 holds")  # noqa: PT017
            assert_unchanged(model, before)
        else:
            assert bool(model[0].weight.isfinite().all())
            assert math.isfinite(report.quantized[0].sqnr_db)


def test_what_leaves_the_range() -> None:
    """The second largest gives the grid, on which the largest is at 10.6 and becomes 11."""
    model = nn.Sequential(nn.Linear(2, 1))
    model[0].weight.data = torch.from_numpy(np.float32([[LARGEST, LARGEST * 7 / 10.6]]))
    with pytest.raises(ValueError, match=r"^0: w reaches 3\.4e\+38, and rounded to 4 bits"):
        ocs.quantize(model, wbits=4, r=0.5)
    assert isinstance(model[0], nn.Linear)


def test_half_precision_that_leaves_the_range() -> None:
    half = nn.Sequential(nn.Linear(2, 1)).half()
    half[0].weight.data = torch.tensor([[65504.0, 65504.0 * 7 / 10.6]], dtype=torch.float16)
    with pytest.raises(ValueError, match=r"^0: weight rounded to 4 bits leaves what torch\.float16 holds: scale the"):
        ocs.quantize(half, wbits=4, r=0.5, expand=False)
    assert half[0].weight.dtype == torch.float16
