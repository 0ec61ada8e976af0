"""The tensor-level API: contract, dtypes, layouts, and one clear exception for each bad input."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import outlier_weight

from ocs import functional as F
from ocs.kernels import reference

W = outlier_weight((12, 30, 3, 3))


def numpy_of(x: object) -> np.ndarray:
    return x.numpy() if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("split", ["qa", "naive", "even"])
@pytest.mark.parametrize(("r", "groups", "copies"), [(0, 1, 0), (0.05, 1, 2), (1, 1, 30), (0.1, 3, 9)])
def test_quantize_weight(kind, granularity: str, split: str, r: float, groups: int, copies: int) -> None:
    q = F.quantize_weight(kind(W), 5, r, granularity=granularity, split=split, groups=groups)
    channels = 30 * groups
    assert all(type(part) is type(kind(W)) for part in q)
    ints, scale, source, threshold = map(numpy_of, q)
    assert (ints.dtype, scale.dtype, source.dtype, threshold.dtype) == ("i1", "f4", "i8", "f4")
    assert ints.shape == (12, 30 + copies // groups, 3, 3)
    assert scale.shape == threshold.shape == (() if granularity == "tensor" else (12,))
    assert source.shape == (channels + copies,)
    per_group = source.reshape(groups, -1)
    assert per_group[:, :30].ravel().tolist() == list(range(channels))
    assert (per_group // 30 == np.arange(groups)[:, None]).all()
    np.testing.assert_array_equal(scale, threshold / np.float32(15))
    assert np.abs(ints).max() == 15
    plan = reference_plan(r, groups, split == "even")
    expected = reference.quantize_weight(W, scale, *plan[:3], groups, 5, split != "naive")
    np.testing.assert_array_equal(ints, expected)


def reference_plan(r: float, groups: int, even: bool = False) -> reference.Plan:
    return reference.split_plan(reference.channel_max(W, groups), groups, F.splits_for(r, W.shape[1], groups), even)


def test_splitting_narrows_the_grid_and_helps() -> None:
    """The point of the paper: a smaller threshold without saturating anything; exact splits beat naive ones."""
    q = {(r, split): F.quantize_weight(W, 4, r, split=split) for r in (0, 0.1) for split in ("qa", "naive")}
    noise = {key: F.weight_error(W, value)[1] for key, value in q.items()}
    assert q[0.1, "qa"].threshold < q[0, "qa"].threshold
    assert noise[0.1, "qa"] < noise[0.1, "naive"] < noise[0, "naive"] == noise[0, "qa"]


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(("r", "groups", "clip"), [(0, 1, "none"), (0.1, 3, "none"), (0.1, 1, "mse"), (0, 1, "kl")])
def test_squant_changes_the_integers_alone(kind, granularity: str, r: float, groups: int, clip: str) -> None:
    """The same scale and splits; output channels sum to what they were, within half a step where nothing saturates."""
    nearest, q = (F.quantize_weight(kind(W), 4, r, clip, granularity, rounding=rounding, groups=groups)
                  for rounding in ("nearest", "squant"))  # fmt: skip
    ints, scale, *_ = map(numpy_of, q)
    assert all((numpy_of(a) == numpy_of(b)).all() for a, b in zip(q[1:], nearest[1:], strict=True))
    expected = reference.squant_weight(W, scale, *reference_plan(r, groups)[:3], groups, 4)
    np.testing.assert_array_equal(ints, expected)
    assert (ints != numpy_of(nearest.ints)).any()
    if clip == "none":
        error = (numpy_of(F.fold(q, 30, groups)) - W).sum((1, 2, 3), dtype=np.float64) / scale
        assert np.abs(error).max() < 0.501


def test_clip_lowers_the_threshold_and_saturates() -> None:
    q, whole = F.quantize_weight(W, 4, 0.1, clip=0.5), F.quantize_weight(W, 4, 0.1)
    assert q.threshold == whole.threshold * np.float32(0.5)
    assert (np.abs(q.ints) == 7).sum() > (np.abs(whole.ints) == 7).sum()


@pytest.mark.parametrize(
    ("r", "channels", "groups", "expected"),
    [(0.07, 100, 1, 7), (0.01, 3, 1, 1), (0, 50, 1, 0), (1, 7, 1, 7), (0.1, 30, 1, 3), (0.1 + 0.2, 10, 1, 3),
     (0.29, 100, 1, 29), (0.02, 650, 1, 13), (0.5, 1, 1, 1), (0.5, 1, 8, 0), (0.5, 2, 8, 1), (0.5, 0, 1, 0)],
)  # fmt: skip
def test_number_of_splits(r: float, channels: int, groups: int, expected: int) -> None:
    assert F.splits_for(r, channels, groups) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    w = torch.from_numpy(W).to(dtype)
    for ours, plain in zip(F.quantize_weight(w, 5, 0.1), F.quantize_weight(w.float(), 5, 0.1), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)
    x = F.fake_quantize(w, 0.1, 4)
    assert x.dtype == dtype
    torch.testing.assert_close(x, F.fake_quantize(w.float(), 0.1, 4).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_other_float_types_of_numpy(dtype: type) -> None:
    w = W.astype(dtype)
    np.testing.assert_array_equal(F.quantize_weight(w, 5, 0.1).ints, F.quantize_weight(w.astype("f4"), 5, 0.1).ints)
    x = F.fake_quantize(w, 0.1, 4)
    assert x.dtype == dtype
    np.testing.assert_array_equal(x, F.fake_quantize(w.astype("f4"), 0.1, 4).astype(dtype))


VIEWS = {
    "transposed": lambda t: t.transpose(0, 1),
    "strided": lambda t: t[::2, ::3],
    "flipped": lambda t: t.flip(0),
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "broadcast": lambda t: t[:1].expand(6, -1, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_layout(view) -> None:
    w = view(torch.from_numpy(W))
    plain = w.clone(memory_format=torch.contiguous_format)
    assert torch.equal(F.quantize_weight(w, 5, 0.1).ints, F.quantize_weight(plain, 5, 0.1).ints)
    assert torch.equal(F.fake_quantize(w, 0.1, 4), F.fake_quantize(plain, 0.1, 4))
    assert F.histogram(w, 64)[0].equal(F.histogram(plain, 64)[0])


def test_fake_quantize_keeps_channels_last() -> None:
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    assert F.fake_quantize(x, 0.1, 8).stride() == x.stride()
    assert F.fake_quantize(x.half(), 0.1, 8).stride() == x.stride()


def test_zero_size_and_scalars() -> None:
    for shape in [(0, 4), (4, 0), (0, 3, 3, 3), (5, 3, 0)]:
        q = F.quantize_weight(torch.zeros(shape), 4, 0.5)
        assert q.ints.shape == (shape[0], shape[1] + math.ceil(shape[1] / 2), *shape[2:])
        assert q.scale == 1
    assert F.fake_quantize(torch.tensor(0.26), 0.5, 4) == 0.5
    assert F.fake_quantize(np.float32([[]]), 0.5, 4).shape == (1, 0)
    vast = torch.zeros(2**40, 0)
    assert F.quantize_weight(vast, 8).ints.shape == (2**40, 0)
    assert F.dequantize(vast.to(torch.int8), 1.0).shape == (2**40, 0)
    assert F.quantize_weight(torch.zeros(2**40, 2, 0), 8, 1.0).ints.shape == (2**40, 4, 0)
    counts, limit = F.histogram(torch.zeros(0), 4)
    assert (counts.tolist(), limit) == ([0, 0, 0, 0], 0.0)


def test_constant_weights_have_a_usable_scale() -> None:
    zeros = F.quantize_weight(torch.zeros(3, 4), 8, 1.0)
    assert (zeros.scale, zeros.threshold, zeros.ints.abs().sum()) == (1, 0, 0)
    per_channel = F.quantize_weight(torch.tensor([[0.0, 0.0], [3.0, 3.0]]), 3, granularity="channel")
    assert (per_channel.scale.tolist(), per_channel.ints.tolist()) == ([1, 1], [[0, 0], [3, 3]])
    for kind in (torch.from_numpy, np.asarray):
        tiny = F.quantize_weight(kind(np.full((2, 3), 1e-44, np.float32)), 8)
        assert 0 < tiny.scale < 1e-44
        assert tiny.ints.tolist() == [[7] * 3] * 2


def test_fold_and_dequantize() -> None:
    q = F.quantize_weight(torch.from_numpy(W), 6, 0.2)
    folded = F.fold(q, 30)
    assert folded.shape == W.shape
    x = torch.randn(4, 30, 3, 3)
    expanded = (F.dequantize(q.ints, q.scale) * x[0].index_select(0, q.source)).sum((1, 2, 3))
    torch.testing.assert_close((folded * x[0]).sum((1, 2, 3)), expanded)
    assert F.sqnr_db(*F.weight_error(torch.from_numpy(W), q)) == pytest.approx(
        10 * math.log10((W**2).sum() / ((W - folded.numpy()) ** 2).sum()), abs=1e-3
    )


def test_sqnr_of_exact_and_of_nothing() -> None:
    assert F.sqnr_db(1.0, 0.0) == math.inf
    assert F.sqnr_db(0.0, 1.0) == -math.inf


def test_clip_threshold_and_histogram() -> None:
    x = np.float32([[-4, 1], [2, 0]])
    assert F.clip_threshold(x, 4, "none") == 4
    assert F.clip_threshold(torch.from_numpy(x), 4, 0.25) == 1
    counts, limit = F.histogram(x, 4)
    assert (counts.tolist(), limit) == ([1, 1, 1, 1], 4.0)


def test_straight_through_gradient_is_torchs_own() -> None:
    x = (2 * torch.randn(1000)).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    weights = torch.randn(1000)
    (F.fake_quantize(x, 0.25, 4) * weights).sum().backward()
    (torch.fake_quantize_per_tensor_affine(twin, 0.25, 0, -7, 7) * weights).sum().backward()
    assert torch.equal(x.grad, twin.grad)
    assert 0 < (x.grad == 0).sum() < 500


def test_unsigned_activations() -> None:
    x = np.float32([-1, 0, 0.1, 7.6, 100])
    assert F.quantize(x, 0.5, 4, signed=False).tolist() == [0, 0, 0, 15, 15]
    assert F.quantize(x, 0.5, 8, signed=False).dtype == np.uint8
    assert F.dequantize(F.quantize(x, 0.5, 8, signed=False), 0.5).tolist() == [0, 0, 0, 7.5, 100]


BAD_WEIGHTS = [
    (lambda: F.quantize_weight([[1.0]], 4), TypeError, "w must be a numpy array or torch tensor .* not list"),
    (lambda: F.quantize_weight(np.ones((2, 2), int), 4), TypeError, "not ndarray of int64"),
    (lambda: F.quantize_weight(torch.ones(2, 2, dtype=torch.complex64), 4), TypeError, "not Tensor of torch.complex64"),
    (lambda: F.quantize_weight(torch.ones(2, 2).to_sparse(), 4), TypeError, "to_dense"),
    (lambda: F.quantize_weight(torch.ones(5), 4), ValueError, r"w has shape \(5,\): at least 2 dimensions"),
    (lambda: F.quantize_weight(torch.ones(()), 4), ValueError, r"w has shape \(\)"),
    (lambda: F.quantize_weight(W, 9), ValueError, "bits=9: use an integer from 2 to 8"),
    (lambda: F.quantize_weight(W, 4.0), ValueError, "bits=4.0"),
    (lambda: F.quantize_weight(W, True), ValueError, "bits=True"),
    (lambda: F.quantize_weight(W, 4, 1.5), ValueError, "r=1.5: use a number from 0"),
    (lambda: F.quantize_weight(W, 4, math.nan), ValueError, "r=nan"),
    (lambda: F.quantize_weight(W, 4, -0.1), ValueError, "r=-0.1"),
    (lambda: F.quantize_weight(W, 4, clip="msee"), ValueError, "clip='msee': use \"none\""),
    (lambda: F.quantize_weight(W, 4, clip=0), ValueError, "clip=0"),
    (lambda: F.quantize_weight(W, 4, granularity="row"), ValueError, "granularity='row': use 'tensor' or 'channel'"),
    (lambda: F.quantize_weight(W, 4, split="half"), ValueError, "split='half': use 'qa' or 'naive'"),
    (lambda: F.quantize_weight(W, 4, rounding="up"), ValueError, "rounding='up': use 'nearest'"),
    (lambda: F.quantize_weight(W, 4, split="naive", rounding="squant"), ValueError,
     "rounding='squant' with split='naive': .* use split='qa'"),
    (lambda: F.quantize_weight(W, 4, groups=5), ValueError, "groups=5: .* divides the 12 output channels"),
    (lambda: F.quantize_weight(W, 4, groups=0), ValueError, "groups=0"),
    (lambda: F.quantize_weight(np.float32([[1, np.nan]]), 4), ValueError, "NaN or Inf .*channel 1"),
    (lambda: F.quantize_weight(torch.tensor([[1, -math.inf]]), 4), ValueError, "NaN or Inf .*channel 1"),
    (lambda: F.quantize_weight(torch.full((2, 2), 1e300, dtype=torch.float64), 4), ValueError, "NaN or Inf"),
    (lambda: F.fake_quantize(W, 0.0, 4), ValueError, "scale=0.0: use a positive finite number"),
    (lambda: F.fake_quantize(W, math.inf, 4), ValueError, "scale=inf"),
    (lambda: F.fake_quantize(W, "1", 4), ValueError, "scale='1'"),
    (lambda: F.fake_quantize(torch.ones(2), torch.ones(2), 4), ValueError, r"scale has shape \(2,\): use one number"),
    (lambda: F.fake_quantize(torch.ones(2), 1.0, 1), ValueError, "bits=1"),
    (lambda: F.fake_quantize(torch.ones(2), torch.tensor(0.0), 8), ValueError, "use a positive finite number"),
    (lambda: F.fake_quantize(torch.ones(2), torch.tensor(1), 8), ValueError, "use a positive finite number"),
    (lambda: F.fake_quantize(torch.ones(2), 1e-60, 8), ValueError, "scale=1e-60"),
    (lambda: F.fake_quantize(W, 1e-60, 8), ValueError, "scale=1e-60"),
    (lambda: F.fake_quantize(W, 1e60, 8), ValueError, "scale=1e\\+60"),
    (lambda: F.fold(F.quantize_weight(torch.ones(3, 4), 8), 9), ValueError, "channels=9: .* at most the 4"),
    (lambda: F.fold(F.quantize_weight(W, 8), 30, groups=5), ValueError, "groups=5"),
    (lambda: F.quantize_weight(torch.ones(3, 4, device="meta"), 8), ValueError, "w is a meta tensor"),
    (lambda: F.histogram(torch.ones(3, device="meta"), 8), ValueError, "x is a meta tensor"),
    (lambda: F.quantize_weight(W, 4, groups=True), ValueError, "groups=True"),
    (lambda: F.fake_quantize(torch.ones(2, dtype=torch.int8), 1.0, 4), TypeError, "x must be"),
    (lambda: F.quantize(np.float32([np.nan]), 1.0, 4), ValueError, "NaN"),
    (lambda: F.quantize(torch.tensor([math.nan]), 1.0, 4), ValueError, "NaN"),
    (lambda: F.dequantize(np.ones(3), 1.0), TypeError, "q must be an int8 or uint8"),
    (lambda: F.dequantize(np.ones((3, 2), np.int8), np.ones(2)), ValueError, r"scale has shape \(2,\)"),
    (lambda: F.histogram(W, 0), ValueError, "bins=0: use an integer from 1"),
    (lambda: F.histogram(np.float32([np.inf]), 4), ValueError, "x holds NaN or Inf"),
    (lambda: F.clip_threshold(np.float32([np.nan]), 4, "none"), ValueError, "x holds NaN or Inf"),
    (lambda: F.clip_threshold(W, 4, "entropy"), ValueError, "method='entropy'"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD_WEIGHTS, ids=[case[2] for case in BAD_WEIGHTS])
def test_bad_input_is_one_clear_error(call, error: type[Exception], message: str) -> None:
    with np.errstate(over="ignore"), pytest.raises(error, match=message):
        call()


ONCE_HERE = """
AUTO CHANNEL_BINS CLIP_METHODS GAIN METHODS SMALLEST TINY Array Granularity How Quantization QuantizedWeight
Rounding Select Split SplitPlan check_array check_bits check_choice check_clip check_groups check_moments
check_ratio check_rounding check_select check_values choose_splits clip_threshold dequantize fake_quantize
fold histogram output_error output_power plan_channels plan_splits qmax quantize quantize_plan quantize_split
quantize_weight remaining_error scale_for search_threshold signal_and_noise split_thresholds splits_for
sqnr_db weight_error zeros
"""


@pytest.mark.parametrize("name", [*ONCE_HERE.split(), *F.__all__])
def test_names_that_were_here_once_still_are(name: str) -> None:
    assert getattr(F, name) is not None


def test_a_name_that_never_was_here() -> None:
    with pytest.raises(AttributeError, match=r"module 'ocs\.functional' has no attribute 'quantise'"):
        F.quantise  # noqa: B018
    assert F.How is F.Scheme
    assert F.zeros(np.float32([0, 1, 0])) == 2
    assert F.search_threshold(np.array([0, 0, 5]), np.array(3, np.float32), 4, "percentile", True) <= 3
