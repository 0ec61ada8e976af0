"""The definition of recurrent layers with k-bit weights, in numpy: csrc/recurrent.c computes the same.

A packed weight is six values: packed bytes, scale, copies, outputs O, group, bits.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ocs.kernels.reference_product import product

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
GATES = (4, 3, 1, 1)
NONE = np.zeros(0, np.float32)
Packed = tuple[np.ndarray, np.ndarray, np.ndarray, int, int, int]


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Compute a b + c of float32, rounded once: the product is exact in double, and the sum too but for ties.

    Rounding twice matters where the double sum lies halfway between two floats; that is decided by what was lost.
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    total = product + c
    lost = (product - (total - (total - product))) + (c - (total - product))
    odd = np.where(lost != 0, np.nextafter(total, np.where(lost > 0, np.inf, -np.inf)), total)
    even = (total.view(np.int64) & 1) == 0
    return np.where(even & (lost != 0), odd, total).astype(np.float32)  # rounded to odd, then to float


def exponential(x: np.ndarray) -> np.ndarray:
    """Compute e^x = 2^n e^r, n the integer nearest to x / ln 2, e^r by Taylor's polynomial of degree 7."""
    single = np.float32
    x = np.where(x > single(88), single(88), x)
    x = np.where(x < single(-87), single(-87), x)
    shifted = _fma(x, single(1.44269504), single(12582912))
    n = shifted - single(12582912)
    r = _fma(n, single(2.12194440e-4), _fma(n, single(-0.693359375), x))
    total = np.broadcast_to(single(1) / single(5040), x.shape)
    for term in (single(1) / single(720), single(1) / single(120), single(1) / single(24), single(1) / single(6)):
        total = _fma(total, r, term)
    for term in (single(0.5), single(1), single(1)):
        total = _fma(total, r, term)
    return total * np.ldexp(single(1), np.nan_to_num(n).astype(np.int32))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Compute 1 / (1 + e^-x)."""
    return np.float32(1) / (np.float32(1) + exponential(-x))


def tanh(x: np.ndarray) -> np.ndarray:
    """Compute 1 - 2 / (1 + e^2x)."""
    return np.float32(1) - np.float32(2) / (np.float32(1) + exponential(np.float32(2) * x))


def lstm_cell(x: np.ndarray, of_h: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give the next h and c, [N, H]; x and of_h [N, 4 H] are what input and state give to the gates."""
    i, f, g, o = np.split(x + of_h, 4, axis=1)
    c = _fma(sigmoid(f), c, sigmoid(i) * tanh(g))
    return sigmoid(o) * tanh(c), c


def gru_cell(x: np.ndarray, of_h: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give the next h [N, H], and c as it is; x and of_h [N, 3 H]."""
    x_r, x_z, x_n = np.split(x, 3, axis=1)
    h_r, h_z, h_n = np.split(of_h, 3, axis=1)
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
    n = tanh(_fma(r, h_n, x_n))
    return _fma(z, h - n, n), c


def tanh_cell(x: np.ndarray, of_h: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give the next h [N, H], and c as it is."""
    return tanh(x + of_h), c


def relu_cell(x: np.ndarray, of_h: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give the next h [N, H], and c as it is."""
    return np.where(x + of_h < 0, np.float32(0), x + of_h), c


STEPS: tuple[Callable[..., Any], ...] = (lstm_cell, gru_cell, tanh_cell, relu_cell)


def recurrent(from_x: np.ndarray, *arguments: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run all steps: (y [steps, P], h [N, P], c [N, H]).

    arguments: a packed hidden weight (6), bias, a packed projection (6, outputs 0 without), h, c, batch_sizes,
    row_bits (0: states stay floats), cell (of CELLS), reverse.
    """
    hidden, bias, projection = arguments[:6], arguments[6], arguments[7:13]
    h, c, batch_sizes, row_bits, cell, reverse = arguments[13:]
    h, c, y = h.copy(), c.copy(), np.zeros((len(from_x), h.shape[1]), np.float32)
    starts = np.cumsum(batch_sizes) - batch_sizes
    for t in range(len(batch_sizes))[:: -1 if reverse else 1]:
        batch, rows = batch_sizes[t], slice(starts[t], starts[t] + batch_sizes[t])
        of_h = product(h[:batch], *hidden, bias, row_bits, NONE, True)
        step = STEPS[cell](from_x[rows], of_h, h[:batch], c[:batch])
        unit, c[:batch] = step if cell == 0 else (step[0], c[:batch])
        h[:batch] = product(unit, *projection, NONE, row_bits, NONE, True) if projection[3] else unit
        y[rows] = h[:batch]
    return y, h, c
