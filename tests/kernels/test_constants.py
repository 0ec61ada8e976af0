"""Facts that Python has from C, and that the kernels keep to them."""

from __future__ import annotations

import numpy as np
import pytest

from ocs import _C
from ocs.kernels import constants


def test_values() -> None:
    """What files, histograms and the paper's grid rest on."""
    names = ("mse", "aciq", "aciq-release", "kl", "percentile", "std", "sawb", "mse-release", "kl-release")
    assert names == constants.CLIP_METHODS
    assert constants.RELEASE_METHODS == ("aciq-release", "mse-release", "kl-release")
    assert (constants.MIN_BITS, constants.MAX_BITS, constants.MAX_BINS, constants.MAX_DEPTH) == (2, 8, 2**24, 22)
    assert constants.MAX_PARTS == 2**constants.MAX_DEPTH
    assert (constants.OCTAVES, constants.BINS_PER_OCTAVE, constants.OCTAVE_BINS) == (16, 8, 128)


def test_limits_are_those_of_the_kernels() -> None:
    """Whatever the extension tells: it takes the largest number, and refuses the next one."""
    x = np.zeros((2, 3), np.float32)
    assert _C.octave_histogram(x, 1.0).shape == (3, constants.OCTAVE_BINS)
    assert _C.histogram(x, constants.MAX_BINS, 1.0).shape == (constants.MAX_BINS,)
    with pytest.raises(ValueError, match="bins"):
        _C.histogram(x, constants.MAX_BINS + 1, 1.0)
    plan = _C.split_plan(np.ones(1, np.float32), 1, 0, False)
    for bits in range(constants.MIN_BITS - 1, constants.MAX_BITS + 2):
        args = (x[:, :1], np.ones((), np.float32), *plan[:3], 1, bits, True)
        if constants.MIN_BITS <= bits <= constants.MAX_BITS:
            assert _C.quantize_weight(*args).shape == (2, 1)
        else:
            with pytest.raises(ValueError, match="bits"):
                _C.quantize_weight(*args)
    x = np.float32([[0, 1]])
    for number, method in enumerate(constants.CLIP_METHODS):
        if method in constants.RELEASE_METHODS:
            assert _C.release_threshold(x, np.array([], np.int64), 4, True, number) > 0
        else:
            assert _C.clip_threshold(np.array([0, 1]), np.ones((), np.float32), 4, True, number) > 0
    with pytest.raises(ValueError, match="method"):
        _C.clip_threshold(np.array([0, 1]), np.ones((), np.float32), 4, True, len(constants.CLIP_METHODS))
