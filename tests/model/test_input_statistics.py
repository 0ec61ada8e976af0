"""input_moments(): what the graph tells of layers' inputs is what they have, all else is unknown."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import Everything, assert_unchanged, state
from fashion_mnist import load, load_model
from torch import Tensor, nn

import ocs
from ocs.model.input_statistics import InputMoments, input_moments, inputs_have_mean


def measured(model: nn.Module, x: Tensor, axis: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of every convolution's and linear layer's input, by channel."""
    found = {}

    def take(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].double().movedim(1 if isinstance(layer, nn.Conv2d) else -1, 0).flatten(1)
            found[name] = (rows.mean(1), rows.var(1))

        return hook

    kinds = (nn.Conv2d, nn.Linear)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, kinds)]
    hooks = [m.register_forward_pre_hook(take(name)) for name, m in layers]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def test_bundled_resnet20() -> None:
    """Against 512 images; what is left are sums that are not independent, and borders."""
    model, images = load_model(), load("calibration")[0]
    found, actual = input_moments(model), measured(model, images)
    assert found.keys() == actual.keys()
    assert found.pop("conv1") is None
    for name, moments in found.items():
        mean, variance = actual[name]
        correlation = float(torch.corrcoef(torch.stack([mean, moments.mean]))[0, 1])
        error = float((moments.mean - mean).norm() / mean.norm())
        print(f"{name}: correlation {correlation:.3f}, error of the mean {error:.1%}")
        assert correlation > 0.85, name
        assert error < 0.2, name
        assert 0.5 < float(moments.var.sum() / variance.sum()) < 2.2, name
        assert not moments.guessed
    assert all(mean.worth for mean in inputs_have_mean(model).values())


class Net(nn.Module):
    """Two norms of 4 channels with standard normal inputs, something, and a layer."""

    def __init__(self, between: Callable[[Net, Tensor, Tensor], Tensor], layer: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.gate = nn.Conv2d(4, 4, 1)
        self.activation, self.scale = nn.PReLU(4), nn.Parameter(torch.rand(4, 1, 1))
        with torch.no_grad():
            self.activation.weight.uniform_()
            for norm in (self.a, self.b):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(-1, 1)
        self.between, self.layer = [between], layer or nn.Conv2d(4, 2, 1)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 8, 4, 4]."""
        return self.layer(self.between[0](self, self.a(x[:, :4]), self.b(x[:, 4:])))


def normal_images() -> Tensor:
    """[4000, 8, 4, 4]."""
    return torch.randn(4000, 8, 4, 4, generator=torch.Generator().manual_seed(0))


def assert_right(model: nn.Module, name: str = "layer", tolerance: float = 0.03, guessed: bool = False) -> None:
    found, (mean, variance) = input_moments(model)[name], measured(model, normal_images())[name]
    assert found is not None
    assert found.guessed is guessed
    assert found.mean.dtype == found.var.dtype == torch.float64
    torch.testing.assert_close(found.mean, mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.var, variance, rtol=3 * tolerance, atol=tolerance)


ACTIVATIONS = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "relu method": lambda x: x.relu(),
    "relu_ method": lambda x: x.relu_(),
    "relu6": F.relu6,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "silu by hand": lambda x: x * torch.sigmoid(x),
    "hardswish": F.hardswish,
    "hardswish by hand": lambda x: x * F.relu6(x + 3) / 6,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "elu": F.elu,
    "softplus": F.softplus,
    "hardtanh": lambda x: F.hardtanh(x, -0.3, 0.4),
    "clamp": lambda x: x.clamp(min=0.2),
    "scalars": lambda x: 1 - 2 * (x + 0.5) / 3,
    "module": nn.Softplus(beta=2),
    "square": lambda x: x**2,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    model = Net(lambda net, a, b: ACTIVATIONS[name](a))
    if isinstance(ACTIVATIONS[name], nn.Module):
        model.between, model.module = [lambda net, a, b: net.module(a)], ACTIVATIONS[name]
    assert_right(model)


KNOWN = {
    "nothing": (lambda net, a, b: a, None),
    "sum": (lambda net, a, b: F.relu(a + b), None),
    "sum in place": (lambda net, a, b: F.relu(a.add_(b.relu())), None),
    "product": (lambda net, a, b: a * torch.sigmoid(b), None),
    "larger": (lambda net, a, b: torch.maximum(a, b), None),
    "prelu": (lambda net, a, b: net.activation(a), None),
    "layer scale": (lambda net, a, b: a * net.scale, None),
    "cat": (lambda net, a, b: torch.cat([a.relu(), b], dim=1), nn.Conv2d(8, 2, 1)),
    "cat from the end": (lambda net, a, b: torch.cat((a, b), -3), nn.Conv2d(8, 2, 1, groups=2)),
    "chunk": (lambda net, a, b: a.chunk(2, 1)[1].relu(), nn.Conv2d(2, 2, 1)),
    "split": (lambda net, a, b: torch.split(a, [1, 3], dim=1)[1], nn.Conv2d(3, 2, 1)),
    "slice": (lambda net, a, b: a[:, 1:3, ::2, ::2], nn.Conv2d(2, 2, 1)),
    "new channels": (
        lambda net, a, b: F.pad(a, (0, 0, 0, 0, 0, (a.shape[1] + b.size(1)) // 2 - 2)),
        nn.Conv2d(6, 2, 1),
    ),
    "flatten": (lambda net, a, b: torch.flatten(a.relu(), 1), nn.Linear(64, 2)),
    "view": (lambda net, a, b: a.relu().view(a.size(0), -1), nn.Linear(64, 2)),
    "reshape": (lambda net, a, b: a.reshape(-1, 64), nn.Linear(64, 2)),
    "permute": (lambda net, a, b: a.permute(0, 2, 3, 1), nn.Linear(4, 2)),
    "transposed tokens": (lambda net, a, b: a.flatten(2).transpose(1, 2), nn.Linear(4, 2)),
    "moved twice": (lambda net, a, b: a.permute(0, 2, 3, 1).permute(0, 3, 1, 2).relu(), None),
    "contiguous": (lambda net, a, b: F.dropout(a, training=False).contiguous().float(), None),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known(name: str) -> None:
    between, layer = KNOWN[name]
    assert_right(Net(between, copy.deepcopy(layer)))


MEANS = {
    "mean": (lambda net, a, b: a.relu().mean((2, 3)), nn.Linear(4, 2)),
    "mean, kept": (lambda net, a, b: a.mean([2, 3], keepdim=True), None),
    "pool": (lambda net, a, b: F.avg_pool2d(a.relu(), 2), None),
    "global pool": (lambda net, a, b: torch.flatten(F.adaptive_avg_pool2d(a, 1), 1), nn.Linear(4, 2)),
    "squeezed": (lambda net, a, b: F.adaptive_avg_pool2d(a, 1).squeeze(-1).squeeze(-1), nn.Linear(4, 2)),
}


@pytest.mark.parametrize("name", MEANS)
def test_averages_keep_the_mean(name: str) -> None:
    between, layer = MEANS[name]
    model = Net(between, copy.deepcopy(layer))
    found, (mean, variance) = input_moments(model)["layer"], measured(model, normal_images())["layer"]
    torch.testing.assert_close(found.mean, mean, rtol=0.02, atol=0.02)
    assert bool((found.var > variance).all())


UNKNOWN = {
    "a layer's output": lambda net, a, b: net.gate(a),
    "a sum with one": lambda net, a, b: a + net.gate(b),
    "shuffled": lambda net, a, b: a.view(-1, 2, 2, 4, 4).transpose(1, 2).reshape(-1, 4, 4, 4),
    "another axis": lambda net, a, b: a.transpose(1, 2),
    "product of matrices": lambda net, a, b: a @ b,
    "mean of channels": lambda net, a, b: a.mean(1, keepdim=True).expand(-1, 4, -1, -1),
    "any function": lambda net, a, b: torch.fft.fft(a).real,
    "repeated": lambda net, a, b: a.repeat(1, 1, 2, 2),
    "cat of others": lambda net, a, b: torch.cat([a, net.gate(b)], 1)[:, :4],
    "two shapes": lambda net, a, b: a.flatten(1) + b.flatten(1).flip(1),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown(name: str) -> None:
    model = Net(UNKNOWN[name])
    assert input_moments(model)["layer"] is None
    assert inputs_have_mean(model)["layer"] == (True, "nothing is known of its input")


GUESSED = {
    "activation of a layer": lambda net, a, b: F.relu(net.gate(a)),
    "largest": lambda net, a, b: F.max_pool2d(a, 2),
    "gate": lambda net, a, b: a * torch.sigmoid(net.gate(b)),
    "layer norm": lambda net, a, b: F.layer_norm(a, (4,)).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("name", GUESSED)
def test_guessed(name: str) -> None:
    assert input_moments(Net(GUESSED[name]))["layer"].guessed


def test_guesses_tell_activations_apart() -> None:
    for f, worth in ((F.relu, True), (torch.sigmoid, True), (F.gelu, True), (torch.tanh, False)):
        found = inputs_have_mean(Net(lambda net, a, b, f=f: f(net.gate(a))))["layer"]
        assert found.worth is worth
        assert found.reason.startswith("its mean is guessed to have")


def test_norms() -> None:
    """Of each channel they are known, of several together guessed."""
    norms = {"bn": nn.BatchNorm2d(4), "in": nn.InstanceNorm2d(4, affine=True), "gn": nn.GroupNorm(2, 4)}
    for name, norm in norms.items():
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([1, 2, 3, -4.0]))
            norm.bias.copy_(torch.tensor([0, 1, 0, -1.0]))
        found = input_moments(nn.Sequential(norm, nn.Conv2d(4, 2, 1)))["1"]
        torch.testing.assert_close(found.mean, norm.bias.detach().double())
        torch.testing.assert_close(found.var, norm.weight.detach().double().square(), rtol=1e-4, atol=0)
        assert found.guessed is (name == "gn")
    for norm in (nn.LayerNorm(4), nn.RMSNorm(4), nn.LayerNorm(4, elementwise_affine=False)):
        found = input_moments(nn.Sequential(norm, nn.Linear(4, 2)))["1"]
        assert found.guessed
        torch.testing.assert_close(found.mean, torch.zeros(4, dtype=torch.float64), atol=1e-6, rtol=0)
    dead = nn.BatchNorm2d(4)
    dead.running_var.fill_(1e-9)
    found = input_moments(nn.Sequential(dead, nn.Conv2d(4, 2, 1)))["1"]
    assert float(found.var.max()) < 1e-3


def test_batchnorm_of_features() -> None:
    """[N, C], as a BatchNorm1d mostly has it."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    found = input_moments(model)
    assert found["0"] is None
    torch.testing.assert_close(found["3"].mean, torch.full((6,), 0.3989, dtype=torch.float64), atol=1e-3, rtol=0)


class Activated(nn.BatchNorm2d):
    """A norm that does more than torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_norms_with_a_forward_of_their_own_are_unknown() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Activated(4), nn.Conv2d(4, 4, 1))
    assert input_moments(model)["2"] is None
    assert inputs_have_mean(model)["2"].worth


@pytest.mark.parametrize(
    "copies",
    [lambda y: y.clone(), lambda y: F.avg_pool2d(y, 1), lambda y: F.max_pool2d(y, 1), lambda y: y.mean((2, 3))],
)
def test_what_is_done_in_place_to_a_copy_stays_there(copies: Callable) -> None:
    assert_right(Net(lambda net, a, b: (copies(a).relu_(), a)[1]))
    assert_right(Net(lambda net, a, b: (a.relu_(), a)[1]))


def test_the_time_axis_is_not_that_of_channels() -> None:
    """[N, C, L] with as many steps as the layer has inputs, or as many in C and L together."""

    class Steps(nn.Module):
        def __init__(self, inputs: int, view: tuple[int, ...] | None) -> None:
            super().__init__()
            self.conv, self.norm, self.view = nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), view
            self.layer = nn.Linear(inputs, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            return self.layer(y if self.view is None else y.view(*self.view))

    assert input_moments(Steps(8, None))["layer"] is None
    assert input_moments(Steps(16, (-1, 16)))["layer"] is None
    assert input_moments(Steps(16, (4, -1)))["layer"] is not None  # [N, C L]

    class Pooled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](self[1](self[0](x)).mean(1))

    assert input_moments(Pooled(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 2)))["2"] is not None
    features = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    assert not input_moments(features)["2"].guessed


def test_transformers() -> None:
    for norm_first in (False, True):
        layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=norm_first, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        for model in (layer, encoder, nn.Transformer(8, 2, 1, 1, 16, batch_first=True)):
            worth = {name: mean.worth for name, mean in inputs_have_mean(model).items()}
            assert {name for name in worth if worth[name]} == {name for name in worth if name.endswith("linear2")}
            assert all(input_moments(model)[name].guessed for name in worth if name.endswith(("linear1", "linear2")))
            assert any(worth)


def decorated(forward: Callable) -> Callable:
    @functools.wraps(forward)
    def wrapped(*args: object, **kwargs: object) -> object:
        return forward(*args, **kwargs)

    return wrapped


class Block(nn.Module):
    """As libraries write them: it hands on what it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.layer = nn.Linear(8, 32), nn.Linear(32, 8)

    @decorated
    def forward(self, x: Tensor, *args: object, mask: Tensor | None = None, **kwargs: object) -> Tensor:
        return self.layer(F.gelu(self.wide(x, *args, **kwargs)))


def test_blocks_of_other_libraries() -> None:
    """In a model that cannot be traced itself."""
    model = Untraceable()
    model.part = Block()
    found = input_moments(model)
    assert found["part.layer"].guessed
    assert found["part.wide"] is None


def test_recurrent() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 5), "cell": nn.GRUCell(4, 5), "decoder": nn.Linear(5, 3)})
    assert inputs_have_mean(model) == dict.fromkeys(model, (False, "nothing is known of its input"))


class Untraceable(nn.Module):
    """A branch that depends on values, around and beside what can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.outer = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 4, H, W]."""
        return self.outer(self.inner(x) if x.sum() > 0 else x)


def test_untraceable_part() -> None:
    """What is around it and what is in it are still known."""
    norm, end = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
    model = nn.Sequential(norm, nn.Conv2d(4, 4, 1), nn.Sequential(Untraceable()), nn.BatchNorm2d(4), end)
    found = input_moments(model)
    assert {name for name, moments in found.items() if moments is not None} == {"1", "2.0.inner.3", "4"}


class Optional(nn.Module):
    """What the layer sees depends on an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, positive: bool = False) -> Tensor:
        """x [N, 4, H, W]."""
        return self.layer(self.norm(x).relu() if positive else self.norm(x))


def test_what_calls_do_not_agree_on_is_unknown() -> None:
    assert input_moments(Optional())["layer"] is None
    layer = nn.Conv2d(4, 4, 1)
    assert input_moments(nn.Sequential(nn.BatchNorm2d(4), layer, nn.ReLU(), layer))["1"] is None
    twice = nn.Sequential(nn.BatchNorm2d(4), layer, nn.BatchNorm2d(4), layer)
    assert input_moments(twice)["1"] is not None


def test_hooks_are_not_seen_through() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    for module in model:
        assert input_moments(model)["2"] is not None
        hook = module.register_forward_pre_hook(lambda module, args: None)
        found = input_moments(model)["2"]
        assert found is None or (found.guessed and module is not model[2])  # an activation of anything is a guess
        hook.remove()


def test_nothing_is_changed() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1), nn.Dropout()).train()
    everything = Everything()
    before, random = state(model), torch.get_rng_state()
    assert isinstance(input_moments(model)["2"], InputMoments)
    assert inputs_have_mean(everything).keys() == input_moments(everything).keys()
    assert_unchanged(model, before)
    assert model.training
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.equal(torch.get_rng_state(), random)


def test_quantized_models_too() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    expected = input_moments(model)["2"]
    ocs.quantize(model, wbits=4, r=0.3, skip=None)
    torch.testing.assert_close(input_moments(model)["2"].mean, expected.mean)


def test_lazy_and_meta_layers_are_unknown() -> None:
    assert input_moments(nn.Sequential(nn.BatchNorm2d(4), nn.LazyConv2d(2, 1))) == {"1": None}
    with torch.device("meta"):
        model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    assert input_moments(model) == {"1": None}
