"""Every kernel equals its numpy twin bit for bit: all instruction sets, any thread count, numpy and torch alike."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import outlier_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ocs import _C
from ocs.kernels import composite, ops, reference

# shape of the weight, groups, splits in each group
WEIGHTS = {
    "conv": ((8, 5, 3, 3), 1, 2),
    "linear": ((7, 33), 1, 3),
    "every channel split": ((7, 33), 1, 33),
    "wide enough for every vector loop": ((16, 70, 3), 1, 40),
    "several threads": ((96, 130, 3, 3), 1, 13),
    "grouped": ((12, 10, 3, 3), 3, 4),
    "depthwise": ((24, 1, 3, 3), 24, 0),
    "one channel": ((4, 1), 1, 1),
    "no splits": ((3, 100), 1, 0),
    "no outputs": ((0, 4), 1, 1),
    "no inputs": ((4, 0, 3), 1, 0),
    "empty filter": ((4, 3, 0), 1, 2),
}
SMALL = [name for name in WEIGHTS if name != "several threads"]  # twins are slow
VALUES = {
    "heavy tails": lambda shape: outlier_weight(shape),
    "all zeros": lambda shape: np.zeros(shape, np.float32),
    "ties": lambda shape: np.resize(np.float32([1, -1, 0.5, 0.25, -0.5]), shape),
    "one huge outlier": lambda shape: np.where(np.arange(np.prod(shape)).reshape(shape) == 3, 1e6, 1e-3).astype("f4"),
    "subnormal": lambda shape: (outlier_weight(shape) * 1e-41).astype(np.float32),
}


def both(name: str, *args: object) -> object:
    """The kernel's result through numpy, after checking that the torch operator gives the same."""
    through_numpy = getattr(_C, name)(*args)
    tensors = [torch.from_numpy(arg.copy()) if isinstance(arg, np.ndarray) else arg for arg in args]
    through_torch = getattr(torch.ops.ocs, name)(*tensors)
    for a, b in zip(_tuple(through_numpy), _tuple(through_torch), strict=True):
        assert_same(b.numpy(), a)
    return through_numpy


def _tuple(x: object) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def assert_same(a: np.ndarray, b: np.ndarray) -> None:
    """Same dtype, shape and bits; any NaN equals any other."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    np.testing.assert_array_equal(a, b)
    if a.dtype.kind == "f":
        np.testing.assert_array_equal(np.signbit(a) & ~np.isnan(a), np.signbit(b) & ~np.isnan(b))


def scales_for(plan: reference.Plan, output_max: np.ndarray, bits: int) -> list[np.ndarray]:
    """One scale, and one per output channel, as quantize_weight would choose them; 1 for zeros."""
    qmax = np.float32(2 ** (bits - 1) - 1)
    scales = [np.asarray(plan[3].max(initial=0) / qmax), output_max / qmax]
    return [np.where(scale > 0, scale, 1).astype(np.float32) for scale in scales]


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(("weight", "even"), [*((name, False) for name in WEIGHTS), *((name, True) for name in SMALL)])
def test_weight_kernels_equal_their_twins(isa: str, weight: str, values: str, even: bool) -> None:
    shape, groups, splits = WEIGHTS[weight]
    w = VALUES[values](shape)
    largest = both("channel_max", w, groups)
    assert_same(largest, reference.channel_max(w, groups))
    plan = both("split_plan", largest, groups, splits, even)
    for ours, twin in zip(plan, reference.split_plan(largest, groups, splits, even), strict=True):
        assert_same(ours, twin)
    source, parts, offset, _ = plan
    output_max = both("output_max", w, source, parts, groups)
    assert_same(output_max, reference.output_max(w, source, parts, groups))
    for bits in (2, 5, 8):
        for scale in scales_for(plan, output_max, bits):
            for quantization_aware in (True, False):
                args = (w, scale, source, parts, offset, groups, bits, quantization_aware)
                ints = both("quantize_weight", *args)
                assert_same(ints, reference.quantize_weight(*args))
            assert_same(both("fold", ints, scale, source, groups, shape[1]),
                        reference.fold(ints, scale, source, groups, shape[1]))  # fmt: skip
            assert_same(both("dequantize", ints, scale), reference.dequantize(ints, scale))
            assert_same(both("weight_error", w, ints, scale, source, groups),
                        reference.weight_error(w, ints, scale, source, groups))  # fmt: skip
            np.testing.assert_allclose(both("output_error", w, ints, scale, source, groups, 7.0),
                        reference.output_error(w, ints, scale, source, groups, 7.0), rtol=1e-12)  # fmt: skip


@pytest.mark.parametrize("quantization_aware", [True, False])
@pytest.mark.parametrize("splits", [0, 1, 5, 20])
def test_integers_are_those_of_the_papers_procedure(isa: str, splits: int, quantization_aware: bool) -> None:
    """Pass 1 looks at the whole split tensor each time; pass 2 splits the original in the same order, in grid units."""
    w = outlier_weight((6, 20, 3, 3))
    bits, qmax = 4, 7
    picks = reference.pick_channels(w, splits)
    scale = np.abs(reference.split_channels(w, picks, False)[0]).max() / np.float32(qmax)
    u, source = reference.split_channels((w / scale).astype(np.float64), picks, quantization_aware)
    plan = _C.split_plan(_C.channel_max(w, 1), 1, splits, False)
    assert_same(plan[0], source)
    ours = _C.quantize_weight(w, np.asarray(scale), *plan[:3], 1, bits, quantization_aware)
    assert_same(ours, np.clip(reference.round_half_up(u), -qmax, qmax).astype(np.int8))


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("weight", SMALL)
def test_squant_equals_its_twin(isa: str, weight: str, values: str, even: bool) -> None:
    """Numpy, torch and what other devices run; with and without clipping, and with every error half a step."""
    shape, groups, splits = WEIGHTS[weight]
    w = VALUES[values](shape)
    plan = reference.split_plan(reference.channel_max(w, groups), groups, splits, even)
    source, parts, offset, _ = plan
    output_max = reference.output_max(w, source, parts, groups)
    for bits in (2, 3, 4, 8):
        whole = scales_for(plan, output_max, bits)
        for scale in (*whole, *(s * np.float32(0.4) for s in whole), np.asarray(0.5, np.float32)):
            args = (w, np.asarray(np.maximum(scale, np.float32(1e-44))), source, parts, offset, groups, bits)
            ints = both("squant_weight", *args)
            assert_same(ints, reference.squant_weight(*args))
            tensors = [torch.from_numpy(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
            assert_same(composite.squant_weight(*tensors).numpy(), ints)


ONE = np.asarray(1, np.float32)
FINITE = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=3, max_side=9),
                    elements=st.floats(-1000, 1000, width=32))  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(w=FINITE, splits=st.integers(0, 9), bits=st.integers(2, 8), share=st.sampled_from([1, 1, 0.5, 0.1]),
       even=st.booleans())  # fmt: skip
def test_squant_cancels_errors(w: np.ndarray, splits: int, bits: int, share: float, even: bool) -> None:
    """What csrc/ocs.h promises; u that rounds to one of its neighbours has an error below 1."""
    qmax = 2 ** (bits - 1) - 1
    plan = _C.split_plan(_C.channel_max(w, 1), 1, min(splits, w.shape[1]), even)
    scale = np.asarray(max(plan[3].max() * np.float32(share) / np.float32(qmax), np.float32(1e-30)), np.float32)
    args = (w, scale, *plan[:3], 1, bits)
    nearest, ints = _C.quantize_weight(*args, True), _C.squant_weight(*args)
    assert np.abs(ints).max() <= qmax
    before, after = (_C.fold(q, ONE, plan[0], 1, w.shape[1]).astype(np.float64) for q in (nearest, ints))
    u = (w / scale).astype(np.float64)
    saturated = before != reference.round_half_up(u)
    parts, offset = (part.reshape(-1, *[1] * (w.ndim - 2)) for part in plan[1:3])
    split = (after.astype(np.int64)[:, plan[0]] + offset) // parts
    assert_same(ints, np.where(saturated[:, plan[0]], nearest, split).astype(np.int8))
    np.testing.assert_array_equal(after[saturated], before[saturated])
    assert (np.abs(after - u)[~saturated] < 1).all()
    if share == 1:
        assert not saturated.any()
        errors = (after - u).reshape(w.shape[0], w.shape[1], -1)
        cut_off = errors[0].size * 2.0**-24
        assert (np.abs(errors.sum(2)) < 1 + cut_off).all()
        assert (np.abs(errors.sum((1, 2))) <= 0.5 + cut_off).all()


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("shape", [(1, 3), (17, 70), (40, 9, 3), (33, 130)])
def test_gptq_is_the_same_by_every_instruction_set(shape: tuple[int, ...], even: bool) -> None:
    """The plain kernel adds up products in the order of the columns; so do all others, and torch's door."""
    w, N = outlier_weight(shape), int(np.prod(shape[1:]))
    plan = _C.split_plan(_C.channel_max(w, 1), 1, shape[1] // 3, even)[:3]
    for width in {N, N // 2 + 1}:
        blocks = -(-N // width)
        rng = np.random.default_rng(0)
        order = np.concatenate([b * width + rng.permutation(width) for b in range(blocks)])[None]
        factor = rng.standard_normal((blocks, width, width)).astype(np.float32) / 8
        found = []
        for name in _C.isas():
            ops.set_isa(name)
            found.append(both("gptq_weight", w, np.asarray(0.1, np.float32), *plan, 4, order, factor))
            for a, b in zip(found[0], found[-1], strict=True):
                assert_same(a, b)
        assert (found[0][0] != _C.quantize_weight(w, np.asarray(0.1, np.float32), *plan, 1, 4, True)).any() or N == 3
    ops.set_isa("auto")


@pytest.mark.parametrize("odd", [0.0, np.nan, np.inf, -np.inf])
def test_output_errors_have_the_same_bits_by_any_instruction_set(odd: float) -> None:
    """Filters of one element, in rows of any length."""
    for C in range(1, 12):
        w = outlier_weight((3, C))
        w[1, C // 2] += odd
        ints, scale = np.ones((3, C), np.int8), np.float32([0.3, 0.1, 2])
        found = []
        for name in _C.isas():
            ops.set_isa(name)
            found.append(both("output_error", w, ints, scale, np.arange(C), 1, 10.0).view(np.int64))
            assert_same(found[0], found[-1])
    ops.set_isa("auto")


def test_squant_by_hand() -> None:
    """The largest error of a filter moves, then that of the filter with the largest; of equal ones the first."""
    assert squant([[[0.75, -0.375, -0.4375, 3]]]) == [[[1, 0, -1, 3]]]  # errors 0.25, 0.375, 0.4375, 0: one whole step
    assert squant([[[0.625, -0.375, -0.375, 3]]]) == [[[0, 0, 0, 3]]]
    assert squant([[[0.75, 1], [0.625, 1], [3, 0]]]) == [[[1, 1], [0, 1], [3, 0]]]  # errors of filters 0.25, 0.375, 0
    assert squant([[0.5, 0.5, 0.5, -0.5, 3]]) == [[0, 0, 1, 0, 3]]  # 0.5 each, 0: two whole steps
    assert squant([[[3.25, 3.25, 9, 0.375]]]) == [[[3, 3, 3, 1]]]  # saturated ones stay, and count: -6.875


def squant(weight: list) -> list:
    """Without splits, at scale 1, in 3 bits."""
    w = np.float32(weight)
    return _C.squant_weight(w, ONE, *_C.split_plan(_C.channel_max(w, 1), 1, 0, False)[:3], 1, 3).tolist()


@settings(max_examples=200, deadline=None)
@given(w=FINITE, splits=st.integers(0, 9), bits=st.integers(2, 8), even=st.booleans())
def test_hermites_identity(w: np.ndarray, splits: int, bits: int, even: bool) -> None:
    """Folding the quantization-aware integers gives Q(w) for every w, ties included."""
    qmax = 2 ** (bits - 1) - 1
    plan = _C.split_plan(_C.channel_max(w, 1), 1, min(splits, w.shape[1]), even)
    scale = np.asarray(max(plan[3].max() / np.float32(qmax), np.float32(1e-30)), np.float32)
    for name in _C.isas():
        ops.set_isa(name)
        ints = _C.quantize_weight(w, scale, *plan[:3], 1, bits, True)
        whole = reference.round_half_up((w / scale).astype(np.float64)).astype(np.float32)
        assert_same(_C.fold(ints, scale, plan[0], 1, w.shape[1]), whole * scale + np.float32(0))


def test_rounding_one_ulp_from_a_tie(isa: str) -> None:
    """Where adding 1/2 in float32 would round up to the next integer."""
    below, above = np.float32(0.49999997), np.float32(-0.50000006)
    w = np.float32([[below, above, 0.5, -0.5, 1.5, -1.5, 2.4999998, 3]])
    plan = _C.split_plan(_C.channel_max(w, 1), 1, 0, False)
    ints = _C.quantize_weight(w, np.asarray(1, np.float32), *plan[:3], 1, 4, True)
    assert ints.tolist() == [[0, -1, 1, 0, 2, -1, 2, 3]]


def test_splitting_a_tie_of_channels_takes_the_lowest_first() -> None:
    source, parts, offset, largest = _C.split_plan(np.float32([1, 2, 2, 0.5]), 1, 4, False)
    assert source.tolist() == [0, 1, 2, 3, 1, 2, 0, 1]
    assert parts.tolist() == [2, 4, 2, 1, 2, 2, 2, 4]
    assert offset.tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    assert largest.tolist() == [0.5, 0.5, 1, 0.5, 1, 1, 0.5, 0.5]


def test_of_equal_parts_the_channel_that_has_the_largest_gets_one_more() -> None:
    source, parts, offset, largest = _C.split_plan(np.float32([1, 2, 6, 0.5, 0, 0, 0, 0]), 2, 4, True)
    assert source.tolist() == [0, 1, 2, 3, 2, 2, 1, 2, 4, 5, 6, 7, 4, 4, 4, 4]  # 6, 3, 2 and 2, then 2
    assert parts.tolist() == [1, 2, 4, 1, 4, 4, 2, 4, 5, 1, 1, 1, 5, 5, 5, 5]
    assert offset.tolist() == [0, 0, 0, 0, 1, 2, 1, 3, 0, 0, 0, 0, 1, 2, 3, 4]
    assert largest.tolist() == [1, 1, 1.5, 0.5, 1.5, 1.5, 1, 1.5, *[0] * 8]


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("n", [*range(1, 16), 21, 24, 40, 1000, 65535, 2**20 + 1, 2**22 - 1, 2**22])
def test_any_number_of_equal_parts_adds_up(isa: str, n: int, bits: int) -> None:
    """Around every integer and tie and far outside the grid, for divisors with and without a power of two in them.

    Of so many parts a few are looked at: the floor of an exact fraction, in whole numbers of any size.
    """
    qmax, rng = 2 ** (bits - 1) - 1, np.random.default_rng(n)
    whole = np.unique(rng.integers(-n * (qmax + 1), n * (qmax + 1), 500))
    near = np.float32((whole[:, None] + [-0.5, 0, 0.5]).ravel())
    w = np.concatenate([near, np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf))])
    w = np.concatenate([w, np.float32([-0.0, 1e-40, -1e-40, 3e38, -3e38])])[:, None]
    offset = np.unique(np.r_[0, rng.integers(0, n, 50), n - 1]).astype(np.int32)
    if n <= 40:
        offset = np.arange(n, dtype=np.int32)
    plan = (np.zeros(len(offset), np.int64), np.full(len(offset), n, np.int32), offset)
    ints = both("quantize_weight", w, ONE, *plan, 1, bits, True)
    assert_same(ints, reference.quantize_weight(w, ONE, *plan, 1, bits, True))
    halves = [math.floor(2 * Fraction(float(u))) for u in w.ravel()]
    exact = [[min(max((u2 + 1 + 2 * int(k)) // (2 * n), -qmax), qmax) for k in offset] for u2 in halves]
    assert ints.tolist() == exact
    if n <= 40:
        inside = (np.abs(ints) < qmax).all(1)
        assert inside.any() or bits == 2
        np.testing.assert_array_equal(
            ints.sum(1, dtype=np.int64)[inside], reference.round_half_up(w[inside, 0].astype(np.float64))
        )


@settings(max_examples=200, deadline=None)
@given(w=FINITE, splits=st.integers(0, 9), bits=st.integers(2, 8))
def test_equal_parts_are_never_wider_than_halves(w: np.ndarray, splits: int, bits: int) -> None:
    """The narrowest range that so many copies can give; where none is split twice, halving's integers."""
    largest = _C.channel_max(w, 1)
    halves, even = (_C.split_plan(largest, 1, min(splits, w.shape[1]), each) for each in (False, True))
    assert even[3].max() <= halves[3].max()
    for source, parts, offset in (plan[:3] for plan in (halves, even)):
        for c in range(w.shape[1]):
            own = source == c
            if largest[c] > 0:
                assert sum(Fraction(1, int(n)) for n in parts[own]) == 1
                assert sorted((offset[own] * (parts.max() // parts[own])).tolist())[0] == 0
    if even[1].max() == 2 and largest.min() > 0:
        for a, b in zip(halves, even, strict=True):
            assert_same(a, b)
        scale = np.asarray(max(even[3].max() / np.float32(2 ** (bits - 1) - 1), np.float32(1e-30)), np.float32)
        assert_same(*(_C.quantize_weight(w, scale, *plan[:3], 1, bits, True) for plan in (halves, even)))


def test_a_plan_of_halves_and_thirds(isa: str) -> None:
    """Which no rule makes, but a kernel takes: channel 0 is a quarter, a half, a quarter, channel 1 three thirds."""
    w = outlier_weight((5, 2, 9))
    w[:, 0] *= 20
    plan = (np.int64([0, 1, 0, 0, 1, 1]), np.int32([4, 3, 2, 4, 3, 3]), np.int32([0, 0, 1, 2, 1, 2]))
    output_max = both("output_max", w, *plan[:2], 1)
    assert_same(output_max, reference.output_max(w, *plan[:2], 1))
    for name in ("quantize_weight", "squant_weight"):
        args = (w, output_max / np.float32(7), *plan, 1, 4) + ((True,) if name == "quantize_weight" else ())
        assert_same(both(name, *args), getattr(reference, name)(*args))


@pytest.mark.parametrize("share", [1, 0.3])
def test_parts_saturate_each(isa: str, share: float) -> None:
    """A channel of n parts reaches n qmax, whichever way it is split."""
    w, n = np.float32([[100, 1], [-100, 1], [0, 0]]), 3
    plan = _C.split_plan(np.float32([100, 1]), 1, n - 1, True)
    scale = np.asarray(plan[3].max() * np.float32(share / 7), np.float32)
    ints = _C.quantize_weight(w, scale, *plan[:3], 1, 4, True)
    assert ints[:, [0, 2, 3]].tolist() == [[7] * 3, [-7] * 3, [0] * 3]
    assert_same(_C.squant_weight(w, scale, *plan[:3], 1, 4)[:, [0, 2, 3]], ints[:, [0, 2, 3]])


ACTIVATIONS = np.concatenate([
    np.random.default_rng(1).standard_normal(70_001).astype(np.float32),
    np.float32([0, -0.0, 1e-9, -1e-9, np.inf, -np.inf, np.nan, 0.25, 0.75, -0.25, 3e38, 1e-40]),
])  # fmt: skip


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("size", [0, 1, 31, 33, len(ACTIVATIONS)])
def test_activation_kernels_equal_their_twins(isa: str, bits: int, signed: bool, size: int) -> None:
    x, scale = ACTIVATIONS[len(ACTIVATIONS) - size :], np.asarray(0.5, np.float32)
    with np.errstate(over="ignore"):
        assert_same(both("fake_quantize", x, scale, bits, signed), reference.fake_quantize(x, scale, bits, signed))
        q = both("quantize", x, scale, bits, signed)
        assert_same(q, reference.quantize(x, scale, bits, signed))
    assert_same(both("dequantize", q, scale), reference.dequantize(q, scale))


@pytest.mark.parametrize("bins", [1, 7, 128, 2048, 5000])
@pytest.mark.parametrize("size", [0, 1, 15, 70_000])
def test_histogram_equals_its_twin(isa: str, bins: int, size: int) -> None:
    x = ACTIVATIONS[:size]
    limit = float(both("abs_max", x))
    assert limit == reference.abs_max(x)
    counts = both("histogram", x, bins, limit)
    assert_same(counts, reference.histogram(x, bins, limit))
    assert counts.sum() == size


def test_histogram_counts_what_lies_beyond_in_the_last_bin(isa: str) -> None:
    x = np.float32([0.1, 0.9, 5, -7, np.inf, np.nan, 0, 0.5, 0.3])
    assert both("histogram", x, 2, 1.0).tolist() == [3, 6]
    assert both("histogram", np.zeros(5, np.float32), 3, 0.0).tolist() == [5, 0, 0]


def test_results_do_not_depend_on_threads(threads: int) -> None:
    w, x = outlier_weight((200, 300, 3)), outlier_weight((300_000,))
    plan = _C.split_plan(_C.channel_max(w, 1), 1, 30, False)
    scale = np.asarray(plan[3].max() / np.float32(15))
    ints = _C.quantize_weight(w, scale, *plan[:3], 1, 5, True)
    assert_same(ints, reference.quantize_weight(w, scale, *plan[:3], 1, 5, True))
    for part in (w[:120], np.ascontiguousarray(w[..., 0])):
        args = (part, scale, *plan[:3], 1, 4)
        assert_same(_C.squant_weight(*args), reference.squant_weight(*args))
    factor = np.random.default_rng(0).standard_normal((1, 900, 900)).astype(np.float32) / 30
    args = (scale, *plan[:3], 5, np.arange(900)[None], factor)
    for all_rows, last in zip(_C.gptq_weight(w, *args), _C.gptq_weight(w[160:], *args), strict=True):
        assert_same(all_rows[160:], last)
    per_row = [_C.output_error(part, q, scale, plan[0], 1, 10.0) for part, q in ((w, ints), (w[:7], ints[:7]))]
    assert_same(per_row[0][:7], per_row[1])
    error = _C.weight_error(w, ints, scale, plan[0], 1)
    assert_same(error, reference.weight_error(w, ints, scale, plan[0], 1))
    limit = reference.abs_max(x)
    assert _C.abs_max(x) == limit
    assert_same(_C.histogram(x, 2048, float(limit)), reference.histogram(x, 2048, limit))
    assert_same(_C.fake_quantize(x, scale, 4, True), reference.fake_quantize(x, scale, 4, True))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::2],
        lambda x: x[:, ::3],
        lambda x: x.T,
        lambda x: x[::-1, ::-1],
        lambda x: np.asfortranarray(x),
        lambda x: np.broadcast_to(x[:1], x.shape),
        lambda x: x.astype(">f4"),
    ],
    ids=["rows", "columns", "transposed", "reversed", "fortran", "broadcast", "byte-swapped"],
)
def test_any_layout_and_read_only(view: object) -> None:
    x = view(outlier_weight((24, 30)))
    x.flags.writeable = False
    plain = np.ascontiguousarray(x, np.float32)
    assert_same(_C.channel_max(x, 1), _C.channel_max(plain, 1))
    assert_same(_C.fake_quantize(x, 0.1, 4, True), _C.fake_quantize(plain, 0.1, 4, True))
    assert_same(_C.histogram(x, 16, 2.0), _C.histogram(plain, 16, 2.0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 5, 37, 299])
def test_maxima_tell_what_is_not_finite(isa: str, bad: float, at: int) -> None:
    x = outlier_weight((300,))
    x[at] = bad
    assert not np.isfinite(_C.abs_max(x))
    largest = _C.channel_max(x.reshape(10, 30), 1)
    assert np.flatnonzero(~np.isfinite(largest)).tolist() == [at % 30]
    with pytest.raises(ValueError, match="NaN or Inf"):
        _C.split_plan(largest, 1, 1, False)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("size", [*range(18), 31, 32, 33, 63, 64, 65, 1000, 300_007])
def test_packing_equals_its_twin_and_comes_back(isa: str, size: int, bits: int) -> None:
    """300,007 are worth several threads, which must not write into each other's bytes."""
    qmax = 2 ** (bits - 1) - 1
    ints = np.random.default_rng(size).integers(-qmax, qmax + 1, size).astype(np.int8)
    packed = both("pack", ints, bits)
    assert_same(packed, reference.pack(ints, bits))
    assert packed.size == -(-size * bits // 8)
    assert_same(both("unpack", packed, size, bits), ints)
    assert_same(reference.unpack(packed, size, bits), ints)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("at", [0, 7, 40, 99, 100])
def test_integers_that_do_not_fit_are_refused_wherever_they_are(isa: str, at: int, bits: int) -> None:
    qmax = 2 ** (bits - 1) - 1
    ints = np.zeros(101, np.int8)
    for outside in {-qmax - 1, min(qmax + 1, 127) if bits < 8 else -128}:
        ints[at] = outside
        with pytest.raises(ValueError, match="pack: an integer is outside"):
            _C.pack(ints, bits)
    stream = np.unpackbits(reference.pack(np.zeros(101, np.int8), bits), bitorder="little")
    stream[at * bits : (at + 1) * bits] = 1  # the one code that stands for no integer
    with pytest.raises(ValueError, match="unpack: an integer is outside"):
        _C.unpack(np.packbits(stream, bitorder="little"), 101, bits)


def test_bits_beyond_the_last_code_are_refused() -> None:
    packed = _C.pack(np.zeros(3, np.int8), 5)
    packed[-1] |= 0x80
    with pytest.raises(ValueError, match="bits beyond the last one are not 0"):
        _C.unpack(packed, 3, 5)


def test_dequantize_of_a_slice_of_columns(isa: str) -> None:
    """Read where it lies: only the rows are further apart."""
    q = torch.randint(-7, 8, (6, 40, 3), dtype=torch.int8)
    scale = torch.rand(6) + 0.1
    for part in (q[:, :33], q[:, 33:], q[:, 5:6], q[::2], q[:, ::2], q[:0], q[:, :0]):
        ours = torch.ops.ocs.dequantize(part, scale[: part.shape[0]])
        assert_same(ours.numpy(), reference.dequantize(part.numpy(), scale[: part.shape[0]].numpy()))
        assert ours.is_contiguous()


@pytest.mark.parametrize("bits", [0xFFC00000, 0xFFC00001, 0x7FC00123])
def test_an_error_that_is_no_number_has_the_same_bits_everywhere(isa: str, bits: int) -> None:
    w = np.full((2, 9), bits, np.uint32).view(np.float32)
    error = _C.weight_error(w, np.zeros((2, 9), np.int8), np.ones((), np.float32), np.arange(9), 1)
    assert [hex(n) for n in np.asarray(error).view(np.uint64)] == [hex(0x7FF8 << 48)] * 2
