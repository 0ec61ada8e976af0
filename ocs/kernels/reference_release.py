"""The plain numpy twin of csrc/clip_release.c: clip thresholds as the paper's published release finds them."""

import math

import numpy as np
from numpy.typing import NDArray

from ocs.kernels.constants import CLIP_METHODS

Floats, Int64s = NDArray[np.float32], NDArray[np.int64]

# In standard deviations, as the release estimates them, and mean absolute deviations, for k = 2 .. 8.
GAUSS_RELEASE = (1.47818312, 1.80489289, 2.19227856, 2.57733584, 2.94451183, 3.29076248, 3.61691335)
LAPLACE_RELEASE = (2.33152939, 3.04528770, 4.00378631, 5.08252088, 6.23211675, 7.42700429, 8.65265030)


def release_threshold(x: Floats, counts: Int64s, bits: int, signed: bool, method: int) -> Floats:
    """Find the threshold of each row x [R, ...] as the paper's release does, float32 [R]; see csrc/ocs.h.

    counts: how often each value is there, or empty: once.
    """
    find = {"mse-release": _release_mse, "aciq-release": _release_aciq, "kl-release": _release_kl}[CLIP_METHODS[method]]
    weights = counts if counts.size else np.ones(x.size, np.int64)
    found = []
    for row, of_row in zip(x.reshape(x.shape[0], -1), weights.reshape(x.shape[0], -1), strict=True):
        values, often = row[of_row > 0].astype(np.float64), of_row[of_row > 0]
        largest = np.abs(values).max(initial=0)
        t = find(values, often, largest, bits if signed else bits + 1) if largest else 0
        found.append(t if t > 0 else largest)
    return np.array(found, np.float32)


def _bins(values: NDArray, often: Int64s, bins: int, begin: float, end: float) -> tuple[Int64s, NDArray, NDArray]:
    """Count values: the counts [bins], the bins' centers, and their edges [bins + 1]."""
    counts, edges = np.histogram(values, bins, (begin, end), weights=often)
    return counts, (edges[:-1] + edges[1:]) / 2, edges


def release_error(counts: Int64s, centers: NDArray, t: float, k: int) -> float:
    """Sum the squared error of the release's quantizer, where it clips at t."""
    clipped, scale = np.abs(centers) > t, (2 ** (k - 1) - 1) / t
    rounded = np.clip(np.rint(centers * scale), -(2 ** (k - 1)), 2 ** (k - 1) - 1) / scale
    return float(np.sum(np.where(clipped, np.abs(centers) - t, centers - rounded) ** 2 * counts))


def _release_mse(values: NDArray, often: Int64s, largest: float, k: int) -> float:
    counts, centers, _ = _bins(values, often, 201, values.min(), values.max())
    return min((i / 100 * largest for i in range(1, 100)), key=lambda t: release_error(counts, centers, t, k))


def _release_aciq(values: NDArray, often: Int64s, largest: float, k: int) -> float:
    if values.min() == values.max():
        return 0.0
    share = 0.175 * (1 + math.sqrt(math.pi * math.log(4))) / math.sqrt(2 * math.log(often.sum()))
    deviation = np.average(np.abs(values - np.average(values, weights=often)), weights=often)
    gauss = GAUSS_RELEASE[min(k, 8) - 2] * (values.max() - values.min()) * share
    laplace = LAPLACE_RELEASE[min(k, 8) - 2] * deviation
    counts, centers, _ = _bins(values, often, 101, -largest, largest)
    errors = [release_error(counts, centers, t, k) for t in (gauss, laplace)]
    return gauss if errors[0] < errors[1] else laplace


def _release_kl(values: NDArray, often: Int64s, largest: float, k: int) -> float:
    counts, _, edges = _bins(values, often, 1001, -largest, largest)
    reaches = range((2**k - 1) // 2, 501)
    best = min(reaches, key=lambda reach: release_divergence(counts, reach, 2**k - 1))
    return float(edges[501 + best])


def release_divergence(counts: Int64s, reach: int, levels: int) -> float:
    """Compute the divergence of the middle 2 reach + 1 bins, merged into so many levels, from the clipped histogram."""
    begin, end = 500 - reach, 501 + reach
    h = counts[begin:end].astype(np.float64)
    p, q, last = h.copy(), np.zeros_like(h), h.size - 1
    p[0] += counts[:begin].sum()
    p[-1] += counts[end:].sum()
    merged = h.size // levels
    for level in range(levels):
        part = slice(level * merged, (level + 1) * merged if level < levels - 1 else h.size)
        filled = np.flatnonzero(h[part]) + part.start
        filled = filled[filled < last]
        q[filled] = h[part].sum() / max(filled.size, 1)
    if not q.any():
        return math.inf
    p, q = _smoothed(p) / p.sum(), _smoothed(q) / q.sum()
    return float(np.sum(p * np.log(p / q)))


def _smoothed(p: NDArray) -> NDArray:
    """Make each zero 1e-4, taken evenly from the others."""
    zeros = int((p == 0).sum())
    return np.where(p == 0, 1e-4, p - 1e-4 * zeros / (p.size - zeros))
