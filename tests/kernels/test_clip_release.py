"""Clip thresholds as the paper's release computes them: of values, of unsplit weights, of calibrated inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import outlier_weight
from test_clip import samples
from test_kernels import both

import ocs
from ocs import _C, functional
from ocs.calibration.statistics import Statistics
from ocs.kernels import composite, reference
from ocs.kernels.constants import CLIP_METHODS, RELEASE_METHODS

ONCE = np.zeros(0, np.int64)
NUMBERS = [CLIP_METHODS.index(method) for method in RELEASE_METHODS]
PUBLISHED = ("mse-release", "aciq-release", "kl-release")
NORMAL = {8: (3.5592, 3.2101, 3.4713), 6: (3.2290, 2.6133, 3.6619), 4: (2.5318, 3.2035, 3.6546)}
LAPLACE = {8: (9.2650, 8.6164, 10.2944), 6: (7.3090, 6.2060, 8.4433), 4: (4.7354, 5.2075, 7.3120)}


def draw(kind: str) -> np.ndarray:
    rng = np.random.default_rng(10 if kind == "normal" else 11)
    return (rng.normal(size=20000) if kind == "normal" else rng.laplace(size=20000)).astype(np.float32)


@pytest.mark.parametrize(("kind", "bits", "values"), [
    (kind, bits, values) for kind, table in (("normal", NORMAL), ("laplace", LAPLACE)) for bits, values in table.items()
])  # fmt: skip
def test_values_of_the_release(isa: str, threads: int, kind: str, bits: int, values: tuple[float, ...]) -> None:
    x = draw(kind)
    for array in (x, torch.from_numpy(x), x.reshape(100, 200).T):
        found = [functional.clip_threshold(array, bits, method) for method in PUBLISHED]
        assert [round(each, 4) for each in found] == pytest.approx(values, abs=1e-9)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("kind", ["gauss", "student", "relu", "sparse"])
def test_thresholds_equal_their_twin(kind: str, number: int) -> None:
    """Rows of their own; how often a value is there, as if it were there so often. The twin of kl is slow at 8 bits."""
    x, often = samples(kind, 3 * 1500).reshape(3, 1500) + np.float32(0.1), np.arange(4500) % 4
    for bits, signed in ((2, True), (4, True), (4, False)):
        for rows, counts in ((x, ONCE), (x[:1], often[:1500]), (x[:, :2], ONCE)):
            ours = both("release_threshold", rows, counts, bits, signed, number)
            np.testing.assert_allclose(ours, reference.release_threshold(rows, counts, bits, signed, number), rtol=1e-6)
        repeated = np.repeat(x.ravel(), often)[None]
        once = both("release_threshold", repeated, ONCE, bits, signed, number)
        np.testing.assert_allclose(once, _C.release_threshold(x.reshape(1, -1), often, bits, signed, number), rtol=1e-6)
    ours, twin = (each.release_threshold(x[:1], ONCE, 8, kind != "relu", number) for each in (_C, reference))
    np.testing.assert_allclose(ours, twin, rtol=1e-6)


def test_bins_are_those_of_numpy() -> None:
    """Values on the edges, where a quotient may be a bin off: the error of each candidate rests on them."""
    for low, high in ((-1.0, 1.0), (-0.7, 1.3), (0.1, 0.3)):
        x = np.linspace(low, high, 202).astype(np.float32)
        for bits in (2, 3, 4):
            for number in NUMBERS:
                ours = _C.release_threshold(x[None], ONCE, bits, True, number)
                np.testing.assert_allclose(ours, reference.release_threshold(x[None], ONCE, bits, True, number), 1e-6)


@pytest.mark.parametrize("method", RELEASE_METHODS)
def test_extremes(method: str) -> None:
    """A threshold is positive and finite wherever there is a value that is not zero."""
    for values in ([0.7] * 9, [-3], [3e38, -3e38, 1], [3e38] * 3, [1e-25, -2e-25], [1e-40], [0, 1e-44], [1, 0, 0, 0]):
        x = np.float32(values)
        for bits, signed in ((2, True), (8, True), (8, False)):
            threshold = functional.clip_threshold(x, bits, method, signed)
            assert 0 < threshold < np.inf
            assert threshold == functional.clip_threshold(torch.from_numpy(x), bits, method, signed)
    assert functional.clip_threshold(np.zeros(5, np.float32), 4, method) == 0
    assert functional.clip_threshold(np.zeros(0, np.float32), 4, method) == 0
    assert functional.quantize_weight(np.zeros((0, 3), np.float32), 4, clip=method).threshold == 0
    with pytest.raises(ValueError, match="NaN or Inf"):
        _C.release_threshold(np.float32([[1, np.nan]]), ONCE, 4, True, CLIP_METHODS.index(method))


def test_a_constant_is_clipped_as_published() -> None:
    """By mse at 0.99 of it; aciq's sigma and b are 0 and give none; where every q of kl is zero, at the first slice."""
    x = np.full(1000, 0.7, np.float32)
    found = [functional.clip_threshold(x, 8, method) for method in PUBLISHED]
    assert found == pytest.approx([0.99 * 0.7, 0.7, 0.7 * 255 / 1001])


def test_aciq_may_exceed_the_largest() -> None:
    x = samples("gauss", 300)
    assert functional.clip_threshold(x, 8, "aciq-release") > np.abs(x).max()


def test_histograms_of_magnitudes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"aciq-release.*takes the values themselves"):
        functional.search_threshold(np.ones(4, np.int64), np.float32(1), 4, "aciq-release", True)


# --- Weights and inputs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("method", RELEASE_METHODS)
def test_weights_are_clipped_as_they_were_before_splitting(method: str, kind: object) -> None:
    w = outlier_weight((16, 30, 3, 3))
    for groups in (1, 2):
        quantized = functional.quantize_weight(kind(w), 5, 0.1, clip=method, groups=groups)
        assert float(quantized.threshold) == functional.clip_threshold(w, 5, method)
        by_channel = functional.quantize_weight(kind(w), 5, 0.1, clip=method, granularity="channel", groups=groups)
        assert by_channel.threshold.tolist() == [functional.clip_threshold(row, 5, method) for row in w]


@pytest.mark.parametrize("method", RELEASE_METHODS)
def test_layers_and_their_inputs(method: str) -> None:
    """Through quantize(), with splits; the report and the layer say which method it was."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(40, 8)), torch.randn(500, 40) + 0.3
    w = model[0].weight.detach().clone()
    report = ocs.quantize(
        model, wbits=5, r=0.1, clip=method, abits=6, act_clip=method, act_r=0.05, calibration=[x], skip=None
    )
    assert float(model[0].scale) == pytest.approx(functional.clip_threshold(w, 5, method) / 15, rel=1e-6)
    assert float(model[0].input_scale) == pytest.approx(functional.clip_threshold(x, 6, method) / 31, rel=0.02)
    assert report.settings["clip"] == report.settings["act_clip"] == method


@pytest.mark.parametrize("method", RELEASE_METHODS)
@pytest.mark.parametrize("shift", [0.0, 0.7, -2.5])
def test_inputs_are_those_of_all_batches(method: str, shift: float) -> None:
    """From a fine histogram of either sign: number, zeros, smallest and largest are exact, thresholds nearly so."""
    x = torch.from_numpy(samples("student", 60_000)).reshape(-1, 6) + shift
    x[::7] = 0
    whole, left, right = (Statistics(-1) for _ in range(3))
    for statistics, batches in ((whole, [x]), (left, x[:6000].split(999)), (right, [x[6000:] * 0, x[6000:]])):
        for batch in batches:
            statistics.update(batch)
    left.merge(right)
    values, counts = whole.representatives()
    there = values[counts > 0]
    assert (int(counts.sum()), int(counts.min()), there.min(), there.max()) == (x.numel(), 0, x.min(), x.max())
    assert torch.equal(whole.negative, left.negative)
    assert (whole.smallest, whole.highest) == (left.smallest, max(left.highest, whole.highest))
    for bits in (4, 8):
        exact = functional.clip_threshold(x, bits, method)
        assert whole.threshold(bits, method, True) == pytest.approx(exact, rel=0.011)


def test_few_inputs_stand_for_themselves() -> None:
    for values in ([-3.0], [0.5, 0.5], [-7.25, 0.0, 0.0, 2.0], [1e-38, 4.0], [-1.0, -1.0 - 2**-20], [0.25, -0.25]):
        statistics = Statistics(-1)
        statistics.update(torch.tensor([values]))
        found, counts = statistics.representatives()
        assert int(counts.sum()) == len(values)
        assert (counts >= 0).all()
        torch.testing.assert_close(found[counts > 0].unique(), torch.tensor(sorted(set(values))), rtol=1e-3, atol=1e-30)


def test_oracle_inputs_and_other_devices() -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(40, 8)), torch.randn(50, 40)
    ocs.quantize(model, abits=4, act_split="oracle", act_clip="mse-release", act_r=0.1, skip=None)
    assert model(x).isfinite().all()
    args = (x, torch.zeros(0, dtype=torch.int64), 4, True, NUMBERS[0])
    assert torch.equal(composite.release_threshold(*args), torch.ops.ocs.release_threshold(*args))
