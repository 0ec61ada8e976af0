"""Training a model as the quantized one: the same outputs bit for bit, in any training loop, all or nothing."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import Everything, SmallNet, assert_unchanged, state
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import ocs
from ocs.functional import plan_splits
from ocs.nn.base import QuantizedLayer
from ocs.nn.prepared import PreparedLayer
from ocs.plan.options import TrainingOptions

pytestmark = pytest.mark.usefixtures("one_thread")


class Holder(nn.Module):
    """A layer in a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Any) -> Any:
        return self.layer(*inputs)


class Experts(nn.Module):
    """Experts in one parameter [E, C, O], and a forward of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.is_transposed = 3, True
        self.up = nn.Parameter(torch.randn(3, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.up[1] + x @ self.up[2]


def image(*size: int) -> Tensor:
    return torch.randn(2, 8, *size)


def packed() -> PackedSequence:
    return pack_padded_sequence(torch.randn(4, 2, 8), [4, 2])


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "Conv1d": (lambda: nn.Conv1d(8, 6, 3, padding=1, padding_mode="circular"), lambda: (image(9),)),
    "Conv2d": (lambda: nn.Conv2d(8, 6, 3, 2).to(memory_format=torch.channels_last), lambda: (image(7, 7),)),
    "groups": (lambda: nn.Conv2d(8, 6, 3, groups=2), lambda: (image(7, 7),)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), lambda: (image(7, 7),)),
    "pointwise": (lambda: nn.Conv2d(8, 6, 1), lambda: (image(7, 7),)),
    "Conv3d": (lambda: nn.Conv3d(8, 4, 2), lambda: (image(4, 4, 4),)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(8, 6, 3), lambda: (image(9),)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(8, 6, 3, 2, groups=2), lambda: (image(7, 7),)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(8, 6, 2), lambda: (image(4, 4, 4),)),
    "Linear": (lambda: nn.Linear(8, 6), lambda: (torch.randn(3, 5, 8),)),
    "attention": (lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4), lambda: tuple(map(torch.randn, *TOKENS))),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), lambda: (torch.randn(2, 5, 8),)),
    "LSTM": (lambda: nn.LSTM(8, 6, 2, bidirectional=True), lambda: (torch.randn(4, 2, 8),)),
    "proj_size": (lambda: nn.LSTM(8, 6, proj_size=4, batch_first=True), lambda: (torch.randn(4, 2, 8),)),
    "packed": (lambda: nn.LSTM(8, 6, bias=False), lambda: (packed(),)),
    "GRU": (lambda: nn.GRU(8, 6), lambda: (torch.randn(4, 2, 8),)),
    "RNN": (lambda: nn.RNN(8, 6, nonlinearity="relu"), lambda: (torch.randn(4, 2, 8),)),
    "LSTMCell": (lambda: nn.LSTMCell(8, 6), lambda: (torch.randn(2, 8),)),
    "GRUCell": (lambda: nn.GRUCell(8, 6), lambda: (torch.randn(2, 8),)),
    "RNNCell": (lambda: nn.RNNCell(8, 6), lambda: (torch.randn(2, 8),)),
    "experts": (Experts, lambda: (torch.randn(5, 8),)),
}
TOKENS = ((5, 4, 4), (2, 2, 2), (8, 6, 4))
OPTIONS = {
    "two bits": {"wbits": 2, "clip": "mse"},
    "splits": {"wbits": 3, "r": 0.3, "clip": 0.7},
    "searched": {"wbits": 4, "r": 0.3, "granularity": "channel", "thresholds": "searched", "recipe": "best"},
    "even": {"wbits": 4, "r": 0.6, "split": "even", "clip": "mse", "rounding": "squant"},
    "naive": {"wbits": 8, "r": 0.5, "split": "naive", "select": "error", "granularity": "channel", "replan": None},
    "inputs": {"wbits": 5, "abits": 4, "act_clip": "mse", "act_r": 0.2, "act_select": "max", "act_signed": "auto"},
}
CASES = [each for each in itertools.product(KINDS, OPTIONS) if each != ("experts", "inputs")]  # which nobody sees


def leaves(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, PackedSequence):
        return [output.data]
    return [] if output is None else [leaf for part in output for leaf in leaves(part)]


def outputs(net: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad():
        return leaves(net.eval()(*inputs))


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) > 0 and all(map(torch.equal, first, second))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_the_quantized_layer_before_and_after_training(kind: str, options: str) -> None:
    torch.manual_seed(0)
    build, inputs = KINDS[kind]
    net, x, given = Holder(build()), inputs(), {"skip": None, "replan": 2} | OPTIONS[options]
    for parameter in net.parameters():
        if parameter.dim() > 1:
            parameter.data[:, 0] *= 5
    if "abits" in given:
        recurrent = isinstance(net.layer, nn.RNNBase | nn.RNNCellBase)
        given |= {"calibration": lambda model: model(*x), "overrides": {"layer": {"abits": 4}} if recurrent else {}}
    quantized = copy.deepcopy(net)
    ocs.training.prepare(net, **given)
    of_quantize = {name: each for name, each in given.items() if name not in ("thresholds", "replan")}
    ocs.quantize(quantized, **of_quantize, expand=False)
    assert equal(outputs(net, x), outputs(quantized, x))
    optimizer = torch.optim.SGD(net.train().parameters(), 0.05)
    before = outputs(net, x)
    net.train()
    for _ in range(3):
        optimizer.zero_grad()
        sum(each.square().mean() for each in leaves(net(*x))).backward()
        assert all(parameter.grad is not None for parameter in net.parameters())
        optimizer.step()
    trained, expanded = outputs(net, x), copy.deepcopy(net)
    assert not equal(trained, before)
    report = ocs.training.convert(net)
    assert any(type(each) is type(layer) for each in net.modules() for layer in quantized.modules() if layer is not net)
    assert {line.status for line in report.layers} == {"quantized"}
    assert equal(outputs(net, x), trained)
    ocs.training.convert(expanded, expand=True)
    for ours, theirs in zip(outputs(expanded, x), trained, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# --- Loops ------------------------------------------------------------------------------------------------------------

IMAGES, LABELS = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 5


def prepared(**options: Any) -> SmallNet:
    torch.manual_seed(0)
    net = SmallNet()
    ocs.training.prepare(net, **{"wbits": 3, "r": 0.3, "clip": "mse", "replan": 2} | options)
    return net


def momentum(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)


def train(
    net: nn.Module, steps: int, optimizer: Any = None, call: Callable[[Tensor], Tensor] | None = None,
    images: Tensor = IMAGES, labels: Tensor = LABELS,
) -> Any:  # fmt: skip
    optimizer = momentum(net) if optimizer is None else optimizer
    net.train()
    for _ in range(steps):
        loss = F.cross_entropy((net if call is None else call)(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return optimizer


def same_state(first: nn.Module, second: nn.Module) -> bool:
    states = first.state_dict(), second.state_dict()
    return states[0].keys() == states[1].keys() and all(map(torch.equal, *(each.values() for each in states)))


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_resumes_as_if_nothing_had_been(assign: bool) -> None:
    whole = prepared()
    optimizer = train(whole, 3)
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    train(whole, 4, optimizer)
    resumed = prepared()
    resumed.load_state_dict(saved[0], assign=assign)
    optimizer = momentum(resumed)
    optimizer.load_state_dict(saved[1])
    train(resumed, 4, optimizer)
    assert same_state(whole, resumed)


def test_the_state_has_the_float_models_names_and_weights() -> None:
    torch.manual_seed(0)
    net = SmallNet()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    parameters = dict(net.named_parameters())
    ocs.training.prepare(net, wbits=3, r=0.3)
    now = net.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    assert all(dict(net.named_parameters())[name] is each for name, each in parameters.items())
    new = {name.rpartition(".")[2] for name in now.keys() - before.keys()}
    assert new == {"scale", "source", "steps"}


def test_copies_and_pickles_train_on() -> None:
    net = prepared()
    train(net, 2)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for twin in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        assert equal(outputs(twin, (IMAGES,)), outputs(net, (IMAGES,)))
        train(twin, 2)
        assert not equal(outputs(twin, (IMAGES,)), outputs(net, (IMAGES,)))


def test_autocast() -> None:
    net = prepared(wbits=4)
    with torch.autocast("cpu", torch.bfloat16):
        train(net, 4)
    assert net.head.scale.grad is not None
    trained = outputs(net, (IMAGES,))
    ocs.training.convert(net)
    assert equal(outputs(net, (IMAGES,)), trained)


def test_a_model_in_bfloat16() -> None:
    net = prepared().bfloat16().eval()
    net(IMAGES.bfloat16()).sum().backward()
    expected = outputs(net, (IMAGES.bfloat16(),))
    ocs.training.convert(net)
    assert equal(outputs(net, (IMAGES.bfloat16(),)), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_computed_twice_for_gradients_counts_once(reentrant: bool) -> None:
    nets = prepared(), prepared()
    for net in nets:
        net.body[1] = nn.Identity()  # a BatchNorm would see each batch twice

    def call(x: Tensor) -> Tensor:
        hidden = nets[0].stem(x).relu()
        return nets[0].head(checkpoint(nets[0].body, hidden, use_reentrant=reentrant).mean((2, 3)))

    train(nets[0], 5, call=call)
    train(nets[1], 5)
    assert same_state(*nets)


def test_import_leaves_the_compiler_out() -> None:
    """It takes longer to import than torch itself."""
    code = "import ocs, sys; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled() -> None:
    torch._dynamo.reset()
    nets = prepared(), prepared()
    train(nets[0], 4, call=torch.compile(nets[0], backend="eager"))
    train(nets[1], 4)
    for first, second in zip(*(net.state_dict().values() for net in nets), strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("options", [{}, {"abits": 4, "act_clip": "mse", "calibration": [IMAGES]}])
def test_as_a_function_of_its_parameters(options: dict[str, Any]) -> None:
    net = prepared(**options).eval()
    parameters = {name: each.detach() for name, each in net.named_parameters()}

    def total(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, given, (IMAGES,)).square().sum()

    found = torch.func.grad(total)(parameters)
    net(IMAGES).square().sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def train_rank(rank: int, folder: Path) -> dict[str, Tensor]:
    """Train as one of two ranks, on half of the images; returns the state."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        net = prepared()
        net.body[1] = nn.Identity()  # a BatchNorm would see half a batch
        wrapped = DistributedDataParallel(net)
        train(wrapped, 4, images=IMAGES[rank::2], labels=LABELS[rank::2])
        del wrapped  # before its group, whose end would else wait for a thread that waits for the GIL
        gc.collect()
        return net.state_dict()
    finally:
        dist.destroy_process_group()


def test_two_ranks_train_one_model(tmp_path: Path) -> None:
    """Whose gradients are the mean of theirs: the same as one process on all images, splits and all."""
    code = "import sys, torch, pathlib; from test_training import *; torch.set_num_threads(1)\n"
    code += "folder = pathlib.Path(sys.argv[1]); torch.save(train_rank(1, folder), folder / 'state')"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=os.environ | {"PYTHONPATH": path})
    first = train_rank(0, tmp_path)
    assert other.wait(300) == 0
    second, alone = torch.load(tmp_path / "state"), prepared()
    alone.body[1] = nn.Identity()
    train(alone, 4)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5)


# --- Splits and thresholds --------------------------------------------------------------------------------------------


def test_splits_are_planned_anew_as_often_as_asked() -> None:
    for replan, changes in ((None, []), (3, [3, 6])):
        net = prepared(replan=replan, skip=["stem", "body*"])
        layer, found, optimizer = net.head, [], momentum(net)
        for step in range(1, 8):
            with torch.no_grad():
                layer._parameters["weight"].copy_(torch.randn(5, 16))
                layer._parameters["weight"][:, step] *= 9
            before = layer.source.tolist()
            net.train()(IMAGES)
            net(IMAGES)  # calls change nothing
            if layer.source.tolist() != before:
                found.append(step)
                assert torch.equal(layer.source, plan_splits(layer._parameters["weight"], 0.3).source)
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].mul_(1.0)
                net.eval()(IMAGES)
        assert found == changes


@pytest.mark.parametrize("how", ["foreach", "fused", "data"])
def test_whoever_writes_the_weights_counts(how: str) -> None:
    net = prepared(replan=5)
    if how == "data":
        for _ in range(3):
            net(IMAGES)
            for parameter in net.parameters():
                parameter.data.add_(0.01)
    else:
        train(net, 3, torch.optim.AdamW(net.parameters(), 0.01, **{how: True}))
    net(IMAGES)
    assert net.head.steps == 3


def test_prepare_has_the_options_of_quantize() -> None:
    of_quantize, ours = (dict(inspect.signature(each).parameters) for each in (ocs.quantize, ocs.training.prepare))
    own = {each.name: each.default for each in fields(TrainingOptions)}
    assert {name: each.default for name, each in ours.items() if name not in of_quantize} == own
    for name in ours.keys() - own.keys():
        assert ours[name].default is of_quantize[name].default or ours[name].default == of_quantize[name].default
    assert all(f"\n        {name}: " in ocs.training.prepare.__doc__ for name in ours)


@pytest.mark.parametrize("clip", ["mse", "auto"])  # "auto" depends on how deep the model is
def test_thresholds_are_searched_with_the_splits(clip: str) -> None:
    net = prepared(clip=clip, thresholds="searched", replan=1, granularity="channel")
    train(net, 3)
    net.train()(IMAGES)
    twin = SmallNet()
    twin.load_state_dict({name: each for name, each in net.state_dict().items() if name in twin.state_dict()})
    ocs.quantize(twin, wbits=3, r=0.3, clip=clip, granularity="channel", expand=False)
    assert equal(outputs(net, (IMAGES,)), outputs(twin, (IMAGES,)))
    assert not any(name.endswith("scale") for name, _ in net.named_parameters())


def test_what_is_frozen_learns_no_scale() -> None:
    torch.manual_seed(0)
    net = SmallNet()
    net.head.requires_grad_(False)
    ocs.training.prepare(net, wbits=3)
    assert not net.head.scale.requires_grad
    assert net.body[0].scale.requires_grad


# --- All or nothing, and what the model says --------------------------------------------------------------------------


def test_everything_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Everything().eval()
    inputs = net.inputs()
    report = ocs.training.prepare(net, wbits=4, r=0.2)
    reasons = {line.name: line.reason for line in report.layers if line.status != "quantized"}
    assert reasons.keys() == {"net.stem", "embedding", "decoder"}
    assert "shared with" in reasons["decoder"]
    assert net.again is net.net.head
    assert isinstance(net.again, PreparedLayer)
    before, twin = outputs(net, inputs), copy.deepcopy(net)
    converted = ocs.training.convert(net)
    assert "9 layers quantized (17 weights), 3 left float" in str(report)
    assert equal(outputs(net, inputs), before)
    assert net.again is net.net.head
    assert not any(isinstance(each, PreparedLayer) for each in net.modules())
    for total in ("packed_bytes", "model_bytes", "weight_bytes", "float_weight_bytes", "file_bytes"):
        assert getattr(converted, total) == getattr(report, total) > 0, total
    assert {line.clip for line in converted.quantized} == {"learned"}
    ocs.save(net, tmp_path / "model")
    other = Everything().eval()
    ocs.load(tmp_path / "model", other)
    assert equal(outputs(other, inputs), before)
    ocs.training.convert(twin, expand=True)
    ocs.pack(twin)


def test_a_failure_leaves_the_model_as_it_was(net: SmallNet) -> None:
    with torch.no_grad():
        net.head.weight[0, 0] = torch.inf
    before = state(net)
    with pytest.raises(ValueError, match="head: w holds NaN"):
        ocs.training.prepare(net, wbits=4)
    assert_unchanged(net, before)
    diverged = prepared()
    with torch.no_grad():
        diverged.head._parameters["weight"][0, 0] = torch.inf
    before = state(diverged)
    with pytest.raises(ValueError, match="head: weight or its scale holds NaN or Inf: training diverged"):
        ocs.training.convert(diverged)
    assert_unchanged(diverged, before)
    assert not outputs(diverged, (IMAGES,))[0].isfinite().all()


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no option": (lambda: prepared(bits=3), TypeError, "prepare has no option 'bits': the nearest is wbits"),
    "gptq": (lambda: prepared(rounding="gptq"), ValueError, "body.0: rounding='gptq' is not for training"),
    "group": (lambda: prepared(granularity="group"), ValueError, "body.0: granularity='group' is not for training"),
    "auto": (lambda: prepared(wbits="auto"), ValueError, "body.0: wbits='auto' is not for training"),
    "oracle": (
        lambda: prepared(overrides={"head": {"abits": 4, "act_split": "oracle"}}), ValueError, "act_split='oracle'",
    ),
    "no calibration": (lambda: prepared(abits=4), ValueError, "abits=4 needs calibration="),
    "replan": (lambda: prepared(replan=0), ValueError, "replan=0: use a positive number of training steps, or None"),
    "thresholds": (lambda: prepared(thresholds="fixed"), ValueError, "thresholds='fixed': use 'learned' or 'searched'"),
    "twice": (lambda: ocs.training.prepare(prepared()), ValueError, "body.0: prepared already"),
    "quantize": (lambda: ocs.quantize(prepared()), ValueError, "prepared for training: ocs.training.convert"),
    "not prepared": (lambda: ocs.training.convert(SmallNet()), ValueError, "no prepared layer: call ocs.training"),
    "a layer": (lambda: ocs.training.convert(prepared().head), TypeError, "cannot replace itself in place"),
    "no model": (lambda: ocs.training.convert(3), TypeError, "model must be an nn.Module, not int"),
    "hidden states": (
        lambda: ocs.training.prepare(
            Holder(nn.LSTM(4, 4)), act_scale="dynamic", overrides={"layer": {"abits": 8}}, abits=8
        ), ValueError, "act_scale='dynamic' quantizes hidden states",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case: str) -> None:
    call, kind, text = ERRORS[case]
    with pytest.raises(kind, match=text):
        call()


def test_what_cannot_be_trained_stays_float_with_its_reason() -> None:
    with torch.inference_mode():
        made = nn.Linear(4, 4)
    wrapped, other = nn.Linear(4, 4), nn.Linear(4, 4)
    wrapped.forward = wrapped.forward
    net = nn.Sequential(made, wrapped, other, nn.Linear(4, 20), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    report = ocs.training.prepare(net, wbits=8, overrides={"2": {"wbits": 4}})
    reasons = [line.reason for line in report.layers if line.status == "float"]
    assert [any(part in reason for reason in reasons) for part in ("inference", "instance", "parametrize")] == [
        True
    ] * 3
    assert [line.bits for line in report.quantized] == [4, 8]


def test_gradients_reach_every_weight_of_a_model_that_learns() -> None:
    net = prepared(wbits=2, granularity="channel")
    losses = []

    def call(x: Tensor) -> Tensor:
        losses.append(F.cross_entropy(y := net(x), LABELS).item())
        return y

    train(net, 60, torch.optim.Adam(net.parameters(), 0.01), call)
    assert losses[-1] < 0.5 * losses[0]
    assert isinstance(net.head, nn.Linear)
    assert not isinstance(net.head, QuantizedLayer)
    assert all(
        parameter.grad is not None for parameter in itertools.chain(net.body.parameters(), net.head.parameters())
    )


def test_embeddings_train_where_an_override_asks_for_it() -> None:
    for sparse in (False, True):
        net = nn.Sequential(nn.Embedding(20, 8, padding_idx=2, sparse=sparse), nn.Linear(8, 16))
        report = ocs.training.prepare(net, wbits=4, overrides={"0": {"wbits": 3}})
        words = torch.arange(20)
        net(words).square().sum().backward()
        before = outputs(net, (words,))
        ocs.training.convert(net)
        assert equal(outputs(net, (words,)), before)
        assert [line.reason for line in report.layers] == ["its gradients are sparse" if sparse else "", ""]
        assert isinstance(net[0], QuantizedLayer) is not sparse
