"""find_paths(): where scales may be moved, where not and why; moving them along what it finds changes no output."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_unchanged, state
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations
from zoo import torchvision_models

from ocs.model.equalization import Equalization, factors_by_module, scaled_module
from ocs.model.rewrite import for_a_while
from ocs.model.scale_paths import channels_of, find_paths
from ocs.model.wrappers import named_modules


def trained(model: nn.Module) -> nn.Module:
    """In eval mode, with such norms as training leaves."""
    torch.manual_seed(1)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, _BatchNorm):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
            if isinstance(norm, _BatchNorm | nn.LayerNorm | nn.RMSNorm):
                for parameter in norm.parameters():
                    parameter.normal_()
    return model.eval()


def carriers(model: nn.Module) -> dict[str, list[str]]:
    return {name: [each for each, _ in path.consumers] for name, path in find_paths(model).found.items()}


def moved(model: nn.Module) -> Equalization:
    """Divide every channel that can be by some factor between 1/8 and 8."""
    torch.manual_seed(2)
    modules = dict(named_modules(model))
    factors = {
        path: torch.empty(channels_of(modules[path.carrier]), dtype=torch.float64).uniform_(-3, 3).exp2()
        for path in find_paths(model).found.values()
    }
    return Equalization({id(modules[n]): scaled_module(modules[n], f) for n, f in factors_by_module(factors).items()})


def assert_same_function(model: nn.Module, *inputs: Tensor, changed: int) -> None:
    """Every module on a path has other parameters, and the outputs are the same; the model is as it was."""
    before, equalization = state(model), moved(model)
    assert len(equalization.modules) == changed

    def run() -> Tensor:
        pairs = [(old, equalization.modules[id(old)]) for old in model.modules() if id(old) in equalization.modules]
        assert all(old._parameters == new._parameters for old, new in pairs)
        return model(*inputs)

    with torch.no_grad():
        expected = model(*inputs)
        actual = for_a_while(equalization.steps(model), run)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert_unchanged(model, before)


# --- What may be moved ------------------------------------------------------------------------------------------------


class TwoConsumers(nn.Module):
    """A squeeze whose outputs go into two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.a, self.b = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.squeeze(x)))
        return self.a(x) + self.b(x)


class Residual(nn.Module):
    """A block whose inner path may be scaled, and whose ends may not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return self.head(F.relu(x + y).mean((2, 3)))


class Attention(nn.Module):
    """A pre-norm transformer block written out, with one norm for query, key and value."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(8), norm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.out(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Views(nn.Module):
    """Flattened as older networks do it."""

    def __init__(self, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.fc, self.flatten = nn.Conv2d(3, 4, 3), nn.Linear(16, 2), flatten

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(F.max_pool2d(F.relu(self.conv(x)), 3)))


image, tokens = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8)
C, T, R, S = nn.Conv2d, nn.ConvTranspose2d, nn.ReLU, nn.Sequential
block = partial(nn.TransformerEncoderLayer, 8, 2, 16, 0.0, batch_first=True)
SAME = {
    "conv bn relu conv": (S(C(3, 4, 3), nn.BatchNorm2d(4), R(), C(4, 2, 3)), image, 2),
    "a chain": (S(C(3, 4, 3), R(), C(4, 4, 1), nn.LeakyReLU(), C(4, 2, 1)), image, 3),
    "depthwise": (
        S(C(3, 4, 1), nn.BatchNorm2d(4), R(), C(4, 8, 3, groups=4), nn.BatchNorm2d(8), R(inplace=True), C(8, 5, 1)),
        image, 4,
    ),
    "transposed": (S(T(3, 4, 2), R(), T(4, 6, 2, groups=2), R(), C(6, 1, 1)), image, 3),
    "linear relu linear": (S(nn.Linear(8, 6), R(), nn.Dropout(), nn.Linear(6, 3)), tokens, 2),
    "pooled": (
        S(C(3, 4, 3), nn.MaxPool2d(2), R(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2)), image, 2
    ),
    "conv1d": (
        S(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), R(), nn.AvgPool1d(2), nn.Conv1d(4, 2, 1)), image[:, :, 0], 2
    ),
    "norm first": (S(nn.BatchNorm2d(3), R(), C(3, 2, 1)), image, 2),
    "two consumers": (TwoConsumers(), image, 3),
    "residual": (Residual(), image, 2),
    "attention": (Attention(), tokens, 6),
    "rms": (Attention(nn.RMSNorm), tokens, 6),
    "no bias": (Attention(partial(nn.LayerNorm, bias=False)), tokens, 6),
    "view": (Views(lambda x: x.view(x.size(0), -1)), image, 2),
    "reshape": (Views(lambda x: x.reshape(x.shape[0], -1)), image, 2),
    "flatten": (Views(lambda x: torch.flatten(x, 1)), image, 2),
    "torch's encoder": (
        S(nn.TransformerEncoder(block(activation="relu", norm_first=True), 2, enable_nested_tensor=False)), tokens, 10
    ),
    "post-norm": (S(block(activation="relu")), tokens, 2),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_function_is_unchanged(case: str) -> None:
    model, x, changed = SAME[case]
    assert_same_function(trained(model), x, changed=changed)


@pytest.mark.parametrize(("name", "paths"), [("mnasnet0_5", 37), ("squeezenet1_0", 9), ("swin_t", 15)])
def test_torchvision(name: str, paths: int) -> None:
    model = trained(torchvision_models().get_model(name, weights=None))
    assert len(carriers(model)) == paths
    equalization, x = moved(model), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        actual = for_a_while(equalization.steps(model), partial(model, x))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_ends_of_a_residual_block() -> None:
    left = find_paths(trained(Residual())).left
    assert left == {"bn2": "it goes into add", "head": "it goes into the model's output"}


# --- What may not -----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A convolution, and another one that something stands before."""

    def __init__(self, body: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.last, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.flat, self.body = nn.Linear(4, 4), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def with_net(change: Callable[[Net], object]) -> Net:
    net = Net(lambda net, x: net.last(net.conv(x).relu()))
    change(net)
    return net


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1)


def also_returned(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    y = net.conv(x).relu()
    return net.last(y), y


def twice(net: Net, x: Tensor) -> Tensor:
    return net.last(net.last(net.conv(x)))


LEFT = {
    "another consumer": (Net(lambda net, x: net.last(y := net.conv(x)) * y), "it goes into mul"),
    "an output": (Net(also_returned), "it goes into the model's output"),
    "relu6": (Net(lambda net, x: net.last(F.relu6(net.conv(x)))), "it goes into relu6"),
    "sigmoid": (Net(lambda net, x: net.last(net.conv(x).sigmoid())), "it goes into sigmoid"),
    "hardswish": (Net(lambda net, x: net.last(F.hardswish(net.conv(x)))), "it goes into hardswish"),
    "gelu": (Net(lambda net, x: net.last(F.gelu(net.conv(x)))), "it goes into gelu"),
    "an addition": (Net(lambda net, x: net.last(net.conv(x) + 1)), "it goes into add"),
    "other channels": (Net(lambda net, x: net.last(net.conv(x).permute(0, 2, 3, 1))), "it goes into permute"),
    "pooled over channels": (Net(lambda net, x: net.last(F.max_pool3d(net.conv(x), (2, 1, 1)))), "max_pool3d"),
    "mean of channels": (Net(lambda net, x: net.last(net.conv(x).mean(1, keepdim=True))), "it goes into mean"),
    "mean of all": (Net(lambda net, x: net.last(net.conv(x).mean())), "it goes into mean"),
    "another axis": (Net(lambda net, x: net.flat(net.conv(x))), "flat, which may have its channels on another axis"),
    "used twice": (Net(twice), "it goes into last, which is used 2 times"),
    "weight read": (Net(lambda net, x: net.last(net.conv(x)) + net.last.weight.sum()), "which has tensors that the"),
    "own weight read": (Net(lambda net, x: net.last(net.conv(x)) + net.conv.weight.sum()), "it has tensors that the"),
    "tied": (with_net(lambda net: setattr(net.other, "weight", net.last.weight)), "last, which shares its parameters"),
    "tied bias": (with_net(lambda net: setattr(net.other, "bias", net.conv.bias)), "it shares its parameters"),
    "hook": (with_net(lambda net: net.last.register_forward_pre_hook(print)), "it goes into last, which has hooks"),
    "own hook": (with_net(lambda net: net.conv.register_forward_hook(print)), "it has hooks"),
    "weight norm": (with_net(lambda net: parametrizations.weight_norm(net.last)), "last, which is re-parametrized"),
    "own forward": (with_net(lambda net: setattr(net, "last", OwnForward(4, 4, 1))), "has a forward of its own"),
    "two places": (with_net(lambda net: setattr(net, "other", net.conv)), "it stands in several places"),
    "not finite control": (Net(lambda net, x: net.last(net.conv(x if x.sum() > 0 else -x))), "cannot be traced"),
    "meta": (with_net(lambda net: net.last.to("meta")), "it goes into last, which holds no values yet"),
    "lazy": (with_net(lambda net: setattr(net, "last", nn.LazyConv2d(4, 1))), "last, which holds no values yet"),
    "nothing": (Net(lambda net, x: net.last(x) + 0 * net.conv(x).shape[0]), "it goes into nothing"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_left_alone(case: str) -> None:
    model, reason = LEFT[case]
    found, left = find_paths(model.eval())
    assert "conv" not in found
    assert reason in left["conv"]


def test_net_without_obstacles() -> None:
    assert carriers(with_net(lambda net: None)) == {"conv": ["last"]}


class Optional(Net):
    """Where the convolution's output goes depends on an argument."""

    def forward(self, x: Tensor, other: bool = False) -> Tensor:
        y = self.conv(x)
        return self.other(y) + self.last(x) if other else self.last(y) + self.other(x)


def test_every_choice_of_optional_arguments_counts() -> None:
    assert find_paths(Optional(print)).left["conv"] == "where it goes depends on the model's arguments"


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        (nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 2, 1)), "0", "it has no weight"),
        (nn.Sequential(nn.LayerNorm(3, elementwise_affine=False), nn.Linear(3, 2)), "0", "it has no weight"),
        (nn.Sequential(nn.LayerNorm((2, 3)), nn.Linear(3, 2)), "0", "it normalizes several axes"),
        (nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), "0", "it follows no Conv1d"),
        (nn.Sequential(nn.SyncBatchNorm(3), nn.Conv2d(3, 2, 1)), "0", "it is a SyncBatchNorm"),
        (nn.Sequential(nn.Linear(3, 4), nn.MaxPool1d(2), nn.Linear(2, 2)), "0", "it goes into MaxPool1d"),
        (nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(8, 2)), "0", "it goes into Flatten"),
        (nn.Sequential(nn.Linear(3, 4), nn.AlphaDropout(), nn.Linear(4, 2)), "0", "it goes into AlphaDropout"),
        (nn.Sequential(nn.LayerNorm(3), nn.LSTM(3, 4)), "0", "it goes into a LSTM"),
    ],
)
def test_kinds_that_stay(model: nn.Module, name: str, reason: str) -> None:
    found, left = find_paths(model)
    assert name not in found
    assert reason in left[name]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(print),
        lambda layer: layer.norm1.register_forward_hook(print),
        lambda layer: setattr(layer, "forward", layer.forward),
        lambda layer: setattr(layer, "_ff_block", layer._ff_block),
    ],
)
def test_torch_s_layers_as_they_are_no_longer(change: Callable[[nn.Module], object]) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True)
    assert "0.norm1" in carriers(nn.Sequential(layer))
    change(layer)
    assert "0.norm1" not in carriers(nn.Sequential(layer))


def test_a_part_of_torch_s_layer_called_from_outside() -> None:
    class Reaches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.layer.norm1(x)

    assert carriers(Reaches()) == {}
