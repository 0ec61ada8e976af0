"""What an engine's 8-bit products can hold: which integers are safe on which machine.

On x86 CPUs without VNNI, oneDNN and other engines add pairs of products u8 x s8 in 16 bits, which saturate in silence:
inputs of 255 on weights of 127 give half the true sum. Pairs fit as long as 2 x |input| |weight| <= 32767.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch

Machine = Literal["this", "vnni", "avx2", "tensorrt"]


@dataclass(frozen=True)
class Arithmetic:
    """How a target computes products of 8-bit integers."""

    saturates: bool = False  # whether pairs of products are added in 16 bits
    signed: bool = False  # whether inputs are int8 with zero point 0, else uint8 with any

    def limit(self, largest_input: int) -> int:
        """Give the largest |integer| that a weight may hold where inputs reach this one."""
        return max(1, min(127, 32767 // (2 * largest_input))) if self.saturates else 127


def arithmetic_of(target: str) -> Arithmetic:
    """Tell how a target computes: "this" machine, x86 with "vnni" or only with "avx2", or "tensorrt"."""
    if target not in get_args(Machine):
        raise ValueError(f"target={target!r}: use {', '.join(map(repr, get_args(Machine)))}")
    if target == "this":
        return Arithmetic(saturates=saturates_here())
    return Arithmetic(saturates=target == "avx2", signed=target == "tensorrt")


@cache
def saturates_here() -> bool:
    """Try whether this machine's 8-bit convolutions saturate, as oneDNN runs them."""
    C = 32
    if not hasattr(torch.ops.onednn, "qconv_prepack") or "x86" not in _machine():
        return False
    x = torch.full((1, C, 4, 4), 255, dtype=torch.uint8, device="cpu")
    weight = torch.full((C, C, 3, 3), 127, dtype=torch.int8, device="cpu")
    scales = torch.ones(C, dtype=torch.float32, device="cpu")
    zeros = torch.zeros(C, dtype=torch.int64, device="cpu")
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    packed = torch.ops.onednn.qconv_prepack(weight, scales, 1.0, 0, *geometry, x.shape)
    sums = torch.ops.onednn.qconv_pointwise(
        x, 1.0, 0, packed, scales, zeros, None, *geometry, 1.0, 0, torch.float32, "none", [], ""
    )
    return bool((sums != 255 * 127 * 9 * C).any())


def _machine() -> str:
    import platform

    return platform.machine().replace("AMD64", "x86_64")
