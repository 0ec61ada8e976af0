"""Every public function in eight threads at once, which take turns a hundred thousand times a second: as if alone.

Each has models of its own: those that watch a model run would see what others have it do.
"""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, get_ident
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import outlier_weight, repeats
from torch import Tensor, nn

import ocs
from ocs import functional, training

pytestmark = pytest.mark.usefixtures("one_thread")
ROUNDS = repeats(3, 100)
BATCHES = [torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
W = outlier_weight((6, 8, 3))
PLAN = functional.plan_splits(W, 0.3)
WEIGHT = functional.quantize_weight(W, 4, 0.3)
STEP_SCHEME = functional.Scheme(4)
STEP = functional.quantize_plan(W, PLAN, STEP_SCHEME)
ALL = {"skip": None, "wbits": 4, "r": 0.3}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16)
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu())


def made() -> Net:
    torch.manual_seed(0)
    return Net().eval()


FLOAT = made()
QUANTIZED = copy.deepcopy(FLOAT)
ocs.quantize(QUANTIZED, **ALL, abits=8, calibration=BATCHES)
PACKED = ocs.pack(copy.deepcopy(QUANTIZED))
PREPARED = copy.deepcopy(FLOAT)
training.prepare(PREPARED, **ALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ocs.save(QUANTIZED, tmp_path / "model")
    safetensors.torch.save_file(FLOAT.state_dict(), tmp_path / "float.safetensors")
    return tmp_path


def changed(model: nn.Module, call: Callable[[nn.Module], Any]) -> nn.Module:
    """A copy of a model that was changed in place."""
    model = copy.deepcopy(model)
    call(model)
    return model


def saved(folder: Path) -> nn.Module:
    """Each thread's file, beside those of the others."""
    path = folder / str(get_ident())
    ocs.save(QUANTIZED, path)
    return ocs.load(path, copy.deepcopy(FLOAT))


def streamed(folder: Path) -> nn.Module:
    """Each thread's folder of files, from the file of all."""
    path = folder / f"{get_ident()}-streamed"
    shutil.rmtree(path, ignore_errors=True)
    ocs.quantize_file(copy.deepcopy(FLOAT).to("meta"), path, weights=folder / "float.safetensors", **ALL)
    return ocs.load(path, copy.deepcopy(FLOAT))


CALLS: dict[str, Callable[[Path], Any]] = {
    "calibrate": lambda _: list(ocs.calibrate(copy.deepcopy(FLOAT), BATCHES, moments=True)),
    "compare": lambda _: ocs.compare(copy.deepcopy(FLOAT), copy.deepcopy(QUANTIZED), BATCHES).to_json(),
    "load": lambda folder: ocs.load(folder / "model", copy.deepcopy(FLOAT)),
    "lower": lambda _: changed(QUANTIZED, ocs.lower),
    "pack": lambda _: changed(QUANTIZED, ocs.pack),
    "unpack": lambda _: changed(PACKED, ocs.unpack),
    "plot": lambda _: ocs.plot.__name__,  # matplotlib is for one thread
    "quantize": lambda _: changed(FLOAT, lambda net: ocs.quantize(net, **ALL, recipe="best", fold_bn=True)),
    "quantize by data": lambda _: changed(
        FLOAT, lambda net: ocs.quantize(net, **ALL, abits=8, calibration=BATCHES, correct_bias=True)
    ),
    "quantize_file": streamed,
    "reestimate_batchnorm": lambda _: changed(FLOAT, lambda net: ocs.reestimate_batchnorm(net, BATCHES)),
    "register": lambda _: ocs.register(type("Own", (nn.Linear,), {})).__name__,
    "save": saved,
    "training.prepare": lambda _: changed(FLOAT, lambda net: training.prepare(net, **ALL)),
    "training.convert": lambda _: changed(PREPARED, training.convert),
    "clip_threshold": lambda _: [functional.clip_threshold(W, 4, method) for method in functional.CLIP_METHODS],
    "dequantize": lambda _: functional.dequantize(WEIGHT.ints, 0.1),
    "fake_quantize": lambda _: functional.fake_quantize(W, 0.1, 4),
    "fold": lambda _: functional.fold(WEIGHT, 8),
    "histogram": lambda _: functional.histogram(W, 64),
    "output_error": lambda _: functional.output_error(W, WEIGHT),
    "plan_channels": lambda _: functional.plan_channels(W, [0, 3, 0]),
    "plan_splits": lambda _: functional.plan_splits(W, 0.3, select="error"),
    "functional.quantize": lambda _: functional.quantize(W, 0.1, 4),
    "quantize_plan": lambda _: functional.quantize_plan(W, PLAN, STEP_SCHEME).quantized,
    "quantize_weight": lambda _: functional.quantize_weight(W, 4, 0.3, clip="auto", rounding="squant"),
    "remaining_error": lambda _: functional.remaining_error(W, STEP, STEP_SCHEME),
    "sqnr_db": lambda _: functional.sqnr_db(1.0, 0.1),
    "weight_error": lambda _: functional.weight_error(W, WEIGHT),
}
HEAVY: dict[str, Callable[[Path], Any]] = {  # torch exports and compiles
    "compile": lambda _: ocs.compile(QUANTIZED, BATCHES[0], engine="onnxruntime")(BATCHES[0]).detach(),
    "export": lambda folder: ocs.export(QUANTIZED, folder / f"{get_ident()}.pt2", BATCHES[0], form="program"),
    "synthesize": lambda _: len(ocs.synthesize(copy.deepcopy(FLOAT), (8,), images=2, steps=1)),  # images are random
}


def parts(result: Any) -> Iterator[Any]:
    """What two results have in common if they are the same."""
    if isinstance(result, nn.Module):
        yield repr(result)
        yield from ((name, tensor.numpy().tobytes()) for name, tensor in result.state_dict().items())
    elif isinstance(result, list | tuple):
        for each in result:
            yield from parts(each)
    elif isinstance(result, np.ndarray | Tensor):
        yield np.asarray(result).tobytes()
    else:
        yield result


def test_every_public_function_is_called() -> None:
    classes = {
        "Calibration",
        "Comparison",
        "Compiled",
        "LayerReport",
        "Report",
        "QuantizedWeight",
        "Scheme",
        "SplitPlan",
    }
    names = {*ocs.__all__, *functional.__all__} - classes - {"FIRST_LAYER", "CLIP_METHODS", "METHODS"}
    names |= {f"training.{name}" for name in training.__all__}
    assert names - {"functional", "nn", "training"} <= {*CALLS, *HEAVY}


def check(calls: dict[str, Callable[[Path], Any]], folder: Path, threads: int, rounds: int) -> None:
    expected = {name: [*parts(call(folder))] for name, call in calls.items()}
    start = Barrier(threads)

    def run(thread: int) -> list[str]:
        start.wait()
        order = [*calls][thread:] + [*calls][:thread]
        return [name for _ in range(rounds) for name in order if [*parts(calls[name](folder))] != expected[name]]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(threads) as pool:
            assert [*pool.map(run, range(threads))] == [[]] * threads
    finally:
        sys.setswitchinterval(before)


def test_as_if_alone(folder: Path) -> None:
    check(CALLS, folder, threads=8, rounds=ROUNDS)


@pytest.mark.parametrize("name", list(HEAVY)[repeats(1, 0) :])  # compiling takes half a minute
def test_what_torch_traces(name: str, folder: Path) -> None:
    """Torch can do it in one thread at a time."""
    check({name: HEAVY[name]}, folder, threads=repeats(3, 8), rounds=1)
