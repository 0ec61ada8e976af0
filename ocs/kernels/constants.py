"""Facts that the kernels and all that is built on them share."""

from __future__ import annotations

CLIP_METHODS = ("mse", "aciq", "aciq-release", "kl", "percentile", "std", "sawb")  # numbered as in csrc/ocs.h
MAX_BINS = 2**24  # of a histogram
OCTAVES, OCTAVE_BINS = 16, 128  # of a logarithmic histogram: eight bins to the octave
MAX_DEPTH = 22  # how often one channel may be halved
SMALLEST = 2.0**-149  # the smallest positive float32: a positive threshold never gives a scale of zero
TINY = 2.0**-100  # largest magnitudes below are not clipped: float32 hardly tells such values apart


def qmax(bits: int) -> int:
    """Compute the largest integer of k signed bits, 2^(k - 1) - 1."""
    return 2 ** (bits - 1) - 1


def grid(bits: int, signed: bool) -> tuple[int, int]:
    """Compute the smallest and largest integer of k bits: -qmax .. qmax, or 0 .. 2^k - 1 where not signed."""
    return (-qmax(bits), qmax(bits)) if signed else (0, 2**bits - 1)
