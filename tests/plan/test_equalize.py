"""quantize(equalize=True): ranges are evened out, and nothing else is as it would not be without it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import SmallNet, assert_unchanged, state
from torch import Tensor, nn

import ocs
from ocs.model.rewrite import for_a_while
from ocs.nn.base import QuantizedLayer
from ocs.plan.equalize import plan_equalization
from ocs.plan.options import LayerOptions, ModelOptions, Request


class PreNorm(nn.Module):
    """A block with a norm for query, key and value, one before an MLP of ReLU, and channels of very unlike weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        with torch.no_grad():
            for layer in (self.q, self.k, self.v, self.up, self.down):
                layer.weight *= torch.logspace(-1.5, 0.5, layer.in_features)
            for norm in (self.norm1, self.norm2):
                norm.weight.uniform_(0.5, 2)
                norm.bias.normal_()
            self.norm1.weight[3] = 30.0  # an outlier channel, as transformers have

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.out(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        return x + self.down(F.relu(self.up(self.norm2(x))))


@pytest.fixture
def block() -> PreNorm:
    torch.manual_seed(0)
    return PreNorm().eval()


def tokens(seed: int = 3) -> Tensor:
    return torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(seed))


def equalized(model: nn.Module, **options: Any) -> tuple[nn.Module, dict[str, str]]:
    """Copy the float model with the scales moved that quantize() would move."""
    known = {name: options.pop(name, getattr(ModelOptions(), name)) for name in vars(ModelOptions())} | {
        "equalize": True
    }
    request = Request(LayerOptions(**options), frozenset(options), ModelOptions(**known))
    equalization, _ = plan_equalization(model, request)
    return for_a_while(equalization.steps(model), partial(copy.deepcopy, model)), equalization.by_name


def largest(layer: nn.Module, axis: int) -> Tensor:
    """Find max |w| of each output (0) or input channel (1) of a layer with one group."""
    return layer.weight.detach().abs().transpose(0, axis).flatten(1).amax(1)


def assert_even(x: Tensor, tolerance: float = 1e-2) -> None:
    torch.testing.assert_close(x / x[0], torch.ones_like(x), rtol=tolerance, atol=0)


# --- Ranges -----------------------------------------------------------------------------------------------------------


def test_rows_and_columns_of_a_chain() -> None:
    """Equation 11 of Nagel et al. 2019, at both links at once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight *= torch.logspace(-1, 1, 6).view(-1, 1, 1, 1)
    even, by_name = equalized(model, skip=None)
    assert by_name == {"0": "", "2": "", "4": "it goes into the model's output"}
    for before, after in ((0, 2), (2, 4)):
        assert_even(largest(even[before], 0) / largest(even[after], 1))
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(even(x), model(x))


def test_rows_of_a_folded_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.logspace(-1, 1, 6))
    even, _ = equalized(model, skip=None, fold_bn=True)
    rows = largest(even[0], 0) * even[1].weight.detach()
    assert_even(rows / largest(even[3], 1))
    norm_alone, _ = equalized(model, skip=None)
    assert_even(largest(norm_alone[3], 1))  # nothing that is quantized pays for it
    assert torch.equal(norm_alone[0].weight, model[0].weight)


def test_columns_after_a_norm(block: PreNorm) -> None:
    even, by_name = equalized(block)
    assert [name for name, reason in by_name.items() if not reason] == ["norm1", "norm2", "up"]
    together = torch.stack([largest(layer, 1) / largest(layer, 1).max() for layer in (even.q, even.k, even.v)]).amax(0)
    assert float(together.min()) > 0.5  # each has a largest column of its own
    assert_even(largest(even.up, 1))
    assert torch.equal(even.out.weight, block.out.weight)
    torch.testing.assert_close(even(tokens()), block(tokens()))


def test_inputs_and_columns(block: PreNorm) -> None:
    """SmoothQuant with alpha = 0.5: what each channel gives and what it meets have one range."""
    even, _ = equalized(block, abits=8, calibration=[tokens()])
    seen: dict[str, Tensor] = {}
    even.up.register_forward_pre_hook(lambda _, args: seen.update(up=args[0].abs().flatten(0, 1).amax(0)))
    even(tokens())
    assert_even(seen["up"] / largest(even.up, 1))


def test_a_scale_for_each_output_channel(block: PreNorm) -> None:
    """Rows have their own scale then: they are free, and columns count as a share of their rows."""
    even, _ = equalized(block, granularity="channel")
    share = (block.down.weight.abs() / block.down.weight.abs().amax(1, keepdim=True)).amax(0)
    assert_even((even.up.bias / block.up.bias / share).detach())


def test_dead_channels_and_extremes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[2].weight[:, 2] = 0
        model[2].weight[:, 3] = 1e-30
    even, _ = equalized(model)
    ratio = (even[0].bias / model[0].bias).detach()
    assert float(ratio[1]) == float(ratio[2]) == 1
    assert float(ratio.max() / ratio.min()) <= 256**2
    torch.testing.assert_close(even(tokens()[..., :4]), model(tokens()[..., :4]))


def test_what_half_precision_cannot_hold() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).half()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[60000.0, 1e-4], [1, 1], [1, 1]]))
        model[2].weight.copy_(torch.tensor([[1e-4, 1.0, 6e4], [1e-4, 1, 6e4]]))
    with pytest.raises(ValueError, match="has no effect: of 0, 0 would leave the range of its dtype"):
        equalized(model)


# --- What it does for quantization ------------------------------------------------------------------------------------


def error(model: nn.Module, **options: Any) -> float:
    ours = copy.deepcopy(model)
    ocs.quantize(ours, **options)
    with torch.no_grad():
        return float((ours(tokens(9)) - model(tokens(9))).square().mean())


@pytest.mark.parametrize("r", [0, 0.1])
@pytest.mark.parametrize("abits", [None, 6])
def test_less_error(block: PreNorm, r: float, abits: int | None) -> None:
    options = {"wbits": 8 if abits else 4, "r": r, "abits": abits}
    options |= {"calibration": [tokens()]} if abits else {}
    assert error(block, equalize=True, **options) < 0.6 * error(block, **options)


def test_thresholds_are_of_the_equalized_model(block: PreNorm) -> None:
    even, _ = equalized(block, abits=8, calibration=[tokens()])
    seen: dict[str, Tensor] = {}
    for name, layer in even.named_children():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].abs().max()}))
    even(tokens())
    report = ocs.quantize(block, abits=8, calibration=[tokens()], equalize=True)
    for layer in report.quantized:
        assert layer.act_threshold == pytest.approx(seen[layer.name].item(), rel=1e-4)


def test_a_layer_that_stays_float_is_scaled_as_well(block: PreNorm) -> None:
    before = copy.deepcopy(block)
    ocs.quantize(block, equalize=True, skip=["q", "out"])
    assert type(block.q) is nn.Linear
    assert not torch.equal(block.q.weight, before.q.weight)
    assert torch.equal(block.out.weight, before.out.weight)
    torch.testing.assert_close(block.q(block.norm1(tokens())), before.q(before.norm1(tokens())), rtol=1e-4, atol=1e-4)


def test_old_modules_keep_their_parameters(block: PreNorm) -> None:
    norm, up, kept = block.norm1, block.up, copy.deepcopy(block)
    ocs.quantize(block, equalize=True)
    assert torch.equal(norm.weight, kept.norm1.weight)
    assert torch.equal(up.weight, kept.up.weight)
    assert block.norm1 is not norm
    assert block.norm1.weight.requires_grad
    assert not block.norm1.weight.is_inference()


OPTIONS: dict[str, dict[str, Any]] = {
    "weights": {},
    "folded": {"fold_bn": True, "skip": None},
    "inputs": {"abits": 6, "fold_bn": True, "calibration": True},
    "gptq": {"rounding": "gptq", "correct_bias": True, "clip": "auto", "calibration": True},
    "best": {"recipe": "best", "correct_bias": True, "explain": True},
    "sizes": {"wbits": "auto", "budget": 2000, "calibration": True},
    "overrides": {"overrides": {"body.3": {"abits": 8, "granularity": "channel"}}, "calibration": True},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_with_other_options_and_files(net: SmallNet, tmp_path: Path, case: str) -> None:
    """Small errors at 6 bits show that all parts are of one model; a fresh one takes the file."""
    options, images = dict(OPTIONS[case]), torch.randn(8, 3, 8, 8)
    if options.pop("calibration", False):
        options["calibration"] = [images]
    fresh, expected = SmallNet(), net(images)
    report = ocs.quantize(net, **{"wbits": 6, "r": 0.1, **options}, equalize=True)
    moved = [name for name, reason in report.equalized.items() if not reason]
    assert moved == ["stem", "body.1", "body.3", "body.5"]
    found = net(images)
    assert ((found - expected).norm() / expected.norm()).item() < (0.3 if case == "sizes" else 0.12)
    ocs.save(net, tmp_path / "net.safetensors")
    assert torch.equal(ocs.load(tmp_path / "net.safetensors", fresh.eval())(images), found)


# --- Calibration ------------------------------------------------------------------------------------------------------


def test_batches_that_come_once(block: PreNorm) -> None:
    other = copy.deepcopy(block)
    ocs.quantize(block, abits=6, calibration=iter([tokens()]), equalize=True)
    ocs.quantize(other, abits=6, calibration=[tokens()], equalize=True)
    assert torch.equal(block(tokens()), other(tokens()))


def test_calibration_of_the_model_as_it_was(block: PreNorm) -> None:
    before, seen = state(block), ocs.calibrate(block, [tokens()])
    with pytest.raises(ValueError, match=r"equalize=True changes what layers are given, .* use calibration=batches"):
        ocs.quantize(block, abits=8, calibration=seen, equalize=True)
    assert_unchanged(block, before)


def test_rows_without_calibration(block: PreNorm) -> None:
    report = ocs.quantize(block, abits=8, act_scale="dynamic", equalize=True)
    assert report.equalized["norm1"] == "what it gives is quantized, and no calibration tells its range"
    assert report.equalized["up"] == ""  # by the rows before and the columns after it


def test_rows_with_calibration(block: PreNorm) -> None:
    report = ocs.quantize(block, abits=8, act_scale="dynamic", calibration=[tokens()], equalize=True)
    assert report.equalized["norm1"] == ""


def test_calibration_that_nothing_uses(block: PreNorm) -> None:
    with pytest.raises(ValueError, match="calibration= has no effect on these options"):
        ocs.quantize(block, calibration=[tokens()], equalize=True)


# --- All or nothing, and what is said ---------------------------------------------------------------------------------


def failing_later(calls: int) -> Callable[[nn.Module], None]:
    left = iter(range(calls))

    def run(model: nn.Module) -> None:
        model(tokens())
        if next(left, None) is None:
            raise RuntimeError("no more")

    return run


@pytest.mark.parametrize("calls", [0, 1])
def test_all_or_nothing_where_calibration_fails(block: PreNorm, calls: int) -> None:
    before = state(block)
    with pytest.raises(RuntimeError, match="no more"):
        ocs.quantize(block, abits=8, calibration=failing_later(calls), equalize=True)
    assert_unchanged(block, before)


def test_all_or_nothing_where_a_layer_cannot_be_quantized(block: PreNorm) -> None:
    block.out.weight.data[0, 0] = float("inf")
    before = state(block)
    with pytest.raises(ValueError, match="out: "):
        ocs.quantize(block, equalize=True)
    assert_unchanged(block, before)


def models_without() -> Iterator[tuple[nn.Module, str]]:
    yield nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), "of 0, it goes into GELU"
    yield nn.Sequential(nn.LSTM(4, 4)), "the model has no norm, convolution or linear layer"
    one = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    one[2].register_forward_hook(lambda *_: None)
    yield one, "of 0, it goes into 2, which has hooks"


@pytest.mark.parametrize(("model", "reason"), [*models_without()])
def test_nothing_to_equalize_is_an_error(model: nn.Module, reason: str) -> None:
    before = state(model)
    with pytest.raises(ValueError, match=f"equalize=True has no effect: {reason}"):
        ocs.quantize(model, equalize=True)
    assert_unchanged(model, before)


def test_nothing_quantized_after_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="has no effect: of 0, no layer after it is quantized"):
        ocs.quantize(model, equalize=True, skip="2")


def test_report(block: PreNorm) -> None:
    report = ocs.quantize(block, wbits=4, equalize=True)
    assert report.settings["equalize"] is True
    assert report.equalized["down"] == "it goes into add"
    assert "3 of 8 norms and layers equalized with those after them" in str(report)
    assert report.to_dict()["equalized"] == report.equalized
    assert all(isinstance(layer, QuantizedLayer) for layer in (block.q, block.up, block.down))


def test_off_by_default(block: PreNorm) -> None:
    report, norm = ocs.quantize(block), block.norm1.weight
    assert report.equalized == {}
    assert "equalized" not in report.to_dict()
    assert block.norm1.weight is norm
    assert report.settings["equalize"] is False


@pytest.mark.parametrize("value", [0.5, 1, "yes", None])
def test_it_is_a_flag(block: PreNorm, value: object) -> None:
    with pytest.raises((ValueError, TypeError), match=r"equalize="):
        ocs.quantize(block, equalize=value)
