"""Results depend neither on torch's default dtype nor on its default device."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import Everything, SmallNet
from torch import Tensor

import ocs


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let new tensors of floats be of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "meta": lambda: torch.device("meta"),
}


def everything(**options: object) -> Callable[[], list[Tensor]]:
    """Quantize every kind of layer; give the whole state and the outputs."""
    torch.manual_seed(0)
    model = Everything().eval()
    batches = [model.inputs() for _ in range(3)]
    if "calibration" in options:
        options["calibration"] = lambda net: [net(*batch) for batch in batches]

    def run() -> list[Tensor]:
        ours = copy.deepcopy(model)
        ocs.quantize(ours, wbits=4, r=0.1, skip=None, **options)
        with torch.no_grad():
            return [*ours.state_dict().values(), *(ours(*batches[0]))]

    return run


def normed(*, data: bool) -> Callable[[], list[Tensor]]:
    """Make inputs for a network with batch norms, and measure its norms again on them or on data."""
    torch.manual_seed(0)
    model = SmallNet().eval()
    batches = [torch.randn(4, 3, 8, 8) for _ in range(2)]

    def run() -> list[Tensor]:
        made = batches if data else ocs.synthesize(model, (3, 8, 8), images=4, steps=3)
        ours = copy.deepcopy(model)
        ocs.quantize(ours, wbits=4, calibration=made, abits=4, act_r=0.1, correct_bias=True)
        ocs.reestimate_batchnorm(ours, made, reference=None if data else model)
        return [*made, *ours.state_dict().values()]

    return run


def equalized() -> Callable[[], list[Tensor]]:
    """Move scales by weights alone, and by what calibration saw."""
    torch.manual_seed(0)
    model, batches = SmallNet().eval(), [torch.randn(4, 3, 8, 8)]

    def run() -> list[Tensor]:
        found: list[Tensor] = []
        for options in ({}, {"fold_bn": True}, {"abits": 4, "calibration": batches}):
            ours = copy.deepcopy(model)
            ocs.quantize(ours, wbits=4, r=0.1, equalize=True, **options)
            found += ours.state_dict().values()
        return found

    return run


def pure() -> list[Tensor]:
    """Quantize one weight and one input by themselves."""
    w = torch.randn(8, 6, 3, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")
    found: list[Tensor] = []
    for options in ({}, {"granularity": "channel", "clip": "mse"}, {"rounding": "squant", "clip": "auto"}):
        quantized = ocs.functional.quantize_weight(w, 4, 0.2, **options)
        found += [*quantized[:3], ocs.functional.output_error(w, quantized)]
    return [*found, ocs.functional.fake_quantize(w, 0.1, 4), ocs.functional.quantize(w, 0.1, 4)]


RUNS: dict[str, Callable[[], Callable[[], list[Tensor]]]] = {
    "without data": lambda: everything(),
    "best": lambda: everything(recipe="best", explain=True, correct_bias=True),
    "best, folded": lambda: everything(recipe="best", fold_bn=True, expand=False),
    "gptq": lambda: everything(rounding="gptq", calibration=True, clip="auto", explain=True),
    "allocated": lambda: everything(allocate="error", calibration=True),
    "inputs": lambda: everything(
        abits=4, act_r=0.2, act_clip="mse", act_signed="auto", calibration=True, overrides={"lstm": {"abits": 6}}
    ),
    "inputs as released": lambda: everything(abits=4, act_clip="mse-release", calibration=True),
    "rows": lambda: everything(
        overrides={name: {"abits": 5, "act_scale": "dynamic"} for name in ("lstm", "cell", "attention", "decoder")}
    ),
    "oracle": lambda: everything(abits=4, act_r=0.2, act_split="oracle"),
    "synthesized": lambda: normed(data=False),
    "reestimated": lambda: normed(data=True),
    "functional": lambda: pure,
    "equalized": lambda: equalized(),
}


@pytest.mark.parametrize("name", RUNS)
def test_results_do_not_depend_on_defaults(name: str) -> None:
    run = RUNS[name]()
    expected = run()
    for default, changed in DEFAULTS.items():
        with changed():
            found = run()
        assert [(x.dtype, x.device) for x in found] == [(x.dtype, x.device) for x in expected], default
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), default


WITH_DTYPE = {"zeros", "ones", "empty", "full", "eye", "rand", "randn", "linspace"}
WITH_DEVICE = WITH_DTYPE | {"arange", "tensor", "randint", "randperm"}


def test_new_tensors_say_what_they_are() -> None:
    """Names are those of torch's functions whose results follow the defaults; the command line is its own process."""
    for path in Path(ocs.__file__).parent.rglob("*.py"):
        if path.parent.name == "cli":
            continue
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not ast.unparse(call.func).startswith("torch."):
                continue
            name, given = ast.unparse(call.func).removeprefix("torch."), {keyword.arg for keyword in call.keywords}
            assert name not in WITH_DEVICE or "device" in given, f"{path}:{call.lineno} names no device"
            assert name not in WITH_DTYPE or "dtype" in given, f"{path}:{call.lineno} names no dtype"
