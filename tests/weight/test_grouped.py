"""granularity="group": blocks are weights of their own, copies round what is left, gptq goes on from block to block."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import outlier_weight

from ocs import functional
from ocs.kernels import reference
from ocs.weight.blocks import blocks_of, count_blocks
from ocs.weight.selection import lowering_blocks

kinds = pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
SHAPES = [((6, 70), 1), ((4, 32, 3), 1), ((6, 40, 3, 3), 2), ((12, 1, 3, 3), 12)]
DAMPING = 0.03


def quantized(w: Any, bits: int, r: float = 0.0, **options: Any) -> functional.QuantizedWeight:
    return functional.quantize_weight(w, bits, r, granularity="group", **{"group": 32, **options})


def parts_of(q: functional.QuantizedWeight, channels: int, group: int = 32) -> np.ndarray:
    """The dequantized parts [O, C + n, K]."""
    ints, scale = np.asarray(q.ints), np.asarray(q.scale)
    ints = ints.reshape(*ints.shape[:2], -1)
    return ints * scale[:, blocks_of(channels, ints.shape[1] - channels, group), None]


def test_blocks_are_of_channels_and_then_of_copies() -> None:
    assert blocks_of(70, 33, 32).tolist() == [0] * 32 + [1] * 32 + [2] * 6 + [3] * 32 + [4]
    assert count_blocks(70, 33, 32) == 5
    assert blocks_of(64, 0, 64).tolist() == [0] * 64
    assert count_blocks(0, 0, 32) == 0


# --- Without splits each block is a weight ----------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("clip", ["none", "auto", 0.7, "mse", "aciq", "kl", "percentile", "sawb", "mse-release"])
def test_without_splits_each_block_is_a_weight_of_its_own(kind: Any, shape: tuple, groups: int, clip: Any) -> None:
    w = outlier_weight(shape)
    for rounding in ("nearest", "squant"):
        q = quantized(kind(w), 4, clip=clip, rounding=rounding, groups=groups)
        assert all(type(each) is type(kind(w)) for each in q)
        assert tuple(q.scale.shape) == (shape[0], count_blocks(shape[1], 0, 32)) == tuple(q.threshold.shape)
        for b, begin in enumerate(range(0, shape[1], 32)):
            block = np.ascontiguousarray(w[:, begin : begin + 32])
            own = functional.quantize_weight(block, 4, 0.0, clip, "channel", rounding=rounding)
            np.testing.assert_array_equal(q.ints[:, begin : begin + 32], own.ints)
            np.testing.assert_array_equal(q.scale[:, b], own.scale)
            np.testing.assert_array_equal(q.threshold[:, b], own.threshold)


def test_wide_groups_are_output_channels() -> None:
    w = outlier_weight((6, 70))
    q, other = quantized(w, 3, group=96, clip="mse"), functional.quantize_weight(w, 3, 0, "mse", "channel")
    np.testing.assert_array_equal(q.ints, other.ints)
    np.testing.assert_array_equal(q.scale[:, 0], other.scale)


# --- Copies -----------------------------------------------------------------------------------------------------------


def literal(w: np.ndarray, plan: functional.SplitPlan, bits: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Parts one after the other, by definition: integers and scales of w [O, C, K] of one group, nothing clipped."""
    (outputs, C, K), E, most = w.shape, len(plan.source), 2 ** (bits - 1) - 1
    share, block = 1 / np.asarray(plan.parts, np.float64), blocks_of(C, E - C, 32)
    ints, scale = np.zeros((outputs, E, K), np.float32), np.ones((outputs, block.max() + 1), np.float32)
    rest, left = w.copy(), np.ones(C)

    def target(j: int) -> np.ndarray:
        c = plan.source[j]
        return w[:, c] * np.float32(share[j]) if split == "naive" else rest[:, c] * np.float32(share[j] / left[c])

    for b in range(block.max() + 1):
        columns = np.flatnonzero(block == b)
        largest = np.max([np.abs(target(j)).max(1) for j in columns], 0)
        scale[:, b] = largest / np.float32(most)
        for j in columns:
            c = plan.source[j]
            ints[:, j] = np.clip(reference.round_half_up(target(j) / scale[:, b, None]), -most, most)
            rest[:, c] -= ints[:, j] * scale[:, b, None]
            left[c] -= share[j]
    return ints, scale


@kinds
@pytest.mark.parametrize("split", ["qa", "naive", "even"])
@pytest.mark.parametrize(("shape", "groups"), [((6, 70), 1), ((4, 36, 3), 1), ((6, 40, 3, 3), 2)])
def test_copies_round_their_share_of_what_is_left(kind: Any, split: str, shape: tuple, groups: int) -> None:
    for seed, r in enumerate((0.05, 0.3, 1.0)):
        w = outlier_weight(shape, seed)
        w[:, 3] *= 30  # which is split again and again, also within one block of copies
        q = quantized(kind(w), 5, r, split=split, groups=groups)
        plan = functional.plan_splits(w, r, groups, split=split)
        np.testing.assert_array_equal(q.source, plan.source)
        C, E = shape[1], len(plan.source) // groups
        for g in range(groups):
            rows, columns = slice(g * shape[0] // groups, (g + 1) * shape[0] // groups), slice(g * E, (g + 1) * E)
            own = plan._replace(source=plan.source[columns] - g * C, parts=plan.parts[columns])
            ints, scale = literal(w[rows].reshape(shape[0] // groups, C, -1), own, 5, split)
            np.testing.assert_array_equal(q.scale[rows], scale)
            np.testing.assert_array_equal(np.asarray(q.ints[rows]).reshape(ints.shape), ints)


@pytest.mark.parametrize("rounding", ["nearest", "squant"])
@pytest.mark.parametrize("clip", ["none", "mse", "auto"])
def test_a_split_channel_is_off_by_its_last_part_alone(clip: str, rounding: str) -> None:
    w = outlier_weight((8, 70, 3))
    w[:, 3] *= 9
    w[:, 40] *= 5
    own, naive = (quantized(w, 3, 0.03, split=split, clip=clip) for split in ("qa", "naive"))
    assert functional.weight_error(w, naive, group=32)[1] > functional.weight_error(w, own, group=32)[1]
    rounded = quantized(w, 3, 0.03, clip=clip, rounding=rounding)
    split = np.unique(rounded.source[70:])
    off = np.abs(functional.fold(rounded, 70, group=32) - w)[:, split]
    steps = 0.501 if rounding == "nearest" else 1.001
    assert clip != "none" or (off <= steps * rounded.scale[:, -1, None, None]).all()


def test_splits_lower_the_error_of_narrow_groups_too() -> None:
    w = outlier_weight((40, 200, 3))
    noise = [functional.weight_error(w, quantized(w, 4, r), group=32)[1] for r in (0.0, 0.05, 0.2)]
    assert noise == sorted(noise, reverse=True)


def test_what_splits_lower_most_is_chosen_by_blocks() -> None:
    """Channel 1 is the largest, and halving it lowers nothing, as its neighbour is as large; 33 stands alone."""
    largest = np.full((4, 40), 0.1)
    largest[:, 1] = largest[:, 2] = 9
    largest[:, 33] = 5
    assert lowering_blocks(largest, 2, 32) == [33, 1]
    better = 0
    for seed in range(4):
        w = outlier_weight((16, 80), seed)
        noise = [functional.weight_error(w, quantized(w, 3, 0.1, select=s), group=32)[1] for s in ("error", "max")]
        assert noise[0] <= noise[1]
        better += noise[0] < noise[1]
    assert better


# --- GPTQ -------------------------------------------------------------------------------------------------------------


def moments_of(groups: int, columns: int, seed: int = 0) -> np.ndarray:
    """Second moments of inputs that have something in common."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((groups, 300, columns)) @ (np.eye(columns) + rng.standard_normal((columns, columns)) / 8)
    x *= np.exp(rng.standard_normal(columns) / 2)
    return (x.swapaxes(1, 2) @ x).astype(np.float32)


def literal_gptq(
    target: np.ndarray, scales: np.ndarray, block: np.ndarray, second: np.ndarray, bits: int
) -> np.ndarray:
    """Frantar et al., 2023, as they say it: by the inverse of H of the columns left."""
    N, most, w = len(second), 2 ** (bits - 1) - 1, target.astype(np.float64).copy()
    damped = second.astype(np.float64) + np.eye(N) * DAMPING * np.diag(second).mean()
    order, ints = np.lexsort((-np.diag(second), block)), np.zeros(w.shape, int)
    for i, j in enumerate(order):
        inverse = np.linalg.inv(damped[np.ix_(order[i:], order[i:])])
        ints[:, j] = np.clip(np.floor(w[:, j] / scales[:, block[j]] + 0.5), -most, most)
        error = (w[:, j] - ints[:, j] * scales[:, block[j]]) / inverse[0, 0]
        w[:, order[i + 1 :]] -= error[:, None] * inverse[0, 1:]
    return ints


@kinds
@pytest.mark.parametrize(("shape", "groups"), [((5, 70), 1), ((5, 34, 2), 1), ((4, 40), 2)])
@pytest.mark.parametrize("r", [0.0, 0.1])
def test_gptq_equals_its_twin(kind: Any, shape: tuple, groups: int, r: float) -> None:
    w, (outputs, C), K = outlier_weight(shape), shape[:2], math.prod(shape[2:])
    H = moments_of(groups, C * K)
    for clip, split in (("none", "qa"), ("mse", "even")):
        q = quantized(kind(w), 3, r, clip=clip, split=split, rounding="gptq", groups=groups, moments=kind(H))
        nearest = quantized(w, 3, r, clip=clip, split=split, groups=groups)
        np.testing.assert_array_equal(q.scale, nearest.scale)
        E = len(nearest.source) // groups
        for g in range(groups):
            rows = slice(g * outputs // groups, (g + 1) * outputs // groups)
            source = nearest.source[g * E : (g + 1) * E] - g * C
            last = np.array([np.flatnonzero(source == c)[-1] for c in range(C)])
            ints, found = (np.asarray(each.ints[rows]).reshape(-1, E, K) for each in (nearest, q))
            parts = ints * nearest.scale[rows][:, blocks_of(C, E - C, 32), None]
            others = np.setdiff1d(np.arange(E), last)
            np.testing.assert_array_equal(found[:, others], ints[:, others])
            target = w[rows].reshape(-1, C, K).copy()
            for j in others:
                target[:, source[j]] -= parts[:, j]
            block = np.repeat(blocks_of(C, E - C, 32)[last], K)
            expected = literal_gptq(target.reshape(len(target), -1), nearest.scale[rows], block, H[g], 3)
            assert (found[:, last].reshape(expected.shape) != expected).mean() < 0.01  # ties in float32
            assert (ints[:, last].reshape(expected.shape) != expected).mean() > 0.05


def test_gptq_leaves_less_output_error() -> None:
    w, H = outlier_weight((30, 100)), moments_of(1, 100)
    for r in (0.0, 0.1):
        off = {}
        for rounding in ("nearest", "gptq"):
            q = quantized(w, 3, r, rounding=rounding, **({"moments": H} if rounding == "gptq" else {}))
            d = functional.fold(q, 100, group=32) - w
            off[rounding] = ((d @ H[0]) * d).sum()
        assert off["gptq"] < 0.8 * off["nearest"]


@pytest.mark.parametrize("r", [0.0, 0.1])
def test_thresholds_of_gptq_are_measured(r: float) -> None:
    """Estimated without inputs they leave 1.06 to 1.3 times what the least error of the weight leaves."""
    w, H = outlier_weight((30, 100)), moments_of(1, 100)
    for bits in (2, 3):
        off = {}
        for clip in ("auto", "mse"):
            d = functional.fold(quantized(w, bits, r, clip=clip, rounding="gptq", moments=H), 100, group=32) - w
            off[clip] = ((d @ H[0]) * d).sum()
        assert off["auto"] < 1.03 * off["mse"]


# --- What is left -----------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize(("shape", "groups"), [((6, 70), 1), ((6, 40, 3, 3), 2)])
def test_errors_are_those_of_the_folded_weight(kind: Any, shape: tuple, groups: int) -> None:
    w = outlier_weight(shape)
    q = quantized(kind(w), 4, 0.2, groups=groups)
    folded = functional.fold(q, shape[1], groups, 32)
    assert type(folded) is type(kind(w))
    parts, expected = parts_of(q, shape[1]), np.zeros((*shape[:2], math.prod(shape[2:])))
    source = np.asarray(q.source).reshape(groups, -1)
    for o in range(shape[0]):
        for j, c in enumerate(source[o // (shape[0] // groups)] % shape[1]):
            expected[o, c] += parts[o, j]
    np.testing.assert_allclose(np.asarray(folded).reshape(expected.shape), expected, rtol=1e-6, atol=1e-7)
    signal, noise = functional.weight_error(kind(w), q, groups, 32)
    d = np.asarray(folded, np.float64) - w
    assert (signal, noise) == (pytest.approx((w.astype(float) ** 2).sum()), pytest.approx((d**2).sum()))
    ones, zeros = np.float32(1), np.zeros(shape, np.int8)
    plain = reference.output_error(d.astype(np.float32), zeros, ones, np.arange(shape[1]), 1, 0.0)
    np.testing.assert_allclose(functional.output_error(kind(w), q, groups, 0.0, 32), plain, rtol=1e-5)
    assert (np.asarray(functional.output_error(kind(w), q, groups, 10.0, 32)) >= plain * (1 - 1e-5)).all()


@pytest.mark.parametrize("shape", [(0, 40), (4, 0), (4, 40, 0), (1, 1)])
def test_weights_of_next_to_nothing(shape: tuple) -> None:
    q = quantized(np.ones(shape, np.float32), 4, 0.1)
    np.testing.assert_allclose(functional.fold(q, shape[1], group=32), np.ones(shape), rtol=1e-6)


def test_zeros_and_tiny_values() -> None:
    for value in (0.0, 1e-44, 1e-30):
        q = quantized(np.full((2, 33), value, np.float32), 4, 1.0)
        assert np.isfinite(q.scale).all()
        assert (q.scale > 0).all()
        np.testing.assert_allclose(functional.fold(q, 33, group=32), value, rtol=1e-5, atol=1e-44)


@pytest.mark.parametrize("group", [0, 16, 33, 32.0, "64", True, -32])
def test_a_group_is_a_multiple_of_32(group: Any) -> None:
    with pytest.raises(ValueError, match="use a multiple of 32, the input channels that share a scale"):
        quantized(outlier_weight((4, 40)), 4, group=group)


def test_another_group_than_it_was_quantized_with_is_refused() -> None:
    q = quantized(outlier_weight((4, 140)), 4)
    with pytest.raises(ValueError, match=r"group=64 gives no scale of shape \[4, 5\]"):
        functional.fold(q, 140)
