"""Each kernel against its rivals and against a copy of the same bytes, in one process, in turns.

    python benchmarks/kernels.py [--json]

Tensors are float32 on the CPU. Where a ratio is a limit, the rival is a copy: the speed of memory.
"""

from __future__ import annotations

import numpy as np
import torch
from bench import Row, at_most, faster, in_turns, publish

from ocs import functional

SMALL, LARGE = 1 << 18, 1 << 24


def fake_quantize(size: int, rounds: int, factor: float) -> list[Row]:
    """8 bits, one scale for all."""
    x, scale = torch.randn(size), torch.tensor(0.03)
    calls = {
        "x.clone()": x.clone,
        "ours": lambda: torch.ops.ocs.fake_quantize(x, scale, 8, True),
        "torch.fake_quantize_per_tensor_affine": lambda: torch.fake_quantize_per_tensor_affine(x, 0.03, 0, -127, 127),
    }
    times = in_turns(calls, rounds, "fake_quantize")
    what = f"fake_quantize, {size:,} floats"
    return [
        at_most(what, times, "ours", "x.clone()", 1.15),
        faster(what, times, "ours", "torch.fake_quantize_per_tensor_affine", factor),
    ]


def histogram(rounds: int) -> list[Row]:
    """2048 bins, the range found first, as the rivals do."""
    x = torch.randn(LARGE)
    values = x.numpy()
    calls = {
        "ours": lambda: functional.histogram(x, 2048),
        "torch.histc": lambda: torch.histc(x, 2048),
        "numpy.histogram": lambda: np.histogram(values, 2048),
        "x.clone()": x.clone,
    }
    times = in_turns(calls, rounds, "histogram")
    what = f"histogram, 2048 bins, {LARGE:,} floats"
    rows = [faster(what, times, "ours", rival, 8) for rival in ("torch.histc", "numpy.histogram")]
    return [*rows, at_most(what, times, "ours", "x.clone()", 8)]


def quantize_weight(rounds: int) -> list[Row]:
    """A 4096 x 4096 matrix at 5 bits: plan, threshold, integers."""
    w = torch.randn(4096, 4096)
    calls = {
        "a copy of w": w.clone,
        "r=0.01": lambda: functional.quantize_weight(w, 5, 0.01),
        "r=0.1": lambda: functional.quantize_weight(w, 5, 0.1),
        "r=0.1 per channel": lambda: functional.quantize_weight(w, 5, 0.1, granularity="channel"),
    }
    times = in_turns(calls, rounds, "quantize_weight")
    what = "quantize_weight, 4096 x 4096, r=0.1"
    return [
        at_most(what, times, "r=0.1", "r=0.01", 1.3),
        at_most(what, times, "r=0.1", "a copy of w", 6),
        at_most(f"{what}, per channel", times, "r=0.1 per channel", "a copy of w", 6),
    ]


def pack(rounds: int) -> list[Row]:
    """Integers to 5 bits and back, against a copy of the same integers."""
    ints = torch.randint(-15, 16, (LARGE,), dtype=torch.int8)
    packed = torch.ops.ocs.pack(ints, 5)
    calls = {
        "a copy of the integers": ints.clone,
        "pack": lambda: torch.ops.ocs.pack(ints, 5),
        "unpack": lambda: torch.ops.ocs.unpack(packed, LARGE, 5),
    }
    times = in_turns(calls, rounds, "pack")
    return [at_most(f"{op}, 5 bits, {LARGE:,}", times, op, "a copy of the integers", 4) for op in ("pack", "unpack")]


def main() -> None:
    """Run all and publish."""
    rows = [
        *fake_quantize(SMALL, 400, 10),
        *fake_quantize(LARGE, 25, 2.5),
        *histogram(11),
        *quantize_weight(21),
        *pack(51),
    ]
    publish("kernels", rows)


if __name__ == "__main__":
    main()
