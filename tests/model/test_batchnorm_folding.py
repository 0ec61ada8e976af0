"""plan_folding(): what is folded computes the same, what is not says why, and the model is not touched."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_unchanged, state
from fashion_mnist import load_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, prune
from zoo import torchvision_models

from ocs.formats.storage import load, save
from ocs.model.batchnorm_folding import FoldedBatchNorm, Folding, plan_folding
from ocs.model.rewrite import exchange, module_slots
from ocs.nn import QuantConvTranspose2d
from ocs.quantization import quantize
from ocs.runtime.compare import compare
from ocs.runtime.lower import lower

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def trained(model: nn.Module) -> nn.Module:
    """In eval mode, with the statistics and parameters that a trained norm may have: none is the default."""
    torch.manual_seed(1)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, _BatchNorm):
                for tensor in (norm.running_mean, norm.weight, norm.bias):
                    if tensor is not None:
                        tensor.normal_()
                if norm.running_var is not None:
                    norm.running_var.uniform_(0.5, 2)
    return model.eval()


def apply(model: nn.Module, folding: Folding) -> nn.Module:
    exchange(list(module_slots(model, {**folding.layers, **folding.norms})))
    return model


def assert_folds(model: nn.Module, x: Tensor, norms: int, *args: object) -> None:
    """Every norm is folded, and the output is the same; rounding grows a little with each layer."""
    folding = plan_folding(model)
    assert (len(folding.layers), len(folding.norms), folding.left) == (norms, norms, {})
    with torch.no_grad():
        expected = model(x, *args)
        actual = apply(model, folding)(x, *args)
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())
    assert sum(isinstance(module, FoldedBatchNorm) for module in model.modules()) == norms
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


# --- What is folded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_convolutions(spatial: int, transposed: bool, groups: int, bias: bool, affine: bool) -> None:
    kind = getattr(nn, f"Conv{'Transpose' * transposed}{spatial}d")
    options = {} if transposed else {"padding_mode": "circular"}
    layer = kind(4, 4 if groups == 4 else 6, 3, stride=2, padding=1, groups=groups, bias=bias, **options)
    model = nn.Sequential(layer, NORMS[spatial - 1](layer.out_channels, affine=affine, eps=0.1), nn.ReLU())
    assert_folds(trained(model), torch.randn(2, 4, *[7] * spatial), 1)


def test_transposed_layout_is_its_own_inverse() -> None:
    weight = torch.randn(6, 4, 3, 3)  # [groups C, O / groups, ...]
    for groups in (1, 2, 3):
        there = QuantConvTranspose2d.layout(weight, groups)
        assert there.shape == (4 * groups, 6 // groups, 3, 3)
        assert torch.equal(QuantConvTranspose2d.layout(there, groups), weight)


def test_norm_without_a_bias() -> None:
    net = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    net[1].bias = None  # as BatchNorm2d(4, bias=False) has it, which torch 2.10 does not take
    assert_folds(net, torch.randn(2, 3, 5, 5), 1)


def test_bundled_resnet20() -> None:
    model = load_model()
    assert_folds(model, torch.randn(4, 1, 32, 32), 19)
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("name", "norms"), [("resnet18", 20), ("mobilenet_v2", 52), ("googlenet", 57)])
def test_torchvision(name: str, norms: int) -> None:
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = torchvision_models().get_model(name, weights=None, **options)
    assert_folds(trained(model), torch.randn(2, 3, 64, 64), norms)


def test_traced_model() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    assert_folds(torch.fx.symbolic_trace(model), torch.randn(2, 3, 5, 5), 1)


class PlainSubclass(nn.Conv2d):
    """It computes what its base does."""


def test_subclass_with_the_same_forward() -> None:
    model = trained(nn.Sequential(PlainSubclass(3, 4, 1), nn.BatchNorm2d(4)))
    assert_folds(model, torch.randn(2, 3, 5, 5), 1)
    assert type(model[0]) is PlainSubclass


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("trainable", [True, False])
def test_what_the_new_layer_is(dtype: torch.dtype, trainable: bool) -> None:
    layer = nn.Conv2d(3, 4, 3, bias=False, dtype=dtype).to(memory_format=torch.channels_last)
    layer.requires_grad_(trainable).note = "mine"
    model = trained(nn.Sequential(layer, nn.BatchNorm2d(4, dtype=dtype)))
    with torch.inference_mode():
        (new,) = plan_folding(model).layers.values()
    assert (type(new), new.note, new.training) == (nn.Conv2d, "mine", False)
    for parameter in (new.weight, new.bias):
        assert isinstance(parameter, nn.Parameter)
        assert not parameter.is_inference()
        assert (parameter.dtype, parameter.requires_grad) == (dtype, trainable)
    assert new.weight.is_contiguous(memory_format=torch.channels_last)
    exact = (
        layer.weight.double() * (model[1].weight.double() / (model[1].running_var + 1e-5).sqrt())[:, None, None, None]
    )
    torch.testing.assert_close(new.weight.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)
    new.register_forward_hook(print)
    new.extra = nn.Parameter(torch.zeros(1))
    assert not layer._forward_hooks
    assert "extra" not in layer._parameters


# --- Norms that run children afterwards -------------------------------------------------------------------------------


class NormAct(nn.BatchNorm2d):
    """Normalizes, then drops and activates, as timm's BatchNormAct2d does."""

    def __init__(self, channels: int, act: nn.Module | None = None, drop: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.act, self.drop = act or nn.SiLU(inplace=True), drop or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        training = self.training or (self.running_mean is None and self.running_var is None)
        statistics = (self.running_mean, self.running_var) if not self.training else (None, None)
        x = F.batch_norm(x, *statistics, self.weight, self.bias, training, self.momentum or 0.0, self.eps)
        return self.act(self.drop(x))


class HandsOn(NormAct):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(nn.BatchNorm2d.forward(self, x))


def norm_acts(norm: type[nn.Module] = NormAct) -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), norm(8, nn.ReLU(inplace=True)), nn.Conv2d(8, 8, 3, groups=8, bias=False), norm(8)]
    return trained(nn.Sequential(*layers, nn.Conv2d(8, 4, 1), norm(4, nn.PReLU(4), nn.Dropout2d())))


@pytest.mark.parametrize("norm", [NormAct, HandsOn])
def test_what_a_norm_runs_afterwards_stays(norm: type[nn.Module]) -> None:
    model = norm_acts(norm)
    model[5].drop.train(norm is HandsOn)  # which never calls it
    acts = [model[i].act for i in (1, 3, 5)]
    assert_folds(model, torch.randn(2, 3, 9, 9), 3)
    assert [model[i].act for i in (1, 3, 5)] == acts
    names = ["drop", "act"] if norm is NormAct else ["act"]
    assert [[*model[i]._modules] for i in (1, 3, 5)] == [names] * 3
    assert not model[5].training


def test_folded_with_an_activation_travels(tmp_path: Path) -> None:
    """Saved, loaded, compared and exported; the outputs of layers are compared as the norms give them."""
    float_model, x = norm_acts(), torch.randn(8, 3, 9, 9)
    model = copy.deepcopy(float_model)
    report = quantize(model, wbits=8, r=0.1, skip=None, abits=8, calibration=[x], fold_bn=True)
    assert report.batch_norms == {"1": "", "3": "", "5": ""}
    save(model, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors", norm_acts().train())
    assert torch.equal(loaded.eval()(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), pickle.loads(pickle.dumps(model))(x))
    found = {each.name: each.sqnr_db for each in compare(float_model, model, [x]).layers}
    assert min(found["0"], found["2"], found["4"]) > 25
    torch.testing.assert_close(lower(copy.deepcopy(model))(x), model(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="has no batch norm '1' to fold"):
        load(tmp_path / "m.safetensors", norm_acts(OwnForwardNorm))


class Residual(NormAct):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(nn.BatchNorm2d.forward(self, x)) + x


class TwoActs(NormAct):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.act(nn.BatchNorm2d.forward(self, x)))


class InPlaceBefore(NormAct):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return self.act(nn.BatchNorm2d.forward(self, x))


class OtherEps(NormAct):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.1))


class OtherScale(NormAct):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.batch_norm(x, self.running_mean, self.running_var, self.bias, self.weight, eps=self.eps))


class OwnStatistics(NormAct):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.batch_norm(x, None, None, self.weight, self.bias, True, eps=self.eps))


class TwiceNormal(NormAct):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(nn.BatchNorm2d.forward(self, nn.BatchNorm2d.forward(self, x)))


class Branches(NormAct):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(nn.BatchNorm2d.forward(self, x)) if x.sum() > 0 else x


class GivesWeight(NormAct):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.act(nn.BatchNorm2d.forward(self, x)), self.weight


MORE = (Residual, TwoActs, InPlaceBefore, OtherEps, OtherScale, OwnStatistics, TwiceNormal, Branches, GivesWeight)


@pytest.mark.parametrize("norm", MORE)
def test_norms_that_do_yet_more_stay(norm: type[nn.Module]) -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), norm(4)))
    assert plan_folding(model).left == {"1": f"it has a forward of its own ({norm.__name__})"}


@pytest.mark.parametrize("name", ["efficientnet_b0", "regnetx_002", "resnet18"])
def test_timm(name: str) -> None:
    model = pytest.importorskip("timm").create_model(name, pretrained=False)
    norms = sum(isinstance(module, _BatchNorm) for module in model.modules())
    assert_folds(trained(model), torch.randn(2, 3, 64, 64), norms)


# --- What is not touched ----------------------------------------------------------------------------------------------


class Remembers(nn.Module):
    """Keeps an intermediate result, counts its calls, and uses a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.seen: list[object] = []
        self.last = None
        self.calls = 0
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.block(x) * torch.tensor(2.0)
        self.seen.append(self.last)
        self.calls += 1
        self.steps.add_(1)
        return self.last


def test_planning_does_not_touch_the_model() -> None:
    model = trained(Remembers())
    model.block[1].train()
    model.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    model.block.register_forward_pre_hook(lambda *_: pytest.fail("a hook ran"))
    modules, before = list(model.modules()), state(model)
    tables = [{k: copy.copy(v) for k, v in vars(module).items()} for module in modules]
    plan_folding(model)
    assert_unchanged(model, before)
    assert (model.seen, model.last, model.calls, float(model.steps)) == ([], None, 0, 0)
    for module, table in zip(modules, tables, strict=True):
        assert vars(module) == table


def test_remembering_model_is_folded() -> None:
    assert len(plan_folding(trained(Remembers())).norms) == 1


# --- What is left alone, and why --------------------------------------------------------------------------------------


class Net(nn.Module):
    """A convolution and a norm with something between, before or beside them."""

    def __init__(
        self, body: Callable[..., Tensor], conv: nn.Module | None = None, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv, self.norm = conv or nn.Conv2d(4, 4, 1), norm or nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 1)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


class Many(Net):
    def forward(self, x: Tensor, a: int = 0, b: int = 0, c: int = 0, d: int = 0) -> Tensor:
        return super().forward(x)


def plain(net: Net, x: Tensor) -> Tensor:
    return net.norm(net.conv(x))


def with_net(change: Callable[[Net], object]) -> Net:
    net = trained(Net(plain))
    change(net)
    return net


class OwnForwardConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class OwnForwardNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def both_outputs(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.norm(y) + y


def in_place(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.add_(1)
    return net.norm(y)


def fail(net: Net, x: Tensor) -> Tensor:
    raise ValueError("no\nmore")


LEFT = {
    "training": (with_net(lambda net: net.norm.train()), "it is in training mode"),
    "no statistics": (Net(plain, norm=nn.BatchNorm2d(4, track_running_stats=False)), "it has no running statistics"),
    "conv twice": (Net(lambda net, x: net.norm(net.conv(net.conv(x)))), "the Conv2d before it is used 2 times"),
    "norm twice": (Net(lambda net, x: net.norm(net.norm(net.conv(x)))), "it is used 2 times"),
    "not called": (Net(lambda net, x: net.conv(x)), "it is not called"),
    "output twice": (Net(both_outputs), "the Conv2d before it has an output that is used 2 times"),
    "output changed": (Net(in_place), "the Conv2d before it has an output that is used 2 times"),
    "weight read": (Net(lambda net, x: plain(net, x) + net.conv.weight.sum()), "the Conv2d before it has tensors that"),
    "statistics read": (Net(lambda net, x: plain(net, x) + net.norm.running_mean.sum()), "it has tensors that the"),
    "weight passed": (
        Net(lambda net, x: plain(net, x) + F.conv2d(x, net.conv._parameters["weight"])),
        "the Conv2d before it is used 2 times",
    ),
    "shared weight": (with_net(lambda net: setattr(net.other, "weight", net.conv.weight)), "shares its parameters"),
    "shared gamma": (with_net(lambda net: setattr(net.other, "bias", net.norm.weight)), "it shares its parameters"),
    "two places": (with_net(lambda net: setattr(net, "other", net.conv)), "before it stands in several places"),
    "conv hook": (with_net(lambda net: net.conv.register_forward_hook(print)), "the Conv2d before it has hooks"),
    "norm hook": (with_net(lambda net: net.norm.register_forward_pre_hook(print)), "it has hooks"),
    "backward hook": (with_net(lambda net: net.norm.register_full_backward_hook(print)), "it has hooks"),
    "weight norm": (with_net(lambda net: parametrizations.weight_norm(net.conv)), "before it is re-parametrized"),
    "pruned": (with_net(lambda net: prune.identity(net.conv, "weight")), "before it is re-parametrized"),
    "conv subclass": (Net(plain, conv=OwnForwardConv(4, 4, 1)), "the OwnForwardConv before it has a forward"),
    "norm subclass": (Net(plain, norm=OwnForwardNorm(4)), "it has a forward of its own (OwnForwardNorm)"),
    "patched": (with_net(lambda net: setattr(net.conv, "forward", net.conv.forward)), "it has a forward of its own"),
    "norm first": (Net(lambda net, x: net.conv(net.norm(x))), "it follows x, not a convolution"),
    "after a sum": (Net(lambda net, x: net.norm(net.conv(x) + x)), "it follows add, not a convolution"),
    "after relu": (Net(lambda net, x: net.norm(net.conv(x).relu())), "it follows relu, not a convolution"),
    "after linear": (Net(plain, nn.Linear(4, 4), nn.BatchNorm1d(4)), "it follows a Linear"),
    "other rank": (Net(plain, nn.Conv1d(4, 4, 1)), "the Conv1d before it does not fit a BatchNorm2d"),
    "other kind": (Net(plain, norm=nn.SyncBatchNorm(4)), "it is a SyncBatchNorm"),
    "lazy": (Net(plain, conv=nn.LazyConv2d(4, 1)), "the LazyConv2d before it holds no values yet"),
    "meta": (Net(plain, conv=nn.Conv2d(4, 4, 1, device="meta")), "the Conv2d before it holds no values yet"),
    "not finite": (with_net(lambda net: net.norm.running_var.fill_(-1)), "weight or bias would not be finite"),
    "untraceable": (Net(lambda net, x: plain(net, x if x.sum() > 0 else -x)), "the model cannot be traced: symbol"),
    "long error": (Net(fail), "the model cannot be traced: no"),
    "many arguments": (Many(plain), "the model cannot be traced: its forward has 4 optional arguments"),
    "no weight": (with_net(lambda net: setattr(net.conv, "weight", None)), "before it has no weight of floats"),
    "wrapped": (with_net(lambda net: setattr(net, "forward", net.forward)), "its forward is not all that runs"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_left_alone(case: str) -> None:
    model, reason = LEFT[case]
    model.train(model.norm.training if case == "training" else False)
    folding = plan_folding(model)
    assert (folding.layers, folding.norms, list(folding.left)) == ({}, {}, ["norm"])
    assert reason in folding.left["norm"]
    assert "more" not in folding.left["norm"]


def test_net_without_obstacles_is_folded() -> None:
    assert_folds(trained(Net(plain)), torch.randn(2, 4, 5, 5), 1)


def test_inside_a_module_with_hooks() -> None:
    """What the hook does to the convolution's output is not known."""
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[0].register_forward_hook(lambda module, args, output: output.relu())
    assert_only_last_is_folded(trained(model), "1", "it follows Sequential, not a convolution")


def assert_only_last_is_folded(model: nn.Module, name: str, reason: str) -> None:
    x = torch.randn(2, 3, 5, 5)
    folding, expected = plan_folding(model), model(x)
    assert folding.left == {name: reason}
    assert list(folding.layers) == [id(model[2])]
    torch.testing.assert_close(apply(model, folding)(x), expected, rtol=1e-4, atol=1e-5)


def test_quantized_layers_stay() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    quantize(model, skip="2")
    assert_only_last_is_folded(model, "1", "it follows QuantConv2d, not a convolution")


class Optional(nn.Module):
    """What stands between convolution and norm depends on an argument."""

    def __init__(self, between: Callable[[Tensor, object], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.between = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), between

    def forward(self, x: Tensor, mask: Tensor | None = None, *, relu: bool = False) -> Tensor:
        return self.norm(self.between(self.conv(x), mask if relu is False else relu))


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda y, given: y if given is not None else y + 1, "it follows add, not a convolution"),
        (lambda y, given: y + 1 if given is not None and given is not True else y, "it follows add, not a convolution"),
        (lambda y, given: y.relu() if given is True else y, "it follows relu, not a convolution"),
        (lambda y, given: y, None),
    ],
)
def test_every_choice_of_optional_arguments_counts(between: Callable, reason: str | None) -> None:
    assert plan_folding(trained(Optional(between))).left.get("norm") == reason


def test_which_convolution_depends_on_an_argument() -> None:
    class Either(Net):
        def forward(self, x: Tensor, first: bool = True) -> Tensor:
            a, b = (self.conv, self.other) if first else (self.other, self.conv)
            return self.norm(a(x)) + b(x)

    left = plan_folding(trained(Either(plain))).left
    assert left == {"norm": "what comes before it depends on the model's arguments"}


def test_part_of_a_module_with_hooks_called_by_itself() -> None:
    model = trained(Net(lambda net, x: net.norm(net.conv[0](x)) + net.conv(x), nn.Sequential(nn.Conv2d(4, 4, 1))))
    model.conv.register_forward_hook(lambda module, args, output: output)
    assert plan_folding(model).left == {"norm": "the Conv2d before it is used 2 times"}


def test_hooks_on_all_modules() -> None:
    with nn.modules.module.register_module_forward_hook(lambda *_: pytest.fail("a hook ran")):
        left = plan_folding(trained(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))))).left
    assert left == {"0.1": "the model cannot be traced: there are hooks on all modules"}


def test_model_without_norms_is_not_traced() -> None:
    calls = []
    model = Net(lambda net, x: calls.append(x), norm=nn.Identity())
    assert plan_folding(model) == ({}, {}, {})
    assert not calls
