"""All or nothing holds for interrupts, too: at any line of the package, and at any time."""

from __future__ import annotations

import math
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.eval_frame as frames
from conftest import header_of, repeats
from safetensors.torch import load_file
from torch import Tensor, nn

import ocs
from ocs.formats.contents import crc32
from ocs.model.batchnorm_folding import FoldedBatchNorm
from ocs.nn.base import QuantizedLayer
from ocs.nn.packed.layer import PackedLayer
from ocs.nn.prepared import PreparedLayer

pytestmark = pytest.mark.usefixtures("one_thread")
REPEATS = repeats(12, 300)  # of each case
PACKAGE = str(Path(ocs.__file__).parent)


class Interruption(BaseException):
    """Raised at some line."""


class Net(nn.Module):
    """Convolutions, norms, a block that torch may fuse, and a second reference to a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.block = nn.TransformerEncoderLayer(4, 1, 8, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.last = (self.head,)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.last[0](self.block(x.flatten(2).mT))


class Case(NamedTuple):
    """A call on a model, and whether the model is then what it is to become."""

    call: Callable[[nn.Module], Any]
    is_done: Callable[[nn.Module], bool] = lambda model: False  # it never changes
    model: Callable[[], nn.Module] = lambda: fresh()


def images(seed: int) -> Tensor:
    return torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(seed))


def fresh() -> Net:
    torch.manual_seed(1)
    net = Net().eval()
    net.block.train()
    return net


def is_quantized(model: Net) -> bool:
    layers = (model.stem, model.block.self_attn, model.block.linear1, model.block.linear2, model.head)
    return all(isinstance(layer, QuantizedLayer) for layer in layers) and model.last[0] is model.head


def is_folded(model: Net) -> bool:
    return is_quantized(model) and isinstance(model.norm, FoldedBatchNorm)


def quantized() -> Net:
    net = fresh()
    ocs.quantize(net, **ALL, fold_bn=True)
    return net


def is_packed(model: Net) -> bool:
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    return is_quantized(model) and all(isinstance(layer, PackedLayer) for layer in layers)


def is_unpacked(model: Net) -> bool:
    return is_quantized(model) and not any(isinstance(module, PackedLayer) for module in model.modules())


def is_lowered(model: Net) -> bool:
    return not any(isinstance(module, QuantizedLayer) for module in model.modules())


def prepared() -> Net:
    net = fresh()
    ocs.training.prepare(net, **ALL)
    return net


def is_prepared(model: Net) -> bool:
    return sum(isinstance(module, PreparedLayer) for module in model.modules()) == 6


def is_reestimated(model: Net) -> bool:
    twin = fresh()
    ocs.reestimate_batchnorm(twin, BATCHES)
    return all(torch.equal(a, b) for a, b in zip(twin.buffers(), model.buffers(), strict=True))


BATCHES = [images(1), images(2)]
ALL = {"skip": None, "wbits": 4, "r": 0.3}
OPTIONS = {"recipe": "best", "allocate": "error", "abits": 8, "calibration": BATCHES, "correct_bias": True}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    path, model = tmp_path_factory.mktemp("interrupts") / "model", quantized()
    ocs.save(model, path)
    FILES[path] = header_of(path)  # sums of all tensors, too
    return {
        "quantize": Case(lambda net: ocs.quantize(net, **ALL, fold_bn=True), is_folded),
        "quantize by data": Case(lambda net: ocs.quantize(net, **ALL, **OPTIONS), is_quantized),
        "equalize": Case(lambda net: ocs.quantize(net, **ALL, equalize=True), is_quantized),
        "calibrate": Case(lambda net: ocs.calibrate(net, BATCHES, moments=True)),
        "load": Case(lambda net: ocs.load(path, net), is_folded),
        "load packed": Case(lambda net: ocs.load(path, net, packed=True), is_packed),
        "pack": Case(ocs.pack, is_packed, quantized),
        "unpack": Case(ocs.unpack, is_unpacked, lambda: ocs.pack(quantized())),
        "reestimate": Case(lambda net: ocs.reestimate_batchnorm(net, BATCHES), is_reestimated),
        "prepare": Case(lambda net: ocs.training.prepare(net, **ALL), is_prepared),
        "convert": Case(ocs.training.convert, is_quantized, prepared),
        "compare": Case(lambda net: ocs.compare(net, model, BATCHES)),
        "save": Case(lambda net: ocs.save(net, path), model=quantized),
        "lower": Case(ocs.lower, is_lowered, quantized),
        "export": Case(
            lambda net: ocs.export(net, path.with_name("m.pt2"), images(1), form="program"), model=quantized
        ),
        "synthesize": Case(lambda net: ocs.synthesize(net, (2, 5, 5), images=2, steps=2)),
    }


NAMES = [
    "quantize", "quantize by data", "equalize", "calibrate", "load", "load packed", "pack", "unpack",
    "reestimate", "prepare", "convert", "compare", "save", "lower", "synthesize",
]  # fmt: skip
NAMES += ["export"] * repeats(0, 1)  # which takes a second, each time
FILES: dict[Path, dict[str, Any]] = {}  # what is in them, and stays


def of_torch() -> tuple[Any, ...]:
    """What torch and others keep for the whole process, or this thread."""
    flags = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.backends.mha.get_fastpath_enabled())
    patched = (
        nn.Module.__call__,
        nn.Module.__getattr__,
        math.sqrt,
        torch.fx._symbolic_trace._is_fx_tracing_flag,
    )
    return (*flags, *patched, frames._stance, torch._C._len_torch_function_stack())


def state(model: nn.Module) -> tuple[Any, ...]:
    """Everything of the model that could change, by identity and value."""
    of_modules = []
    for name, module in model.named_modules():
        values = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        of_modules.append((name, type(module), module, values))
    tensors = [*model.parameters(), *model.buffers()]
    return of_modules, tensors, [t.clone() for t in tensors]


def same(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    structure = [[(*each[:2], id(each[2]), each[3].keys()) for each in modules] for modules, _, _ in (before, after)]
    flat = [
        [(key, each) for *_, values in modules for key, value in values.items() for each in _flat(value)]
        for modules, _, _ in (before, after)
    ]
    return (
        structure[0] == structure[1]
        and [(key, _identity(each)) for key, each in flat[0]] == [(key, _identity(each)) for key, each in flat[1]]
        and all(a is b for a, b in zip(before[1], after[1], strict=True))
        and all(torch.equal(a, b) for a, b in zip(before[2], after[2], strict=True))
    )


def _flat(value: Any) -> Iterator[Any]:
    yield from [*value, *value.values()] if isinstance(value, dict) else [value]


def _identity(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else id(value)


def interrupted(case: Case, call: Callable[[Callable[[], Any]], Any]) -> bool:
    """Run the case on a fresh model, interrupted by `call`: the model is as it was, or done."""
    model = case.model()
    before, globals_before = state(model), of_torch()
    try:
        call(lambda: case.call(model))
        raised = False
    except BaseException:  # noqa: BLE001 - what is interrupted may raise what it likes
        raised = True
    assert of_torch() == globals_before
    unchanged = same(before, state(model))
    assert unchanged or case.is_done(model)
    for path, header in FILES.items():
        assert header_of(path) == header
        assert {name: crc32(tensor) for name, tensor in load_file(path).items()} == header["tensors"]
    return raised


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # between open() and `with`: the file is closed as it is dropped
@pytest.mark.parametrize("name", NAMES)
def test_an_exception_at_any_line(cases: dict[str, Case], name: str) -> None:
    def at(line: int) -> Callable[[Callable[[], Any]], Any]:
        def call(body: Callable[[], Any]) -> None:
            nonlocal count
            count = 0

            def trace(frame: Any, event: str, arg: Any) -> Any:
                nonlocal count
                if not frame.f_code.co_filename.startswith(PACKAGE):
                    return None
                if event == "line":
                    count += 1
                    if count == line:
                        raise Interruption
                return trace

            before = sys.gettrace()
            sys.settrace(trace)
            try:
                body()
            finally:
                sys.settrace(before)

        return call

    count = 0
    interrupted(cases[name], at(0))  # what is imported on the way is imported now
    interrupted(cases[name], at(0))
    lines, chance = count, random.Random(name)
    for _ in range(REPEATS):
        interrupted(cases[name], at(chance.randint(1, lines)))
    for line in range(max(lines - REPEATS, 1), lines + 1):  # the last ones are those that change the model
        interrupted(cases[name], at(line))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_at_any_time(cases: dict[str, Case], name: str) -> None:
    chance, seconds = random.Random(name), 0.0

    def timed(body: Callable[[], Any]) -> None:
        nonlocal seconds
        signal.setitimer(signal.ITIMER_REAL, 100)
        try:
            body()
        finally:
            seconds = 100 - signal.getitimer(signal.ITIMER_REAL)[0]
            signal.setitimer(signal.ITIMER_REAL, 0)

    def soon(body: Callable[[], Any]) -> None:
        try:
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, seconds))
            body()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        interrupted(cases[name], timed)
        interrupted(cases[name], timed)
        raised = [interrupted(cases[name], soon) for _ in range(REPEATS)]
        assert any(raised)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
