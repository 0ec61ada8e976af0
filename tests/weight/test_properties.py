"""What holds for any weight: of splitting, rounding, packing, saving, and of numbers that are scaled or permuted."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

import ocs
from ocs import _C, functional
from ocs.kernels import ops

few = settings(max_examples=60, deadline=None, derandomize=True)
BITS = st.integers(2, 8)
VALUES = st.floats(-1000, 1000, width=32)
WEIGHTS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=7), elements=VALUES)
SCHEMES = st.fixed_dictionaries({
    "bits": BITS,
    "r": st.sampled_from([0, 0.05, 0.3, 1.0]),
    "granularity": st.sampled_from(["tensor", "channel"]),
    "split": st.sampled_from(["qa", "naive", "even"]),
})  # fmt: skip


def folded(w: np.ndarray, **scheme: Any) -> tuple[np.ndarray, functional.QuantizedWeight]:
    quantized = functional.quantize_weight(w, **scheme)
    return functional.fold(quantized, w.shape[1], scheme.get("groups", 1)), quantized


def per_output(scale: np.ndarray, w: np.ndarray) -> np.ndarray:
    return scale.astype(np.float64).reshape(-1, *[1] * (w.ndim - 1))


@few
@given(w=WEIGHTS, scheme=SCHEMES, groups=st.integers(1, 3))
def test_folding_adds_up_what_was_split(w: np.ndarray, scheme: dict[str, Any], groups: int) -> None:
    """And of quantization-aware splits nothing is lost but what rounding to the grid loses."""
    w = np.concatenate([w] * groups)
    w_hat, (ints, scale, source, _) = folded(w, groups=groups, **scheme)
    sums = np.zeros(w.shape, np.int64)
    outputs, own = len(w) // groups, source.reshape(groups, -1) % w.shape[1]
    for g in range(groups):
        for j, channel in enumerate(own[g]):
            sums[g * outputs : (g + 1) * outputs, channel] += ints[g * outputs : (g + 1) * outputs, j]
    d = per_output(scale, w)
    np.testing.assert_array_equal(w_hat, (sums.astype(np.float32) * d.astype(np.float32)) + np.float32(0))
    if scheme["split"] != "naive" and (d > 1e-35).all():
        assert (np.abs(sums - w / d) <= 0.5 + 1e-6 * np.abs(w / d)).all()


@few
@given(w=WEIGHTS, bits=BITS, data=st.data())
def test_packing_loses_no_bit(w: np.ndarray, bits: int, data: st.DataObject) -> None:
    """Of files and of products, by every instruction set."""
    outputs, inputs = len(w), w[0].size
    most = 2 ** (bits - 1) - 1
    ints = data.draw(hnp.arrays(np.int8, (outputs, inputs), elements=st.integers(-most, most)))
    of_files, of_products = set(), set()
    before = ops.isa()
    for name in ops.isas():
        ops.set_isa(name)
        gapless, tiles = _C.pack(ints, bits), _C.product_pack(ints, bits)
        np.testing.assert_array_equal(_C.unpack(gapless, outputs * inputs, bits).reshape(outputs, inputs), ints)
        np.testing.assert_array_equal(_C.product_unpack(tiles, outputs, inputs, bits), ints)
        of_files.add(gapless.tobytes())
        of_products.add(tiles.tobytes())
    ops.set_isa(before)
    assert len(of_files) == len(of_products) == 1
    assert len(gapless) == -(-outputs * inputs * bits // 8)


@few
@given(w=WEIGHTS, scheme=SCHEMES, data=st.data())
def test_permuted_channels_give_the_permuted_weight(w: np.ndarray, scheme: dict[str, Any], data: st.DataObject) -> None:
    """But for ties between channels, of which the first is split."""
    halvings = np.frexp(np.abs(w).max(axis=(0, *range(2, w.ndim))))[0]
    if scheme["split"] == "even":  # a third of one may be a fifth of another
        assume(scheme["r"] * w.shape[1] <= 1 and len({*np.abs(w).max(axis=(0, *range(2, w.ndim)))}) == w.shape[1])
    assume(len({*halvings}) == len(halvings))
    inputs = np.array(data.draw(st.permutations(range(w.shape[1]))))
    outputs = np.array(data.draw(st.permutations(range(len(w)))))
    w_hat, quantized = folded(w, **scheme)
    again, permuted = folded(np.ascontiguousarray(w[outputs][:, inputs]), **scheme)
    np.testing.assert_array_equal(again, w_hat[outputs][:, inputs])
    np.testing.assert_array_equal(np.sort(inputs[permuted.source]), np.sort(quantized.source))
    np.testing.assert_array_equal(
        np.broadcast_to(quantized.scale, len(w))[outputs], permuted.scale + np.zeros(len(w), "f4")
    )


@few
@given(w=WEIGHTS, scheme=SCHEMES, power=st.integers(-40, 40),
       clip=st.sampled_from(["none", 0.7, "auto", *functional.METHODS]),
       rounding=st.sampled_from(["nearest", "squant"]))  # fmt: skip
def test_weights_times_a_power_of_two_have_the_same_integers(
    w: np.ndarray, scheme: dict[str, Any], power: int, clip: str, rounding: str
) -> None:
    w = np.where(np.abs(w) < 2.0**-20, np.float32(0), w)  # so that no number becomes subnormal
    scheme["rounding"] = "nearest" if scheme["split"] == "naive" else rounding
    ints, scale, source, threshold = functional.quantize_weight(w, clip=clip, **scheme)
    again = functional.quantize_weight(np.ldexp(w, power), clip=clip, **scheme)
    np.testing.assert_array_equal(again.ints, ints)
    np.testing.assert_array_equal(again.source, source)
    np.testing.assert_array_equal(again.threshold, np.ldexp(threshold, power))
    some = threshold > 0  # else the scale is 1
    np.testing.assert_array_equal(again.scale[some], np.ldexp(scale, power)[some])


@few
@given(x=hnp.arrays(np.float32, st.integers(1, 300), elements=VALUES), signed=st.booleans(),
       method=st.sampled_from(["none", "percentile", "std", "aciq"]))  # fmt: skip
def test_thresholds_grow_with_bits(x: np.ndarray, signed: bool, method: str) -> None:
    found = [functional.clip_threshold(x, bits, method, signed) for bits in range(2, 9)]
    assert found == sorted(found)


@few
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from(["normal", "laplace"]), signed=st.booleans())
def test_optima_grow_with_bits(seed: int, shape: str, signed: bool) -> None:
    """Of values as weights have them; the optimum of a sample jitters, and that of two values falls at times."""
    x = getattr(np.random.default_rng(seed), shape)(size=4000).astype(np.float32)
    for method, jitter in (("sawb", 0), ("mse", 0.03)):
        found = [functional.clip_threshold(x, bits, method, signed) for bits in range(2, 9)]
        assert all(wide >= narrow * (1 - jitter) for narrow, wide in pairwise(found)), method


@settings(max_examples=25, deadline=None, derandomize=True)
@given(scheme=SCHEMES, kind=st.sampled_from(["linear", "conv", "grouped", "lstm"]), seed=st.integers(0, 99),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), expand=st.booleans(),
       packed=st.booleans())  # fmt: skip
def test_what_is_loaded_is_what_was_saved(
    scheme: dict[str, Any], kind: str, seed: int, dtype: torch.dtype, expand: bool, packed: bool
) -> None:
    def make() -> nn.Module:
        torch.manual_seed(seed)
        layers = {"linear": nn.Linear(9, 5), "conv": nn.Conv2d(4, 6, 3), "grouped": nn.Conv1d(4, 6, 3, groups=2)}
        return nn.Sequential(layers.get(kind) or nn.LSTM(5, 7)).to(dtype)

    model, bits = make(), scheme.pop("bits")
    ocs.quantize(model, wbits=bits, skip=None, expand=expand, **scheme)
    with tempfile.TemporaryDirectory() as folder:
        ocs.save(model, Path(folder) / "m")
        loaded = ocs.load(Path(folder) / "m", make(), packed=packed)
    expected = (ocs.pack(model) if packed else model).state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert repr(loaded) == repr(model)
