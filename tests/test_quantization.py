"""quantize(): what is rewritten, what is left alone and why, and that a failure leaves the model as it was."""

from __future__ import annotations

import copy
import importlib
import io
import json
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import Everything, SmallNet, assert_unchanged, state
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import ocs
from ocs import functional
from ocs.nn import QuantConv2d, QuantLinear

quantize_module = importlib.import_module("ocs.plan.quantize_layer")


def by_name(report: ocs.Report) -> dict[str, ocs.LayerReport]:
    return {layer.name: layer for layer in report.layers}


def test_rewrites_in_place(net: SmallNet) -> None:
    float_net, x = copy.deepcopy(net), torch.randn(4, 3, 8, 8)
    report = ocs.quantize(net, wbits=8, r=0.1)
    assert isinstance(net.stem, nn.Conv2d)
    assert isinstance(net.body[0], QuantConv2d)
    assert isinstance(net.head, QuantLinear)
    assert isinstance(net.body[1], nn.BatchNorm2d)
    assert {name: layer.status for name, layer in by_name(report).items()} == {
        "stem": "skipped", "body.0": "quantized", "body.3": "quantized", "body.5": "quantized", "head": "quantized"
    }  # fmt: skip
    torch.testing.assert_close(net(x), float_net(x), rtol=0.02, atol=0.02)


def test_every_option_reaches_the_layer(net: SmallNet) -> None:
    options = {"r": 0.25, "clip": 0.8, "granularity": "channel", "split": "naive"}
    weight = net.head.weight.detach().clone()
    ocs.quantize(net, wbits=3, expand=False, **options)
    expected = functional.quantize_weight(weight, 3, **options)
    assert torch.equal(net.head.weight_int, expected.ints)
    assert torch.equal(net.head.scale, expected.scale)
    assert torch.equal(net.head.source, expected.source)
    assert torch.equal(net.head.weight, functional.fold(expected, 16))


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (ocs.FIRST_LAYER, {"stem"}),
        (None, set()),
        ((), set()),
        ("head", {"head"}),
        ("body.*", {"body.0", "body.3", "body.5"}),
        (nn.Linear, {"head"}),
        ([ocs.FIRST_LAYER, "head"], {"stem", "head"}),
        (lambda name, module: getattr(module, "groups", 1) > 1, {"body.3", "body.5"}),
    ],
)
def test_skip(net: SmallNet, skip: object, left: set[str]) -> None:
    report = ocs.quantize(net, skip=skip)
    assert {layer.name for layer in report.layers if layer.status == "skipped"} == left
    assert all(layer.reason for layer in report.layers if layer.status == "skipped")


def test_first_layer_is_a_convolution_never_a_linear() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    assert len(ocs.quantize(model).quantized) == 2


def test_overrides(net: SmallNet) -> None:
    report = by_name(ocs.quantize(net, wbits=4, r=0.1, overrides={"body.*": {"wbits": 8}, "body.3": {"r": 0.0}}))
    assert (report["body.0"].bits, report["body.3"].bits, report["head"].bits) == (8, 8, 4)
    assert (report["body.0"].splits, report["body.3"].splits, report["head"].splits) == (1, 0, 2)


def test_rounding_of_one_layer(net: SmallNet) -> None:
    """Squant rounds every kind of layer; an override, one alone; the report tells."""
    ours = {}
    for name, options in {
        "nearest": {},
        "squant": {"rounding": "squant"},
        "head": {"overrides": {"head": {"rounding": "squant"}}},
    }.items():
        ours[name] = copy.deepcopy(net)
        report = ocs.quantize(ours[name], wbits=3, r=0.1, **options)
        assert report.settings["rounding"] == options.get("rounding", "nearest")
    ints = {name: {n: b for n, b in model.named_buffers() if n.endswith("_int")} for name, model in ours.items()}
    assert not any(torch.equal(ints["squant"][layer], ints["nearest"][layer]) for layer in ints["nearest"])
    same = [layer for layer in ints["head"] if torch.equal(ints["head"][layer], ints["nearest"][layer])]
    assert same == [layer for layer in ints["head"] if layer != "head.weight_int"]
    assert torch.equal(ints["head"]["head.weight_int"], ints["squant"]["head.weight_int"])


def test_training_mode_hooks_and_gradients_are_kept(net: SmallNet) -> None:
    seen = []
    net.head.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    net.train()
    ocs.quantize(net, wbits=5, r=0.1)
    assert all(module.training for module in net.modules())
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    assert seen == [QuantLinear]
    assert net.stem.weight.grad is not None


def test_public_attributes_are_kept(net: SmallNet) -> None:
    """A hook may read them."""
    net.head.gain = 0.5
    net.head.register_forward_hook(lambda module, args, output: module.gain * output)
    x = torch.randn(2, 3, 8, 8)
    expected = net(x)
    ocs.quantize(net, wbits=8)
    assert (net.head.gain, net.body[0].transposed, net.head.bits) == (0.5, False, 8)
    torch.testing.assert_close(net(x), expected, rtol=0.05, atol=0.05)


def test_a_module_used_twice_is_replaced_in_both_places() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": shared})
    report = ocs.quantize(model)
    assert model["a"][0] is model["b"]
    assert isinstance(model["b"], QuantLinear)
    assert len(report.layers) == 1


class Doubled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A subclass that computes the same."""


class LowRank(nn.Linear):
    """A subclass with a child of its own, as adapters have."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.adapter = nn.Linear(4, 4)


def without_a_weight() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = None
    return model


def with_a_buffer() -> nn.Module:
    """A mask that a hook applies."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].register_buffer("mask", torch.zeros(4))
    return model


def wrapped() -> nn.Module:
    """A forward replaced on the instance, as offloading wrappers do."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plain = model[0].forward
    model[0].forward = lambda x: plain(2 * x)
    return model


def pruned_bias() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "bias", 0.5)
    return model


def tied() -> nn.Module:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "output": nn.Linear(4, 5), "other": nn.Linear(4, 4)})
    model["output"].weight = model["embedding"].weight
    return model


class OwnAttention(nn.MultiheadAttention):
    """A subclass that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x, x, x)[0]


def tied_recurrent() -> nn.Module:
    """One recurrent weight for both layers of a stack."""
    model = nn.Sequential(nn.GRU(4, 4, 2), nn.Linear(4, 4))
    model[0].weight_hh_l1 = model[0].weight_hh_l0
    return model


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


LEFT_ALONE = {
    "tied": (tied, "output", "shared with embedding"),
    "embedding": (tied, "embedding", "shared with output"),
    "pruned": (pruned, "0", "re-parametrized"),
    "weight_norm": (lambda: nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4)),
                    "0", "re-parametrized"),
    "pruned bias": (pruned_bias, "0", "re-parametrized"),
    "wrapped": (wrapped, "0", "forward of its own"),
    "adapter": (lambda: nn.Sequential(LowRank()), "0", "LowRank has adapter of its own besides what Linear has"),
    "no weight": (without_a_weight, "0", "it has no weight"),
    "own buffer": (with_a_buffer, "0", "Linear has mask of its own besides"),
    "own forward": (lambda: nn.Sequential(Doubled(4, 4), nn.Linear(4, 4)), "0", "forward of its own"),
    "tied recurrent": (tied_recurrent, "0", "its weight_hh_l0 is shared with 0.weight_hh_l1"),
    "weight_norm on an LSTM": (lambda: nn.Sequential(weight_norm(nn.LSTM(4, 4), "weight_hh_l0"), nn.Linear(4, 4)),
                               "0", "re-parametrized"),
    "own attention": (lambda: nn.Sequential(OwnAttention(8, 2), nn.Linear(8, 8)), "0", "forward of its own"),
    "complex": (lambda: nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 4)), "0", "complex64"),
}  # fmt: skip


LESS_THAN_HALF = {"tied", "embedding", "tied recurrent", "weight_norm on an LSTM", "own attention"}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone_with_the_reason(case: str) -> None:
    build, name, reason = LEFT_ALONE[case]
    model = build()
    before = model.get_submodule(name)
    warned = pytest.warns(UserWarning, match="of the matmul weights") if case in LESS_THAN_HALF else nullcontext()
    with warned:
        layer = by_name(ocs.quantize(model, skip=None))[name]
    assert layer.status == "float"
    assert reason in layer.reason
    assert model.get_submodule(name) is before


def test_a_parametrization_is_listed_once_under_its_layer() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert [layer.name for layer in ocs.quantize(model).layers] == ["0", "1"]


def test_what_its_parent_reads_runs_folded() -> None:
    """Of the float layer's shape, whether it is called or read."""
    model = nn.ModuleDict({"a": nn.TransformerEncoderLayer(8, 2, 16), "b": nn.Linear(8, 8)})
    report = by_name(ocs.quantize(model, r=0.5))
    reasons = {name: layer.reason for name, layer in report.items()}
    assert reasons == {
        "a.self_attn": "runs folded: its forward reads its weights itself",
        "a.self_attn.out_proj": "runs folded: MultiheadAttention reads its weight itself",
        "a.linear1": "runs folded: TransformerEncoderLayer reads its weight itself",
        "a.linear2": "runs folded: TransformerEncoderLayer reads its weight itself",
        "b": "",
    }
    assert [layer.expand for layer in (model["a"].linear1, model["b"])] == [False, True]
    assert all(layer.splits > 0 for layer in report.values())


def test_a_subclass_that_only_renames_is_quantized() -> None:
    model = nn.Sequential(Renamed(4, 4))
    assert ocs.quantize(model).layers[0].kind == "Renamed"
    assert isinstance(model[0], QuantLinear)


def test_half_precision_models(net: SmallNet) -> None:
    net.bfloat16()
    ocs.quantize(net, wbits=8, r=0.1)
    assert net.head.weight.dtype == torch.bfloat16
    assert net.head.scale.dtype == torch.float32
    assert net(torch.randn(1, 3, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def poisoned(value: float) -> Callable[[SmallNet], None]:
    def poison(net: SmallNet) -> None:
        net.body[3].weight.data[0, 1, 0, 0] = value

    return poison


def nothing(net: SmallNet) -> None:
    pass


ERRORS = [
    (nothing, {"wbits": 9}, ValueError, "wbits=9: use an integer from 2 to 8"),
    (nothing, {"wbits": "4"}, ValueError, "wbits='4'"),
    (nothing, {"wbits": None}, ValueError, "wbits=None: use an integer from 2 to 8"),
    (nothing, {"r": None}, ValueError, "r=None: use a number"),
    (nothing, {"select": None}, ValueError, "select=None: use 'max'"),
    (nothing, {"correct_bias": None}, ValueError, "correct_bias=None: use True or False"),
    (nothing, {"r": 2}, ValueError, "r=2: use a number"),
    (nothing, {"clip": "mse2"}, ValueError, "clip='mse2'"),
    (nothing, {"granularity": "row"}, ValueError, "granularity='row'"),
    (nothing, {"split": "quantization-aware"}, ValueError, "split='quantization-aware'"),
    (nothing, {"rounding": "stochastic"}, ValueError, "rounding='stochastic'"),
    (nothing, {"rounding": "squant", "split": "naive"}, ValueError, "rounding='squant' with split='naive'"),
    (nothing, {"split": "naive", "overrides": {"head": {"rounding": "squant"}}}, ValueError,
     r"head: overrides\['head'\]: rounding='squant' with split='naive': .* use split='qa'"),
    (nothing, {"expand": 1}, ValueError, "expand=1: use True"),
    (nothing, {"skip": "heda"}, ValueError, "skip='heda': no layer has that name; the layers are stem, body.0"),
    (nothing, {"skip": 3}, TypeError, "skip=3: use ocs.FIRST_LAYER"),
    (nothing, {"overrides": {"tail.*": {"wbits": 3}}}, ValueError, r"overrides='tail.\*': no layer has that name"),
    (nothing, {"overrides": {"head": {"bits": 3}}}, ValueError, r"overrides\['head'\]: unknown option 'bits'; use"),
    (nothing, {"overrides": {"head": {"wbits": 1}}}, ValueError, r"head: overrides\['head'\]: wbits=1"),
    (nothing, {"overrides": ["head"]}, TypeError, "use a dict from names or patterns to dicts of options"),
    (nothing, {"overrides": {"head": 8}}, TypeError, "overrides={'head': 8}: use a name"),
    (nothing, {"overrides": {5: {}}}, TypeError, "overrides={5: {}}: use a name"),
    (nothing, {"skip": nn.Linear(2, 2)}, TypeError, "skip=Linear.*use ocs.FIRST_LAYER"),
    (poisoned(float("nan")), {}, ValueError, r"body.3: w holds NaN or Inf as float32 \(in input channel 1\)"),
    (poisoned(float("inf")), {}, ValueError, "body.3: w holds NaN or Inf"),
    (lambda net: net.body[3].to("meta"), {}, ValueError, "body.3: its weight holds no values yet"),
    (lambda net: setattr(net, "head", nn.LazyLinear(4)), {}, ValueError, "head: its weight holds no values yet"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(("damage", "options", "error", "message"), ERRORS, ids=[case[3] for case in ERRORS])
def test_an_error_names_the_place_and_changes_nothing(net: SmallNet, damage, options, error, message: str) -> None:
    damage(net)
    identities = [id(module) for module in net.modules()]
    with pytest.raises(error, match=message):
        ocs.quantize(net, **options)
    assert [id(module) for module in net.modules()] == identities


@pytest.mark.parametrize("at", range(9))
@pytest.mark.parametrize("failure", [MemoryError, KeyboardInterrupt])
def test_a_failure_at_any_layer_changes_nothing(monkeypatch, at: int, failure: type) -> None:
    model = Everything()
    calls, quantize_layer, before = [], quantize_module.quantize_layer, state(model)

    def fail_at(*args: object, **options: object) -> object:
        calls.append(args)
        if len(calls) > at:
            raise failure
        return quantize_layer(*args, **options)

    monkeypatch.setattr(quantize_module, "quantize_layer", fail_at)
    with pytest.raises(failure):
        ocs.quantize(model, wbits=4, r=0.1)
    assert_unchanged(model, before)


def test_no_layer_is_left_out_above() -> None:
    assert len({line.name for line in ocs.quantize(Everything()).quantized}) == 9


def test_a_failure_while_swapping_is_undone(net: SmallNet) -> None:
    """The one moment at which the model is neither: a module container that refuses."""

    class Refusing(dict):
        def __setitem__(self, key: str, value: object) -> None:
            if key == "5" and isinstance(value, QuantConv2d):
                swapped.extend(type(layer) for layer in (net.head, net.body[0], net.body[3]))
                raise RuntimeError("refused")
            super().__setitem__(key, value)

    swapped: list[type] = []
    net.body._modules = Refusing(net.body._modules)
    before = state(net)
    with pytest.raises(RuntimeError, match="refused"):
        ocs.quantize(net)
    assert swapped == [QuantLinear, QuantConv2d, QuantConv2d]
    assert_unchanged(net, before)


def test_names_are_compared_before_patterns() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a[0]": nn.Linear(2, 2), "b": shared, "c": shared, "d": nn.Linear(2, 2)})
    report = by_name(ocs.quantize(model, skip=["a[0]", "c"]))
    assert {name for name, layer in report.items() if layer.status == "skipped"} == {"a[0]", "b"}


def test_an_override_of_a_skipped_layer_is_not_silent(net: SmallNet) -> None:
    report = by_name(ocs.quantize(net, overrides={"stem": {"wbits": 8}, "head": {"wbits": 4}}))
    assert report["stem"].reason.endswith("its override was not used")


def test_layers_without_values_may_be_skipped(net: SmallNet) -> None:
    net.body[3].to("meta")
    assert len(ocs.quantize(net, skip=[ocs.FIRST_LAYER, "body.3"]).quantized) == 3


def test_numbers_of_numpy_and_a_copied_sentinel(net: SmallNet) -> None:
    report = ocs.quantize(
        net,
        wbits=np.int64(4),
        r=np.float32(0.25),
        clip=np.float64(0.5),
        skip=copy.deepcopy(ocs.FIRST_LAYER),
        overrides={"head": {"r": np.float32(0.5)}},
    )
    assert json.loads(report.to_json())["settings"]["wbits"] == 4
    assert report.layers[0].status == "skipped"


def test_models_that_cannot_be_quantized(net: SmallNet) -> None:
    with pytest.raises(TypeError, match=r"model must be an nn.Module, not dict"):
        ocs.quantize({})
    with pytest.raises(TypeError, match="wrap it"):
        ocs.quantize(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="Sequential has no convolution, linear, recurrent or"):
        ocs.quantize(nn.Sequential(nn.ReLU()))
    ocs.quantize(net)
    with pytest.raises(ValueError, match=r"body\.0: already quantized"):
        ocs.quantize(net)
    with pytest.raises(ValueError, match="model: already quantized"):
        ocs.quantize(net.head)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_modules_are_refused(net: SmallNet) -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(TypeError, match="ScriptModule"):
        ocs.quantize(scripted)


def test_nothing_is_written_to_the_original_weights(net: SmallNet) -> None:
    weights = [p.detach() for p in net.parameters()]
    before = [w.clone() for w in weights]
    ocs.quantize(net, wbits=2, r=1.0)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_saved_state_of_a_quantized_model_loads(net: SmallNet) -> None:
    other = copy.deepcopy(net)
    ocs.quantize(net, wbits=4, r=0.1)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for p in other.parameters():
            p.normal_()
    ocs.quantize(other, wbits=4, r=0.1, expand=False)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(other(x), net(x))


@pytest.mark.parametrize("progress", [None, True, False])
def test_progress(net: SmallNet, progress: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    ocs.quantize(net, progress=progress)
    assert bool(capsys.readouterr().err) == bool(progress)
