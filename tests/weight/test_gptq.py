"""Rounding by second moments: equal to its twin, worth its data, and right about what each weight meets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Everything, SmallNet, assert_unchanged, outlier_weight, state
from torch import Tensor, nn

import ocs
from ocs import _C, functional
from ocs.kernels import composite, reference
from ocs.nn.registry import replacement_of
from ocs.weight import hessian as hessians
from ocs.weight.apply_plan import AUTO, FEW, RISING
from ocs.weight.error import MeasuredOutputs, remaining_error
from ocs.weight.hessian import Hessian

pytestmark = pytest.mark.usefixtures("one_thread")


def correlated(groups: int, columns: int, count: int = 400, seed: int = 0) -> np.ndarray:
    """Second moments of inputs that go together and have a mean, float64 [groups, columns, columns]."""
    generator = np.random.default_rng(seed)
    mixed = generator.standard_normal((groups, count, columns)) @ generator.standard_normal((groups, columns, columns))
    x = np.maximum(mixed, 0) * generator.exponential(1, columns)
    return x.swapaxes(1, 2) @ x


def of_kernels(plan: functional.SplitPlan) -> tuple:
    """What the kernels take of a plan."""
    return plan.source, plan.parts, plan.offset


def quantized(w: Any, bits: int, r: float = 0.0, **options: Any) -> functional.QuantizedWeight:
    return functional.quantize_weight(w, bits, r, rounding="gptq", **options)


def error(w: np.ndarray, q: functional.QuantizedWeight, H: np.ndarray) -> float:  # noqa: N803
    d = functional.fold(q, w.shape[1], len(H)).astype(np.float64) - w
    d = d.reshape(len(H), -1, H.shape[1])
    return float((d @ H * d).sum())


# --- The integers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(
    ("shape", "groups"), [((6, 8, 3), 1), ((6, 40), 1), ((6, 5, 3, 2), 3), ((4, 1, 9), 4), ((3, 150), 1)]
)
def test_it_equals_its_twin(kind, granularity: str, shape: tuple[int, ...], groups: int) -> None:
    """Which inverts H and takes out column after column; with splits, with clipping, beyond one block of columns."""
    w, H = outlier_weight(shape), correlated(groups, int(np.prod(shape[1:])))
    for bits, r, clip in ((2, 0.0, "none"), (3, 0.4, "none"), (4, 0.2, 0.3), (8, 1.0, "mse")):
        split = "even" if r == 1 else "qa"
        q = quantized(kind(w), bits, r, clip=clip, granularity=granularity, split=split, groups=groups, moments=kind(H))
        assert all(type(part) is type(kind(w)) for part in q)
        ints, scale = np.asarray(q.ints), np.asarray(q.scale)
        plan = functional.plan_splits(w, r, groups, split=split)
        np.testing.assert_array_equal(ints, reference.gptq_weight(w, scale, *of_kernels(plan), groups, bits, H))
        nearest = functional.quantize_weight(w, bits, r, clip, granularity, split, groups=groups)
        np.testing.assert_array_equal(scale, nearest.scale)
        assert (ints != nearest.ints).any()


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("gptq_weight", [torch.ops.ocs.gptq_weight, composite.gptq_weight], ids=["C", "torch"])
def test_parts_add_up(gptq_weight: Callable, bits: int, even: bool) -> None:
    """A column's error is that of what nearest rounding makes of it, at every integer, number of parts and saturation.

    The next column, which is zeros, takes all of it over with the other sign.
    """
    most, one = 2 ** (bits - 1) - 1, torch.ones(())
    factor = torch.tensor([[[0.0, 0], [1, 0]]])
    for splits in range(9):
        plan = [torch.from_numpy(x) for x in reference.split_plan(np.float32([1, 2**-20]), 1, splits, even)[:3]]
        whole = torch.arange(-40 * most, 40 * most + 1, dtype=torch.float32) + 0.25
        w = torch.stack([whole, torch.zeros_like(whole)], 1)
        nearest = torch.ops.ocs.quantize_weight(w, one, *plan, 1, bits, True)
        error = torch.ops.ocs.fold(nearest, one, plan[0], 1, 2)[:, 0] - whole
        ints, _ = gptq_weight(w, one, *plan, bits, torch.tensor([[0, 1]]), factor)
        own = [0, *range(2, len(plan[0]))]
        assert torch.equal(ints[:, own], nearest[:, own])
        assert torch.equal(ints[:, 1], (0.5 - error).floor().clamp(-most, most).to(torch.int8))


@pytest.mark.parametrize(("shape", "groups"), [((6, 8, 3), 1), ((36, 5, 3, 2), 2), ((3, 150), 1), ((50, 130), 1)])
@pytest.mark.parametrize("width", [7, 1000])
def test_other_devices_round_alike(shape: tuple[int, ...], groups: int, width: int) -> None:
    """In blocks and whole, with splits; what is computed on any device is what the C kernel computes."""
    w, N = torch.from_numpy(outlier_weight(shape)), int(np.prod(shape[1:]))
    rows = torch.from_numpy(correlated(groups, N))
    hessian = Hessian(torch.stack([torch.block_diag(*of_group) for of_group in rows[:, None]]))
    if width < N:
        hessian = Hessian(diagonal_blocks(rows, width))
    order, factor = hessian.factored(groups)
    plans = [functional.plan_splits(w, 0.3, groups), functional.plan_splits(w, 1.0, groups, split="even")]
    for plan, scale in product(plans, (w.abs().max() / 7, w.abs().flatten(1).amax(1) / 20)):
        args = (w, scale, *of_kernels(plan), 4, order, factor)
        (ints, error), (expected, lost) = torch.ops.ocs.gptq_weight(*args), composite.gptq_weight(*args)
        assert torch.equal(ints, expected)
        torch.testing.assert_close(error, lost, rtol=1e-4, atol=0)


def diagonal_blocks(H: Tensor, width: int) -> Tensor:  # noqa: N803
    """The blocks on the diagonals of H [G, N, N], zeros after the last, [G B, width, width]."""
    blocks = -(-H.shape[1] // width)
    H = torch.nn.functional.pad(H, (0, blocks * width - H.shape[1]) * 2)
    each = [part[i : i + width, i : i + width] for part in H for i in range(0, blocks * width, width)]
    return torch.stack(each)


def test_blocks_are_rounded_as_if_they_had_nothing_in_common() -> None:
    """To the bit as the twin does with zeros between them."""
    w, H = outlier_weight((20, 10, 3)), correlated(1, 30)
    plan, scale = functional.plan_splits(w, 0.2), np.asarray(np.abs(w).max() / 7, np.float32)
    apart = H * (np.arange(30)[:, None] // 12 == np.arange(30) // 12)
    blocks = diagonal_blocks(torch.from_numpy(H), 12)
    for b, columns in enumerate((slice(0, 12), slice(12, 24), slice(24, 30))):  # damped by their own mean
        own = apart[0, columns, columns].diagonal().mean() if b < 2 else H[0, columns, columns].diagonal().sum() / 12
        apart[0, columns, columns] += np.eye(len(apart[0, columns, columns])) * 0.03 * (own - H[0].diagonal().mean())
    order, factor = (each.numpy() for each in Hessian(blocks).factored(1))
    ours, lost = _C.gptq_weight(w, scale, *of_kernels(plan), 4, order, factor)
    np.testing.assert_array_equal(ours, reference.gptq_weight(w, scale, *of_kernels(plan), 1, 4, apart))
    d = (_C.fold(ours, scale, plan[0], 1, 10) - w).reshape(20, 30).astype(np.float64)
    damped = apart[0] + np.eye(30) * 0.03 * H[0].diagonal().mean()
    np.testing.assert_allclose(lost, (d @ damped * d).sum(1), rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("r", [0, 0.2])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_outputs_are_off_less(bits: int, r: float, granularity: str) -> None:
    """Than with nearest rounding: always, and by a third on average over weights and inputs."""
    ratios = []
    for seed in range(10):
        w, H = outlier_weight((8, 6, 3), seed), correlated(2, 18, seed=seed)
        ours = quantized(w, bits, r, granularity=granularity, groups=2, moments=H)
        nearest = functional.quantize_weight(w, bits, r, granularity=granularity, groups=2)
        ratios.append(error(w, ours, H) / error(w, nearest, H))
    assert np.exp(np.mean(np.log(ratios))) < 0.65
    assert max(ratios) < 1


@pytest.mark.parametrize(("r", "clip"), [(0, "none"), (0.3, "none"), (0.3, 0.3)])
def test_what_does_not_go_together_is_rounded_to_nearest(r: float, clip: str | float) -> None:
    """To the bit; also where inputs are always zero, all of them or some."""
    w = outlier_weight((12, 10, 3))
    nearest = functional.quantize_weight(w, 3, r, clip)
    for H in (np.diag(np.arange(30.0)), np.zeros((30, 30))):
        np.testing.assert_array_equal(quantized(w, 3, r, clip=clip, moments=H).ints, nearest.ints)
    H = correlated(1, 30)[0]
    H[:6], H[:, :6] = 0, 0
    ours = quantized(w, 3, r, clip=clip, moments=H)
    source = np.isin(ours.source, (0, 1))
    np.testing.assert_array_equal(ours.ints[:, source], nearest.ints[:, source])
    assert (ours.ints[:, ~source] != nearest.ints[:, ~source]).any()


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_auto_leaves_little_error(kind, granularity: str) -> None:
    """Less than each of the FEW by itself, hardly more than the best of all; no other integers than that clip's own."""
    w, H = outlier_weight((24, 12, 2)), correlated(2, 24)
    measured = MeasuredOutputs(w, Hessian(torch.from_numpy(H)), 2)
    options = {"granularity": granularity, "groups": 2, "moments": H}
    each = {clip: quantized(w, 3, 0.2, clip=clip, **options) for clip in AUTO}
    errors = {clip: measured.error(functional.fold(q, 12, 2), 10) for clip, q in each.items()}
    ours = quantized(kind(w), 3, 0.2, clip="auto", granularity=granularity, groups=2, moments=kind(H))
    found = np.asarray(measured.error(np.asarray(functional.fold(ours, 12, 2)), 10))
    few = [errors[RISING[i]].sum() for i in FEW]
    assert found.sum() <= 1.01 * min(few)  # they are compared by damped moments
    assert found.sum() < 1.3 * (np.min([*errors.values()], 0) if granularity == "channel" else errors["none"]).sum()
    for o in range(24):
        assert any((np.asarray(ours.ints)[o] == q.ints[o]).all() for q in each.values())


def test_error_by_hand() -> None:
    w, H = np.float32([[2, 0], [0, 1]]), torch.tensor([[[1.0, 0.5], [0.5, 2.0]]])
    error = MeasuredOutputs(w, Hessian(H)).error(w + np.float32([[1, 0], [1, -1]]), 10)
    assert error.tolist() == pytest.approx([1 + 10 * 2**2 / 4, (1 + 2 - 1) + 10 * (0.5 - 2) ** 2 / 2])


def test_without_weights() -> None:
    for shape, groups in (((0, 3), 1), ((4, 0, 3), 1), ((4, 0, 3), 2), ((4, 1, 1), 4)):
        N = int(np.prod(shape[1:]))
        q = quantized(torch.zeros(shape), 4, 0.5, clip="auto", groups=groups, moments=torch.zeros(groups, N, N))
        assert q.ints.shape[0] == shape[0]


def bad_moments() -> dict[str, tuple[Any, str]]:
    H = correlated(1, 6)[0]
    return {
        "missing": (None, r"rounding='gptq' needs moments="),
        "shape": (H[:5], r"moments has shape \(5, 6\): use \(1, 6, 6\), C K = 6"),
        "groups": (H[None].repeat(2, 0), r"moments has shape \(2, 6, 6\)"),
        "nan": (H * np.nan, "moments holds NaN or Inf"),
        "negative": (-H, "not positive semidefinite: they are no sums of x x"),
        "list": (H.tolist(), "moments must be a numpy array or torch tensor"),
    }


@pytest.mark.parametrize("case", bad_moments())
def test_bad_moments(case: str) -> None:
    moments, message = bad_moments()[case]
    with pytest.raises(TypeError if case == "list" else ValueError, match=message):
        quantized(outlier_weight((4, 3, 2)), 4, moments=moments)


def test_moments_for_nothing() -> None:
    with pytest.raises(ValueError, match="moments= with rounding='nearest' has no effect"):
        functional.quantize_weight(outlier_weight((4, 3)), 4, moments=correlated(1, 3))
    with pytest.raises(ValueError, match="rounding='gptq' with split='naive'"):
        quantized(outlier_weight((4, 3)), 4, split="naive", moments=correlated(1, 3))


# --- Models -----------------------------------------------------------------------------------------------------------


def test_every_kind_of_layer_does_better() -> None:
    """What each computes on the data it was calibrated on, against nearest rounding."""
    torch.manual_seed(0)
    net, inputs = Everything().eval(), Everything.inputs()
    run = lambda model: model(*inputs)  # noqa: E731
    rounded = {}
    for rounding in ("nearest", "gptq"):
        rounded[rounding] = copy.deepcopy(net)
        options = {"calibration": run} if rounding == "gptq" else {}
        report = ocs.quantize(rounded[rounding], wbits=3, rounding=rounding, **options)
    calibration = ocs.calibrate(net, run, moments=True)
    compared = 0
    for line in report.quantized:
        layer = net.get_submodule(line.name)
        of_layer = calibration.moments[line.name]
        name = line.weight or "weight"
        H = of_layer[name].products.double()
        kind = replacement_of(layer)
        errors = {}
        for rounding, model in rounded.items():
            ours = model.get_submodule(line.name)
            w = kind.layout(layer._parameters[name].detach(), ours.groups)
            d = (ours.folded(name) - w).double().reshape(len(H), -1, H.shape[1])
            errors[rounding] = float((d @ H * d).sum())
        assert errors["gptq"] <= errors["nearest"], (line.name, name)
        compared += errors["gptq"] < 0.9 * errors["nearest"]
    assert compared >= len(report.quantized) - 3  # some inputs are but a few vectors


@pytest.mark.parametrize("r", [0, 0.2])
def test_quantize_with_batches_or_a_calibration(net: SmallNet, r: float) -> None:
    """Folded or expanded, with its inputs quantized too; a calibration serves again and again."""
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    calibration = ocs.calibrate(net, x.split(3), moments=True)
    for more in ({}, {"abits": 6, "act_r": 0.1}, {"clip": "auto", "granularity": "channel"}, {"fold_bn": True}):
        options = {"wbits": 3, "r": r, "rounding": "gptq", **more}
        nets = [copy.deepcopy(net) for _ in range(3)]
        report = ocs.quantize(nets[0], **options, calibration=calibration)
        ocs.quantize(nets[1], **options, calibration=x.split(3))
        ocs.quantize(nets[2], **options, expand=False, calibration=calibration)
        assert torch.equal(nets[0](x), nets[1](x))
        torch.testing.assert_close(nets[0](x), nets[2](x), rtol=1e-4, atol=1e-5)
        assert report.settings["rounding"] == "gptq"
        assert all(not line.reason.startswith("rounded to") for line in report.quantized)


def test_a_layer_never_reached_is_rounded_to_nearest() -> None:
    net = SmallNet().eval()
    net.spare = nn.Linear(4, 4)
    expected = functional.quantize_weight(net.spare.weight, 3, 0.2)
    report = ocs.quantize(net, wbits=3, r=0.2, rounding="gptq", calibration=torch.randn(4, 3, 8, 8))
    assert torch.equal(net.spare.weight_int, expected.ints)
    assert net.spare.settings["rounding"] == "nearest"
    notes = {line.name: line.reason for line in report.quantized}
    assert notes["spare"] == "rounded to nearest: calibration never reached it"
    assert notes["head"] == "rounded by 4 inputs of 16 numbers: more would be better"
    assert notes["body.3"] == ""


def test_one_layer_alone(net: SmallNet) -> None:
    """Only its moments are gathered."""
    x = torch.randn(4, 3, 8, 8)
    nearest = copy.deepcopy(net)
    ocs.quantize(nearest, wbits=3)
    ocs.quantize(net, wbits=3, overrides={"head": {"rounding": "gptq"}}, calibration=x)
    ints, expected = ({k: b for k, b in m.named_buffers() if k.endswith("_int")} for m in (net, nearest))
    assert [name for name in ints if not torch.equal(ints[name], expected[name])] == ["head.weight_int"]


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (lambda net: None, "body.0: rounding='gptq' needs calibration=: batches of inputs, say"),
        (
            lambda net: ocs.calibrate(net, torch.randn(2, 3, 8, 8)),
            r"no second moments; use ocs.calibrate\(..., moments",
        ),
        (lambda net: [torch.randn(2, 3, 8, 8) * torch.nan], "body.0: its input holds NaN"),
        (lambda net: [], "calibration is empty"),
        (lambda net: lambda model: None, r"calibration reached none of the layers body\.0, body\.3"),
        (lambda net: ocs.Calibration(), "calibration is of another model"),
    ],
)
def test_bad_calibration_is_one_clear_error(net: SmallNet, calibration: Callable, message: str) -> None:
    given, before = calibration(net), state(net)
    with pytest.raises(ValueError, match=message):
        ocs.quantize(net, wbits=4, rounding="gptq", calibration=given)
    assert_unchanged(net, before)


def test_options_of_calibrate(net: SmallNet) -> None:
    with pytest.raises(ValueError, match="moments=1: use True or False"):
        ocs.calibrate(net, torch.randn(2, 3, 8, 8), moments=1)
    assert ocs.calibrate(net, torch.randn(2, 3, 8, 8)).moments == {}


@pytest.mark.parametrize("more", [{"allocate": "knapsack"}, {"wbits": "auto", "budget": 2000}])
def test_layers_never_reached_get_splits_and_bits_too(net: SmallNet, more: dict[str, Any]) -> None:
    net.spare = nn.Linear(4, 4)
    report = ocs.quantize(
        net, **{"wbits": 3, "r": 0.2, "rounding": "gptq", "calibration": torch.ones(4, 3, 8, 8)} | more
    )
    notes = {line.name: line.reason for line in report.quantized}
    assert notes["spare"] == "rounded to nearest: calibration never reached it"


def test_what_is_left_is_the_outputs_error() -> None:
    """Not that of the weight, which compensation raises: bits, splits and channels are chosen by it."""
    w, H = torch.from_numpy(outlier_weight((32, 64))), torch.from_numpy(correlated(1, 64))
    how = functional.Scheme(3, rounding="gptq", hessian=Hessian(H))
    plan = functional.plan_splits(w, 0)
    ours, nearest = functional.quantize_plan(w, plan, how), functional.quantize_plan(w, plan, functional.Scheme(3))
    d, of_nearest = (functional.fold(step.quantized, 64) - w for step in (ours, nearest))
    noise, power = (float(((x.double() @ H[0]) * x).sum()) for x in (d, w))
    found = remaining_error(w, ours, how._replace(gain=0.0))
    assert found == pytest.approx(noise / (power - noise), rel=1e-4)
    assert float(d.square().sum()) > float(of_nearest.square().sum())
    assert found < float(((of_nearest.double() @ H[0]) * of_nearest).sum()) / power


def test_every_layer_is_factorized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many ways to quantize it are tried."""
    sizes, factor = [], hessians._factor
    monkeypatch.setattr(
        hessians, "_factor", lambda second, *args: sizes.append(second.shape[1]) or factor(second, *args)
    )
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8))
    given = {"rounding": "gptq", "calibration": [torch.randn(40, 12)], "r": 0.1}
    ocs.quantize(model, wbits="auto", budget=160, clip="auto", explain=True, **given)
    assert sizes == [12, 10, 12, 10]  # to choose the bits, then to quantize


def test_few_vectors_are_trusted_less() -> None:
    """With 40 vectors of 64 numbers compensation helps on others, too; damped as for many it harms."""
    torch.manual_seed(0)
    mix = torch.randn(64, 64) / 8
    seen, others = (torch.randn(n, 64) @ mix + 0.2 for n in (40, 4000))
    w = torch.from_numpy(outlier_weight((48, 64)))
    plan, second = functional.plan_splits(w, 0), (seen.T @ seen)[None]
    errors = []
    for hessian in (None, Hessian(second), Hessian(second, 40)):
        rounding = "nearest" if hessian is None else "gptq"
        step = functional.quantize_plan(
            w, plan, functional.Scheme(3, "mse", "channel", rounding=rounding, hessian=hessian)
        )
        errors.append(float((others @ (functional.fold(step.quantized, 64) - w).T).square().sum()))
    nearest, many, few = errors
    print([error / nearest for error in errors])
    assert few < nearest
    assert few < 0.8 * many


class Attends(nn.MultiheadAttention):
    """With arguments of its own, which are not those of a query."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x)[0]


def test_attention_with_a_forward_of_its_own() -> None:
    """What its output projection meets is not known."""
    model = nn.Sequential(Attends(8, 2))
    given = {"rounding": "gptq", "calibration": [torch.randn(5, 7, 8)]}
    with pytest.raises(ValueError, match=r"calibration reached none of the layers 0\.out_proj"):
        ocs.quantize(model, **given)
    with pytest.warns(UserWarning, match="only 40% of the matmul weights .* Attends has a forward of its own"):
        report = ocs.quantize(nn.Sequential(nn.Linear(8, 8), *model), **given)
    assert report.quantized[1].reason.startswith("rounded to nearest: calibration never reached it")


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (nn.Linear(5, 4), r"0: calibration is of another layer: .* \(1, 6\) .* for weight, which meets \(1, 5\)"),
        (nn.LSTM(6, 4), r"0: calibration is of another layer: .* nothing .* for weight_ih_l0, which meets \(1, 6\)"),
    ],
)
def test_moments_of_another_layer(other: nn.Module, match: str) -> None:
    calibration = ocs.calibrate(nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 6), moments=True)
    model = nn.Sequential(other)
    before = state(model)
    with pytest.raises(ValueError, match=match):
        ocs.quantize(model, rounding="gptq", calibration=calibration)
    assert_unchanged(model, before)


def test_attention_is_observed_without_drawing_random_numbers() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    before = torch.get_rng_state()
    ocs.calibrate(nn.Sequential(model), torch.ones(3, 2, 8), moments=True)
    assert torch.equal(torch.get_rng_state(), before)
