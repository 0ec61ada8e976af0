"""reestimate_batchnorm() and synthesize(): statistics that are those of the data, and data that have the statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import SmallNet, assert_unchanged, state
from fashion_mnist import count_correct, load, load_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import ocs
from ocs.tune.reestimate import NormStatistics

X = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 + 0.5


def two_norms() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=1e-30), nn.Dropout(), nn.Flatten()
    )


def assert_statistics(norm: nn.Module, x: Tensor) -> None:
    rows = x.detach().double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(norm.running_mean.double(), rows.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), rows.var(1, correction=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [40, 7])
def test_exact_over_all_batches(batch: int) -> None:
    """Of the first norm; of the second where all is one batch."""
    model = two_norms().train()
    ocs.reestimate_batchnorm(model, X.split(batch))
    assert_statistics(model[0], X)
    if batch == 40:
        assert_statistics(model[3], model[:3].eval()(X))
        assert model[0].training is False
        assert model[3].training is True
    assert int(model[0].num_batches_tracked) == 0


def test_only_statistics_change() -> None:
    model = two_norms()
    model[0].train()
    before = state(model)
    ocs.reestimate_batchnorm(model, lambda model: model(X))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[1][name]) == ("running" not in name), name
    assert model[0].training
    assert not model[0]._forward_pre_hooks


def test_features() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    ocs.reestimate_batchnorm(model, X[:, :, 0, 0].split(8))
    assert_statistics(model[0], X[:, :, 0, 0])


class Activated(nn.BatchNorm2d):
    """As there are in other libraries: a norm with more in its forward, whose argument has another name."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_norms_with_a_forward_of_their_own() -> None:
    model = nn.Sequential(Activated(3), nn.Conv2d(3, 6, 3), Activated(6))
    ocs.reestimate_batchnorm(model, [X])
    assert_statistics(model[0], X)
    assert_statistics(model[2], model[:2].eval()(X))


def test_norms_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = two_norms()
    ocs.reestimate_batchnorm(model, [X])
    assert_statistics(model[0], X)


def test_bundled_resnet20_at_2_bits() -> None:
    """Data help most, synthesized inputs nearly as much. Labels are not used."""
    model, (images, labels), (x, _) = load_model(), load("t10k"), load("calibration")
    images, labels = images[:300], labels[:300]
    quantized = copy.deepcopy(model)
    ocs.quantize(quantized, wbits=2, granularity="channel", rounding="squant", expand=False)
    of_data, of_nothing = copy.deepcopy(quantized), copy.deepcopy(quantized)
    ocs.reestimate_batchnorm(of_data, x[:256].split(128))
    made = ocs.synthesize(model, (1, 32, 32), images=64, steps=8)
    ocs.reestimate_batchnorm(of_nothing, made, reference=model)
    correct = [count_correct(net, images, labels) for net in (quantized, of_nothing, of_data)]
    print(correct)
    assert correct[1] > correct[0] + 30
    assert correct[2] > correct[0] + 30


def test_a_reference_of_itself_changes_nothing() -> None:
    """Whatever the data are."""
    model = two_norms().eval()
    with torch.no_grad():
        for norm in (model[0], model[3]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    twin = copy.deepcopy(model)
    before = state(twin)
    ocs.reestimate_batchnorm(model, [X, X * 3], reference=twin)
    assert_unchanged(twin, before)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name])


def test_a_reference_gives_the_change() -> None:
    """Twice the values have twice the mean and four times the variance, on any data."""
    reference = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
    reference[1].running_mean.fill_(3.0)
    reference[1].running_var.fill_(5.0)
    model = copy.deepcopy(reference)
    model[0].weight.data.mul_(2)
    ocs.reestimate_batchnorm(model, X - X.mean((0, 2, 3), keepdim=True), reference=reference)
    torch.testing.assert_close(model[1].running_mean, torch.full((4,), 3.0), rtol=0, atol=1e-4)
    torch.testing.assert_close(model[1].running_var, torch.full((4,), 20.0))


def test_channels_that_do_not_vary_keep_theirs() -> None:
    """There the data tell nothing of how the quantized model differs."""
    float_model = two_norms().eval()
    ocs.reestimate_batchnorm(float_model, [X])
    model = copy.deepcopy(float_model)
    ocs.quantize(model, wbits=3, skip=None)
    before = [buffer.clone() for buffer in model.buffers()]
    ocs.reestimate_batchnorm(model, [torch.zeros_like(X)], reference=float_model)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))


def test_ranks_merge() -> None:
    whole, parts = NormStatistics(nn.BatchNorm2d(3)), [NormStatistics(nn.BatchNorm2d(3)) for _ in range(3)]
    whole.observe(whole.norm, {"input": X})
    parts[0].observe(parts[0].norm, {"input": X[:7]})
    parts[1].observe(parts[1].norm, {"input": X[7:]})
    parts[0].merge(parts[1].count, parts[1].mean, parts[1].squares)
    parts[0].merge(parts[2].count, parts[2].mean, parts[2].squares)
    torch.testing.assert_close(parts[0].mean, whole.mean)
    torch.testing.assert_close(parts[0].squares, whole.squares)


BAD = [
    (nn.Sequential(nn.Conv2d(3, 2, 1)), [X], {}, ValueError, "Sequential has no BatchNorm with running statistics"),
    (nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), [X], {}, ValueError, "has no BatchNorm with running"),
    (two_norms(), [], {}, ValueError, "data is empty"),
    (two_norms(), 5, {}, TypeError, "data=5: use batches"),
    (two_norms(), iter([X]), {"reference": two_norms()}, ValueError, "reference= needs them twice: make a list"),
    (
        nn.Sequential(nn.BatchNorm1d(3)),
        X[:13, :, 0, 0].split(4),
        {},
        ValueError,
        "0: a batch gave it one value of each",
    ),
    (two_norms().half(), [X.half() * 1000], {}, ValueError, "0: what it is given is too large .*float16: use float32"),
    (two_norms(), [X, X * torch.nan], {}, ValueError, "0: its input holds NaN or Inf"),
    (two_norms(), [X, X[:, :2]], {}, RuntimeError, "must match"),
    (two_norms(), lambda model: None, {}, ValueError, "no batch reached the norms 0, 3"),
    (two_norms(), [X], {"reference": two_norms()[:2]}, ValueError, "reference has other BatchNorms than model"),
    (7, [X], {}, TypeError, "model must be an nn.Module, not int"),
]


@pytest.mark.parametrize(("model", "data", "options", "error", "message"), BAD, ids=[str(bad[4])[:40] for bad in BAD])
def test_bad_calls(model: nn.Module, data: object, options: dict, error: type[Exception], message: str) -> None:
    before = state(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        ocs.reestimate_batchnorm(model, data, **options)
    if before:
        assert_unchanged(model, before)


def test_folded_norms(net: SmallNet) -> None:
    message = "folded into its layers: quantize with fold_bn=False"
    float_model = nn.Sequential(net, nn.Unflatten(1, (5, 1)), nn.BatchNorm1d(5))  # the second norm stays
    model = copy.deepcopy(float_model)
    ocs.quantize(model, fold_bn=True)
    with pytest.raises(ValueError, match=f"some of the model's BatchNorms are {message}"):
        ocs.reestimate_batchnorm(model, [X], reference=float_model)
    with pytest.raises(ValueError, match=f"BatchNorms are {message}"):
        ocs.reestimate_batchnorm(model[0], [X])


# --- Synthesized inputs -----------------------------------------------------------------------------------------------


def distance(model: nn.Module, x: Tensor) -> float:
    """Of the statistics of x from those of the model, over all norms."""
    twin, total = copy.deepcopy(model), 0.0
    ocs.reestimate_batchnorm(twin, [x])
    for old, new in zip(model.modules(), twin.modules(), strict=True):
        if isinstance(old, _BatchNorm):
            total += float(((new.running_mean - old.running_mean) ** 2 / old.running_var).mean())
            total += float(((new.running_var / old.running_var).sqrt() - 1).square().mean())
    return total


def test_inputs_match_the_statistics() -> None:
    model = two_norms()
    rows = X.cumsum(3).movedim(1, 0).flatten(1)  # the pixels of a row are alike; of mean 0 and variance 1
    standard = ((rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)).view(3, 40, 8, 8).movedim(0, 1)
    ocs.reestimate_batchnorm(model, [standard])
    few, many = (ocs.synthesize(model, (3, 8, 8), images=48, steps=steps, batch=48)[0] for steps in (1, 60))
    assert distance(model, many) < 0.3 * distance(model, few)


def test_what_is_made() -> None:
    model = two_norms().double().train()
    model[2].weight.grad = torch.ones_like(model[2].weight)
    before = state(model)
    made = ocs.synthesize(model, (3, 8, 8), images=5, steps=2, batch=2)
    assert [tuple(x.shape) for x in made] == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    assert all(x.dtype == torch.float64 and not x.requires_grad for x in made)
    again, other = (ocs.synthesize(model, (3, 8, 8), images=5, steps=2, batch=2, seed=seed) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))
    assert not torch.equal(made[0], other[0])
    assert_unchanged(model, before)
    assert model.training
    assert bool((model[2].weight.grad == 1).all())
    assert model[3].weight.grad is None
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize("shape", [(3,), (3, 9), (3, 2, 1), (3, 4, 5, 6)])
def test_any_rank(shape: tuple[int, ...]) -> None:
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(shape)](3)
    (x,) = ocs.synthesize(nn.Sequential(norm), shape, images=4, steps=1)
    assert x.shape == (4, *shape)


BAD_REQUESTS = [
    (nn.Sequential(nn.Linear(3, 2)), {}, "Sequential has no BatchNorm"),
    (two_norms(), {"images": 0}, "images=0: use a whole number from 1 on"),
    (two_norms(), {"steps": 1.5}, "steps=1.5: use a whole number from 1 on"),
    (two_norms(), {"shape": (3, 0, 8)}, r"shape\[1\]=0: use a whole number from 1 on"),
]


@pytest.mark.parametrize(("option", "value"), [("shape", 28), ("shape", ()), ("seed", "one")])
def test_requests_of_the_wrong_kind(option: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{option}="):
        ocs.synthesize(two_norms(), **{"shape": (3, 8, 8), option: value})


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3, device="meta"), nn.LazyBatchNorm2d()])
def test_norms_without_values(norm: nn.Module) -> None:
    for call in (lambda model: ocs.reestimate_batchnorm(model, [X]), lambda model: ocs.synthesize(model, (3, 8, 8))):
        with pytest.raises(ValueError, match="0: it holds no values yet"):
            call(nn.Sequential(norm))


@pytest.mark.parametrize(("model", "options", "message"), BAD_REQUESTS, ids=[bad[2] for bad in BAD_REQUESTS])
def test_bad_requests(model: nn.Module, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ocs.synthesize(model, **{"shape": (3, 8, 8), **options})


class Called(nn.Module):
    """A norm that is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(input=self.conv(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_of_any_dtype(dtype: torch.dtype) -> None:
    """Found in float32, and given in the model's, whatever its norms have."""
    model = Called().to(dtype)
    model.norm.float()
    (made,) = ocs.synthesize(model, (3, 8, 8), images=4, steps=3)
    (expected,) = ocs.synthesize(copy.deepcopy(model).float(), (3, 8, 8), images=4, steps=3)
    assert made.dtype == dtype
    assert torch.equal(made, expected.to(dtype))


def test_seeds_beyond_the_generators() -> None:
    with pytest.raises(ValueError, match="seed=1180591620717411303424: use 0 to 2"):
        ocs.synthesize(two_norms(), (3, 8, 8), seed=2**70)


def test_a_quantized_model_has_other_statistics() -> None:
    model = two_norms()
    ocs.quantize(model, skip=None)
    with pytest.raises(ValueError, match="model is quantized: inputs are made for the float model"):
        ocs.synthesize(model, (3, 8, 8))


def test_a_shape_that_the_model_does_not_take() -> None:
    with pytest.raises(RuntimeError) as failure:
        ocs.synthesize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), (1, 8, 8))
    assert failure.value.__notes__ == ["while synthesizing inputs: is shape=(1, 8, 8) that of one input?"]
