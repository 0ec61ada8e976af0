"""torch.ops.ocs: what torch must know of each operator, other devices, and direct calls with anything at all."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import outlier_weight

from ocs import _C, functional
from ocs.functional import fake_quantize
from ocs.kernels import composite, composite_product, constants, ops

W = torch.from_numpy(outlier_weight((12, 10, 3, 3)))
PLAN = torch.ops.ocs.split_plan(torch.ops.ocs.channel_max(W, 3), 3, 4, False)
EVEN = torch.ops.ocs.split_plan(torch.tensor([1.0, 9, 4] + [0.1] * 27), 3, 9, True)  # 10 parts of one, halves, a whole
PLANS = (PLAN, EVEN)
SCALE = torch.tensor(0.1)
SCALES = torch.linspace(0.05, 0.2, 12)
INTS = torch.ops.ocs.quantize_weight(W, SCALE, *PLAN[:3], 3, 5, True)
COUNTS = torch.stack([torch.ops.ocs.histogram(W, 64, 1.0), torch.ops.ocs.histogram(W, 64, 2.0)])
ORDER = torch.arange(90).flip(0).expand(3, 90)
FACTOR = torch.linspace(-0.1, 0.1, 3 * 90 * 90).reshape(3, 90, 90)
OFTEN = torch.arange(W.numel()) % 5  # how often each value is there
PACKED = torch.ops.ocs.pack(INTS, 5)

NONE = torch.zeros(0)
COPIES = torch.tensor([3, 40, 3], dtype=torch.int32)
Q = torch.arange(37 * 44).remainder(15).sub(7).to(torch.int8).view(37, 44)  # [37, 41 + 3]
TILES = torch.ops.ocs.product_pack(Q, 4)
BY_OUTPUT, BY_GROUP = torch.linspace(0.05, 0.2, 37), torch.linspace(0.05, 0.2, 96).view(3, 2, 16)
WEIGHTS = [(TILES, scale, COPIES, 37, group, 4) for scale, group in ((SCALE, 0), (BY_OUTPUT, 0), (BY_GROUP, 32))]
X = torch.sin(torch.arange(6.0 * 41)).view(2, 3, 41)
ROWS = [(0, NONE, True), (8, NONE, True), (8, SCALE, True), (4, torch.tensor([0.2]), False)]


def recurrent_call(cell: int, row_bits: int, reverse: bool, projected: bool = False) -> tuple:
    """A layer of 6 hidden units whose batch falls from 3 sequences to one."""
    gates, state = 6 * (4, 3, 1, 1)[cell], 5 if projected else 6
    q = torch.arange(gates * (state + 1)).remainder(7).sub(3).to(torch.int8).view(gates, state + 1)
    hidden = (torch.ops.ocs.product_pack(q, 3), SCALE, torch.zeros(1, dtype=torch.int32), gates, 0, 3)
    none = torch.zeros(0, dtype=torch.int32)
    projection = (PACKED[:0], SCALE, none, 0, 0, 8)
    if projected:
        projection = (torch.ops.ocs.product_pack(Q[:5, :6].contiguous(), 4), SCALE, none, 5, 0, 4)
    from_x, h, c = (torch.sin(torch.arange(3.0 * n)).view(-1, n) for n in (gates, state, 6))
    from_x = torch.cat([from_x, -from_x[:2]])
    c = c if cell == 0 else c[:0, :0]
    return from_x, *hidden, from_x[0], *projection, h, c, long(3, 1, 1), row_bits, cell, reverse


def long(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


CALLS = {
    "abs_max": [(W,), (W.half(),)],
    "histogram": [(W, 32, 3.0)],
    "signed_histogram": [(W, 32, 3.0), (W.half(), 5, 0.0)],
    "octave_histogram": [(W, 4.0), (W.half().flatten(1), 4.0)],
    "channel_max": [(W, 3), (W.double().transpose(0, 1), 1)],
    "split_plan": [(torch.rand(30), 3, 4, False), (torch.rand(30), 3, 9, True), (torch.rand(5), 1, 0, False)],
    "output_max": [(W, *plan[:2], 3) for plan in PLANS],
    "split_histogram": [(W, *plan[:2], 3, 32, limit) for plan in PLANS
                        for limit in (PLAN[3].max(), W.abs().amax((1, 2, 3)))],
    "clip_threshold": [(COUNTS, torch.tensor([1.0, 2.0]), 4, True, method) for method in (0, 1, 3, 4, 5, 6)],
    "release_threshold": [(W, counts, 4, True, method) for counts in (OFTEN, OFTEN[:0]) for method in (2, 7, 8)],
    "quantize_weight": [(W, s, *plan[:3], 3, 5, qa) for plan in PLANS for s in (SCALE, SCALES)
                        for qa in (True, False)],
    "squant_weight": [(w, s, *plan[:3], 3, 4) for plan in PLANS for w in (W, W.flatten(2)[..., 0])
                      for s in (SCALE, SCALES)],
    "gptq_weight": [(W, s, *plan[:3], 4, ORDER, FACTOR) for plan in PLANS for s in (SCALE, SCALES)],
    "fold": [(INTS, s, PLAN[0], 3, 10) for s in (SCALE, SCALES)],
    "weight_error": [(W, INTS, SCALE, PLAN[0], 3)],
    "output_error": [(W, INTS, s, PLAN[0], 3, 10.0) for s in (SCALE, SCALES)],
    "quantize": [(W, SCALE, 8, signed) for signed in (True, False)],
    "dequantize": [(INTS, SCALE), (INTS.to(torch.uint8), SCALES)],
    "fake_quantize": [(W, SCALE, 4, True), (W.bfloat16(), SCALE, 4, False), (W[::2, ::3], SCALE, 4, True),
                      (W.to(memory_format=torch.channels_last), SCALE, 8, True)],
    "pack": [(INTS, 5), (INTS[:, ::2], 8)],
    "unpack": [(PACKED, INTS.numel(), 5)],
    "product_pack": [(Q, 4), (Q[:, ::2], 5)],
    "product_unpack": [(TILES, 37, 44, 4)],
    "product_rows": [(long(3, 36, 0, 3), *weight, 41) for weight in WEIGHTS],
    "product": [(x, *weight, bias, *rows) for rows in ROWS for x, weight, bias in (
        (X, WEIGHTS[0], NONE), (X[0, 0], WEIGHTS[1], X[0, 0, :37]), (X[:, ::2], WEIGHTS[2], NONE),
        (X.bfloat16(), WEIGHTS[2], NONE), (X.double().transpose(0, 1), WEIGHTS[0], NONE), (X[:0], WEIGHTS[1], NONE))],
    "recurrent": [recurrent_call(cell, row_bits, reverse, cell == 0 and reverse)
                  for cell in range(4) for row_bits in (0, 8) for reverse in (False, True)],
}  # fmt: skip
EACH = [(name, args) for name, calls in CALLS.items() for args in calls]


def composite_of(name: str) -> Callable:
    """The version in torch operations."""
    return getattr(composite if hasattr(composite, name) else composite_product, name)


def tolerance(name: str, args: tuple) -> dict[str, float]:
    """What other orders of sums of floats may change; whole numbers have none, and one rounding of bfloat16 is 2^-8."""
    if name == "product" and args[8] == 0:
        return {"rtol": 2**-7, "atol": 0} if args[0].dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    if name == "recurrent":  # where a state lies between two of 255 integers, it may become the other
        return {"rtol": 0, "atol": 1e-5 if args[17] == 0 else 1e-2}
    return {"rtol": {"weight_error": 1e-12, "output_error": 1e-12, "gptq_weight": 1e-6}.get(name, 0), "atol": 0}


def test_every_operator_is_listed() -> None:
    registered = {
        name.removeprefix("ocs::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("ocs::")
    }
    assert registered == set(CALLS) == set(composite.KERNELS) == set(_C.OPERATORS)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_both_doors_take_the_same_arguments(name: str) -> None:
    schema = getattr(torch.ops.ocs, name).default._schema
    names = ", ".join(argument.name for argument in schema.arguments)
    assert getattr(_C, name).__doc__.startswith(f"{name}({names}) -> ")
    assert list(inspect.signature(composite_of(name)).parameters) == [a.name for a in schema.arguments]
    with pytest.raises(TypeError, match=f"{name}: takes {len(schema.arguments)} arguments, not 9"):
        getattr(_C, name)(*range(9))


def test_constants_are_those_of_the_header() -> None:
    header = (Path(__file__).resolve().parents[2] / "csrc" / "ocs.h").read_text()
    methods = re.findall(r"^    OCS_CLIP_(\w+),", header, re.MULTILINE)
    assert tuple(name.lower().replace("_", "-") for name in methods) == _C.CLIP_METHODS == functional.CLIP_METHODS
    assert (_C.MIN_BITS, _C.MAX_BITS, _C.MAX_DEPTH) == (2, 8, constants.MAX_DEPTH)
    assert (_C.MAX_BINS, _C.MAX_SEARCH_BINS) == (2**24, 2**16)
    assert (_C.OCTAVES, _C.OCTAVE_BINS) == (16, 128)


@pytest.mark.parametrize(("name", "args"), EACH)
def test_opcheck(name: str, args: tuple) -> None:
    """Schema, fake kernel, autograd registration and tracing with dynamic shapes, as torch itself checks them."""
    torch.library.opcheck(getattr(torch.ops.ocs, name).default, args)


@pytest.mark.parametrize(("name", "args"), EACH)
def test_composite_equals_the_kernel(name: str, args: tuple) -> None:
    """What other devices run gives the same values; only errors may be summed in another order."""
    ours, kernel = composite_of(name)(*args), getattr(torch.ops.ocs, name)(*args)
    torch.testing.assert_close(ours, kernel, **tolerance(name, args))


def test_composite_handles_nothing_and_nan() -> None:
    assert composite.abs_max(torch.zeros(0)) == 0
    assert composite.channel_max(torch.zeros(0, 4), 1).tolist() == [0] * 4
    x = torch.tensor([0.1, 5, float("nan"), 0])
    assert composite.histogram(x, 4, 1.0).tolist() == torch.ops.ocs.histogram(x, 4, 1.0).tolist() == [2, 0, 0, 2]
    assert composite.histogram(x, 2, 0.0).tolist() == [4, 0]
    assert composite.quantize(x, SCALE, 4, True).tolist() == torch.ops.ocs.quantize(x, SCALE, 4, True).tolist()


def test_composite_squant_of_what_is_not_finite() -> None:
    w = W.clone()
    w[0, 1, 2], w[3, 5, 0, 0], w[7, 9] = float("nan"), float("inf"), -float("inf")
    args = (w, SCALE, *PLAN[:3], 3, 4)
    assert torch.equal(composite.squant_weight(*args), torch.ops.ocs.squant_weight(*args))


def test_other_devices_are_registered() -> None:
    for name in CALLS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ocs::{name}", "CompositeExplicitAutograd")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ocs::{name}", "CPU")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "args"), EACH)
def test_cuda_equals_cpu(name: str, args: tuple) -> None:
    moved = [arg.cuda() if isinstance(arg, torch.Tensor) else arg for arg in args]
    ours, kernel = getattr(torch.ops.ocs, name)(*moved), getattr(torch.ops.ocs, name)(*args)
    torch.testing.assert_close(ours, kernel, check_device=False, **tolerance(name, args))


def test_meta_tensors_have_shapes_only() -> None:
    q = torch.ops.ocs.quantize_weight(*(t.to("meta") for t in (W, SCALE, *PLAN[:3])), 3, 5, True)
    assert (q.shape, q.dtype, q.device.type) == (INTS.shape, torch.int8, "meta")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch's own tracer
@pytest.mark.parametrize("requires_grad", [False, True])
def test_compile_and_gradient(requires_grad: bool) -> None:
    def loss(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (fake_quantize(x, scale, 4) * x).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, twin = (torch.linspace(-3, 3, 101).requires_grad_(requires_grad) for _ in range(2))
    ours, plain = compiled(x, SCALE), loss(twin, SCALE)
    torch.testing.assert_close(ours, plain)
    if requires_grad:
        ours.backward()
        plain.backward()
        torch.testing.assert_close(x.grad, twin.grad)


def test_compile_with_a_number_as_scale() -> None:
    x = torch.randn(5)
    compiled = torch.compile(lambda x: fake_quantize(x, 0.1, 4), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), fake_quantize(x, 0.1, 4))


def test_a_direct_call_has_no_wrong_gradient() -> None:
    """Of a view with gaps, which the kernel first copies: the copy must not stand for the result."""
    x = torch.full((4, 2), 100.0, requires_grad=True)
    result = torch.ops.ocs.fake_quantize(x[:, ::2], SCALE, 3, True)
    assert "Copy" not in type(result.grad_fn).__name__
    fake_quantize(x[:, ::2], SCALE, 3).sum().backward()
    assert x.grad.abs().sum() == 0


def test_meta_tensors_are_not_mixed_with_others() -> None:
    with pytest.raises(RuntimeError, match="meta tensors cannot be mixed"):
        torch.ops.ocs.fake_quantize(torch.randn(3), torch.ones((), device="meta"), 8, True)


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return fake_quantize(x, 0.25, 4)

    program = torch.export.export(Module(), (torch.randn(3, 4),))
    x = torch.randn(3, 4)
    assert torch.equal(program.module()(x), fake_quantize(x, 0.25, 4))


RECURRENT = recurrent_call(0, 8, False, True)
BEYOND, BELOW = (torch.cat([PLAN[0][:-1], long(source)]) for source in (30, 19))  # of the last group's 20 .. 29

HOSTILE = [
    ("fold", (INTS, SCALE, BEYOND, 3, 10), "no split plan"),
    ("fold", (INTS, SCALE, BELOW, 3, 10), "no split plan"),
    ("output_max", (W, BEYOND, PLAN[1], 3), "no split plan"),
    ("quantize_weight", (W, SCALE, BELOW, *PLAN[1:3], 3, 5, True), "no split plan"),
    ("channel_max", (torch.ones(3), 1), "at least 2 dimensions"),
    ("channel_max", (torch.ones(3, 3), 2), "groups must divide"),
    ("channel_max", (torch.ones(3, 3), -1), "groups must divide"),
    ("channel_max", (torch.zeros(0, 4), 2**62 + 2), "groups must divide"),
    ("fold", (torch.zeros(0, 8, dtype=torch.int8), SCALE, torch.arange(8), 2**61 + 1, 4), "groups must divide"),
    ("output_max", (torch.zeros(0, 0), long(), int32(), 2**62), "groups must divide"),
    ("quantize_weight", (torch.zeros(0, 0), SCALE, long(), int32(), int32(), 2**62, 8, True), "groups must divide"),
    ("output_max", (W, PLAN[0] - 2**63, PLAN[1], 3), "no split plan"),
    ("histogram", (W, 4, 1e300), "bins must be"),
    ("channel_max", (torch.ones(3, 3, dtype=torch.int32), 1), "float tensor"),
    ("split_plan", (torch.ones(4), 1, 5, False), "splits be at most"),
    ("split_plan", (torch.ones(4), 1, 2**62, True), "splits be at most"),
    ("split_plan", (torch.ones(4), 0, 1, False), "groups must divide"),
    ("split_plan", (torch.tensor([1, torch.nan]), 1, 1, False), "NaN or Inf"),
    ("split_plan", (torch.tensor([1, torch.nan]), 1, 1, True), "NaN or Inf"),
    ("output_max", (W, PLAN[0] + 100, PLAN[1], 3), "no split plan"),
    ("output_max", (W, PLAN[0], PLAN[1][:-1], 3), "no split plan"),
    ("quantize_weight", (W, SCALE, PLAN[0] - 1, *PLAN[1:3], 3, 5, True), "no split plan"),
    ("quantize_weight", (W, SCALE, PLAN[0], PLAN[1] + 2**22, PLAN[2], 3, 5, True), "no split plan"),
    ("quantize_weight", (W, SCALE, PLAN[0], PLAN[1] - 1, PLAN[2], 3, 5, True), "no split plan"),
    ("quantize_weight", (W, SCALE, PLAN[0], PLAN[1], PLAN[2] - 1, 3, 5, True), "no split plan"),
    ("quantize_weight", (W, SCALE, PLAN[0][:-1], *PLAN[1:3], 3, 5, True), "does not fit"),
    ("quantize_weight", (W, SCALE, *PLAN[:3], 3, 9, True), "bits must be 2 to 8"),
    ("quantize_weight", (W, SCALE, *PLAN[:3], 3, 2**40, True), "bits must be 2 to 8"),
    ("quantize_weight", (W, -SCALE, *PLAN[:3], 3, 5, True), "positive finite"),
    ("quantize_weight", (W, SCALES[:5], *PLAN[:3], 3, 5, True), "scale must have"),
    ("quantize_weight", (W, SCALE, PLAN[0].int(), *PLAN[1:3], 3, 5, True), "wrong dtype"),
    ("squant_weight", (W, SCALE, BELOW, *PLAN[1:3], 3, 5), "no split plan"),
    ("squant_weight", (W, SCALE, BEYOND, *PLAN[1:3], 3, 5), "no split plan"),
    ("squant_weight", (torch.zeros(0, 0), SCALE, long(), int32(), int32(), 2**62, 8), "groups must divide"),
    ("squant_weight", (W, SCALE, PLAN[0] - 2**63, *PLAN[1:3], 3, 5), "no split plan"),
    ("squant_weight", (W, SCALE, PLAN[0], PLAN[1] + 2**22, PLAN[2], 3, 5), "no split plan"),
    ("squant_weight", (W, SCALE, PLAN[0], PLAN[1], PLAN[2] - 1, 3, 5), "no split plan"),
    ("squant_weight", (W, SCALE, PLAN[0], PLAN[1], PLAN[2][:-1], 3, 5), "no split plan"),
    ("squant_weight", (W, SCALE, PLAN[0][:-1], *PLAN[1:3], 3, 5), "does not fit"),
    ("squant_weight", (W, SCALE, *PLAN[:3], 3, 1), "bits must be 2 to 8"),
    ("squant_weight", (W, SCALE * 0, *PLAN[:3], 3, 5), "positive finite"),
    ("squant_weight", (W, SCALES[:5], *PLAN[:3], 3, 5), "scale must have"),
    ("squant_weight", (W, SCALE, PLAN[0].int(), *PLAN[1:3], 3, 5), "wrong dtype"),
    ("gptq_weight", (W, SCALE, PLAN[0] + 1, *PLAN[1:3], 4, ORDER, FACTOR), "no split plan"),
    ("gptq_weight", (W, SCALE, *PLAN[:3], 4, ORDER.clamp(min=1), FACTOR), "order must have each column once"),
    ("gptq_weight", (W, SCALE, *PLAN[:3], 4, ORDER - 1, FACTOR), "order must have each column once"),
    ("gptq_weight", (W, SCALE, *PLAN[:3], 4, ORDER + 2**62, FACTOR), "order must have each column once"),
    ("gptq_weight", (W, SCALE, *PLAN[:3], 4, ORDER[:, :80], FACTOR), "order must be"),
    ("gptq_weight", (W, SCALE, *PLAN[:3], 4, ORDER[:2], FACTOR), "factor must be"),
    ("gptq_weight", (W, SCALE, *PLAN[:3], 4, ORDER, FACTOR[:2]), "factor must be"),
    ("gptq_weight", (W, SCALE, *PLAN[:3], 4, ORDER, FACTOR[:, :45]), "factor must be"),
    ("gptq_weight", (W, SCALE, *PLAN[:3], 4, ORDER, FACTOR[:, :0, :0]), "factor must be"),
    ("gptq_weight", (W, -SCALE, *PLAN[:3], 4, ORDER, FACTOR), "positive finite"),
    ("gptq_weight", (W, SCALE, *PLAN[:3], 9, ORDER, FACTOR), "bits must be 2 to 8"),
    ("gptq_weight", (W, SCALE, *PLAN[:3], 4, ORDER.int(), FACTOR), "wrong dtype"),
    ("fold", (INTS, SCALE, PLAN[0] + 1, 3, 10), "no split plan"),
    ("fold", (INTS, SCALE, PLAN[0], 3, 2**62), "channels must be"),
    ("fold", (INTS, SCALE, PLAN[0], 3, -1), "channels must be"),
    ("fold", (INTS.float(), SCALE, PLAN[0], 3, 10), "wrong dtype"),
    ("weight_error", (torch.ones(2, 3), INTS.new_ones(3, 2), SCALE, torch.arange(3), 1), "no split plan"),
    ("weight_error", (W, INTS[:-1], SCALE, PLAN[0], 3), "no split plan"),
    ("output_error", (W, INTS[:-1], SCALE, PLAN[0], 3, 1.0), "no split plan"),
    ("histogram", (W, 0, 1.0), "bins must be"),
    ("signed_histogram", (W, 0, 1.0), "bins must be"),
    ("histogram", (W, 2**62, 1.0), "bins must be"),
    ("histogram", (W, 4, -1.0), "bins must be"),
    ("histogram", (W, 4, float("nan")), "bins must be"),
    ("release_threshold", (W, OFTEN, 4, True, 0), "no such clip method"),
    ("release_threshold", (W, OFTEN, 4, True, 2**40), "no such clip method"),
    ("release_threshold", (W, OFTEN, 9, True, 7), "bits must be 2 to 8"),
    ("release_threshold", (W, OFTEN[1:], 4, True, 7), "counts must be empty"),
    ("release_threshold", (W, -OFTEN, 4, True, 7), "counts not negative"),
    ("release_threshold", (W / 0, OFTEN, 4, True, 7), "NaN or Inf"),
    ("release_threshold", (torch.tensor(1.0), OFTEN[:1], 4, True, 7), "at least 1 dimension"),
    ("quantize", (W, torch.tensor(0.0), 4, True), "positive finite"),
    ("quantize", (W, torch.ones(0), 4, True), "one number"),
    ("pack", (INTS, 4), "an integer is outside"),
    ("pack", (INTS, 9), "bits must be 2 to 8"),
    ("pack", (INTS, -(2**40)), "bits must be 2 to 8"),
    ("pack", (INTS.float(), 5), "wrong dtype"),
    ("unpack", (PACKED, INTS.numel() + 8, 5), "another size"),
    ("unpack", (PACKED, 2**63 - 1, 5), "another size"),
    ("unpack", (PACKED, -1, 5), "another size"),
    ("unpack", (PACKED, INTS.numel(), 1), "bits must be 2 to 8"),
    ("unpack", (PACKED | 255, INTS.numel(), 5), "an integer is outside"),
    ("unpack", (PACKED.int(), INTS.numel(), 5), "wrong dtype"),
    ("dequantize", (INTS, torch.ones(5)), "scale must have"),
    ("dequantize", (INTS.int(), SCALE), "wrong dtype"),
    ("fake_quantize", (W, torch.tensor(float("nan")), 4, True), "positive finite"),
    ("fake_quantize", (W.long(), SCALE, 4, True), "float tensor"),
    ("fake_quantize", (W, SCALE, -3, True), "bits must be 2 to 8"),
    ("product_pack", (Q, 3), "an integer is outside"),
    ("product_pack", (Q, 9), "bits must be 2 to 8"),
    ("product_pack", (Q.view(37, 4, 11), 4), "q must be"),
    ("product_pack", (Q.short(), 4), "wrong dtype"),
    ("product_unpack", (TILES | 255, 37, 44, 4), "an integer is outside"),
    ("product_unpack", (TILES, 37, 44, 5), "another size"),
    ("product_unpack", (TILES, 37, 65, 4), "another size"),
    ("product_unpack", (TILES, -37, -44, 4), "another size"),
    ("product_unpack", (TILES, 2**60, 2**60, 4), "another size"),
    ("product_unpack", (TILES, 37, 44, 2**40), "bits must be 2 to 8"),
    ("product_unpack", (TILES.char(), 37, 44, 4), "wrong dtype"),
    ("product_rows", (long(37), *WEIGHTS[0], 41), "an index is outside"),
    ("product_rows", (long(0, -1), *WEIGHTS[0], 41), "an index is outside"),
    ("product_rows", (int32(0), *WEIGHTS[0], 41), "wrong dtype"),
    ("product_rows", (long(0), *WEIGHTS[0], 80), "another size"),
    ("product_rows", (long(0), *WEIGHTS[0], -1), "channels must not be negative"),
    ("product_rows", (long(0), TILES[1:], *WEIGHTS[0][1:], 41), "another size"),
    ("product_rows", (long(0), TILES, SCALE, COPIES + 38, 37, 0, 4, 41), "no split plan"),
    ("product_rows", (long(0), TILES, SCALE, COPIES - 4, 37, 0, 4, 41), "no split plan"),
    ("product_rows", (long(0), TILES, SCALE, COPIES, 37, 16, 4, 41), "multiple of 32"),
    ("product_rows", (long(0), TILES, SCALE, COPIES, 37, -32, 4, 41), "multiple of 32"),
    ("product", (X[..., :3], *WEIGHTS[0], NONE, 0, NONE, True), "another size"),
    ("product", (X.int(), *WEIGHTS[0], NONE, 0, NONE, True), "float tensor"),
    ("product", (X[0, 0, 0], *WEIGHTS[0], NONE, 0, NONE, True), "at least 1 dimension"),
    ("product", (X, TILES, SCALE, COPIES + 38, 37, 0, 4, NONE, 0, NONE, True), "no split plan"),
    ("product", (X, TILES, SCALE, COPIES.long(), 37, 0, 4, NONE, 0, NONE, True), "wrong dtype"),
    ("product", (X, TILES, BY_OUTPUT[1:], COPIES, 37, 0, 4, NONE, 0, NONE, True), "scale must have"),
    ("product", (X, TILES, -BY_OUTPUT, COPIES, 37, 0, 4, NONE, 0, NONE, True), "positive finite"),
    ("product", (X, TILES, BY_GROUP, COPIES, 37, 0, 4, NONE, 0, NONE, True), "scale must have"),
    ("product", (X, TILES, BY_GROUP, COPIES, 37, 64, 4, NONE, 0, NONE, True), "scale must be"),
    ("product", (X, TILES, BY_GROUP.mT, COPIES, 37, 32, 4, NONE, 0, NONE, True), "scale must be"),
    ("product", (X, TILES, BY_GROUP * 0, COPIES, 37, 32, 4, NONE, 0, NONE, True), "positive finite"),
    ("product", (X, TILES, BY_GROUP, COPIES, 37, 33, 4, NONE, 0, NONE, True), "multiple of 32"),
    ("product", (X, TILES, torch.ones(4, 2, 16), COPIES, 37, 32, 4, NONE, 0, NONE, True), "scale must be"),
    ("product", (X, TILES, SCALE, COPIES, 37, 0, 1, NONE, 0, NONE, True), "bits must be 2 to 8"),
    ("product", (X, *WEIGHTS[0], X[0, 0, :36], 0, NONE, True), "bias must be empty"),
    ("product", (X, *WEIGHTS[0], X[0, 0, :1], 0, NONE, True), "bias must be empty"),
    ("product", (X, *WEIGHTS[0], X[0, :1, :37], 0, NONE, True), "bias must be empty"),
    ("product", (X, *WEIGHTS[0], NONE, 9, NONE, True), "bits must be 2 to 8"),
    ("product", (X, *WEIGHTS[0], NONE, 8, NONE, False), "positive finite"),
    ("product", (X, *WEIGHTS[0], NONE, 8, SCALE * 0, True), "positive finite"),
    ("product", (X, *WEIGHTS[0], NONE, 8, X[0, 0, :6], True), "must be one number, or empty"),
    *[("recurrent", (*RECURRENT[:i], value, *RECURRENT[i + 1:]), message) for i, value, message in (
        (0, RECURRENT[0][1:], "from_x must be"), (0, RECURRENT[0][:, 1:], "from_x must be"), (1, TILES, "another size"),
        (2, -SCALE, "positive finite"), (3, int32(6), "no split plan"), (4, 25, "bias must be"), (4, 33, "another"),
        (6, 9, "bits must be 2 to 8"), (7, NONE.new_zeros(3), "bias must be"), (8, TILES, "another size"),
        (10, int32(-1), "no split plan"), (11, 6, "sizes"), (11, -5, "another size"), (12, 31, "multiple of 32"),
        (14, RECURRENT[14][:2], "c must be|batch_sizes must be"), (15, RECURRENT[15][:, 1:], "c must be"),
        (16, long(1, 3, 1), "sizes"), (16, long(3, -1, 3), "batch_sizes must be"), (16, long(4, 1), "batch_sizes must"),
        (16, long(3, 1), "from_x must be"), (16, int32(3, 1, 1), "wrong dtype"), (17, 1, "bits must be 2 to 8"),
        (18, 4, "no such cell"), (18, -1, "no such cell"), (18, 1, "only an LSTM has a projection"))],
]  # fmt: skip


@pytest.mark.parametrize(("name", "args", "message"), HOSTILE)
def test_direct_calls_never_crash(name: str, args: tuple, message: str) -> None:
    """A RuntimeError from torch.ops, a ValueError or TypeError from the numpy module."""
    with pytest.raises(RuntimeError, match=f"ocs::{name}: .*{message}"):
        getattr(torch.ops.ocs, name)(*args)
    arrays = [arg.numpy() if isinstance(arg, torch.Tensor) else arg for arg in args]
    with pytest.raises((ValueError, TypeError, OverflowError)):
        getattr(_C, name)(*arrays)


ONLY_THE_KERNEL_LOOKS = {"quantize", "fake_quantize"}  # at the value of a scale: on a device that means waiting for it


@pytest.mark.parametrize(("name", "args", "message"), HOSTILE)
def test_other_devices_refuse_the_same(name: str, args: tuple, message: str) -> None:
    if name in ONLY_THE_KERNEL_LOOKS and message == "positive finite":
        return
    with pytest.raises(RuntimeError):
        composite_of(name)(*args)


def test_an_empty_plan_of_any_number_of_groups_ends() -> None:
    assert [part.numel() for part in torch.ops.ocs.split_plan(torch.zeros(0), 2**62, 0, False)] == [0] * 4


@pytest.mark.parametrize("name", sorted(CALLS))
def test_wrong_arguments_of_the_numpy_module(name: str) -> None:
    for args in [(), ("x",) * 8, (None,), tuple([None] * len(CALLS[name][0]))]:
        with pytest.raises(TypeError):
            getattr(_C, name)(*args)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_gil_is_released(library: str, isa: str) -> None:
    """Another thread runs Python in the middle of one long kernel call."""
    x = np.zeros(1 << 24, np.float32)
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-4)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    for _ in range(3):  # as one piece of work: the GIL changes hands between calls at most
        _C.histogram(x, 2048, 1.0) if library == "numpy" else torch.ops.ocs.histogram(torch.from_numpy(x), 2048, 1.0)
    end = time.perf_counter()
    done.set()
    thread.join()
    torch.set_num_threads(before)
    inside = [t for t in ticks if begin < t < end]
    assert len(inside) > 10  # three calls leave room for three or four ticks where each holds the GIL


@pytest.mark.parametrize(("value", "expected"), [("ref", "ref"), ("auto", ops.isa())])
def test_isa_from_the_environment(value: str, expected: str) -> None:
    code = "import torch, ocs.kernels.ops; print(ocs.kernels.ops.isa())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"OCS_ISA": value}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected


def test_instruction_sets_are_chosen_by_name() -> None:
    before = _C.isa()
    assert _C.isas()[0] == "ref"
    for name in _C.isas():
        _C.set_isa(name)
        assert _C.isa() == name
    _C.set_isa("auto")
    assert _C.isa() == _C.isas()[-1]
    _C.set_isa(before)


def test_unknown_isa() -> None:
    *others, last = ["'auto'", *(f"'{name}'" for name in reversed(_C.isas()))]
    with pytest.raises(ValueError, match=f"'sse9'; use {', '.join(others)} or {last}"):
        ops.set_isa("sse9")
    command = [sys.executable, "-c", "import ocs"]
    done = subprocess.run(command, env={"OCS_ISA": "sse9"}, capture_output=True, text=True, check=False)
    assert "ImportError: OCS_ISA=sse9" in done.stderr


def test_quantize_weight_ignores_the_graph() -> None:
    w = torch.nn.Parameter(W.clone())
    assert not functional.quantize_weight(w, 4, 0.1).scale.requires_grad
