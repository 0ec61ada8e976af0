"""Packed layers that keep the forward of their class: its linear products stay packed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_own_forward import LAYERS, Experts, _registered, make  # noqa: F401 - a fixture of all tests here
from torch import Tensor, nn

import ocs
from ocs.nn.packed.read_weight import ReadWeight
from ocs.nn.packed.weight import PackedWeight

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LINEAR = [name for name in LAYERS if name != "same padding"]


def pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """A quantized model, its packed copy and an input."""
    model, x = make(name)
    ocs.quantize(model, wbits=4, r=0.2, **options)
    return model, ocs.pack(copy.deepcopy(model)), x


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("name", LAYERS)
def test_computes_what_the_quantized_layer_does(name: str, granularity: str) -> None:
    model, packed, x = pair(name, granularity=granularity)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), model(x), **CLOSE)
    model, packed = model.bfloat16(), packed.bfloat16()
    assert packed(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(
        packed(x.bfloat16()), model(x.bfloat16()), rtol=0.1, atol=0.1 * model(x.bfloat16()).abs().max().item()
    )


@pytest.mark.parametrize("options", [{"abits": 8}, {"abits": 8, "act_scale": "dynamic"}])
@pytest.mark.parametrize("name", ["other linear", "strange", "Conv1D", "same padding"])
def test_rounded_inputs(name: str, options: dict[str, Any]) -> None:
    if name == "same padding" and "act_scale" in options:
        options = {"abits": 8}
    x = make(name)[1]
    calibration = None if "act_scale" in options else [x]
    model, packed, x = pair(name, calibration=calibration, **options)
    assert packed[0].input_grid is not None
    with torch.no_grad():
        torch.testing.assert_close(packed(x), model(x), **CLOSE)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_dequantizes_nothing(name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, packed, x = pair(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model(x)
        monkeypatch.setattr(PackedWeight, "folded", None)
        found = packed(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, **({"rtol": 0.1, "atol": 0.5} if autocast else CLOSE))


@pytest.mark.parametrize("index", [2, -1, torch.tensor(0)])
def test_one_expert_is_chosen_packed(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, packed, x = pair("experts")
    assert isinstance(packed[0], Experts)
    expected = F.linear(x, model[0].gate_up_proj[index])
    monkeypatch.setattr(PackedWeight, "folded", None)
    with torch.no_grad():
        torch.testing.assert_close(F.linear(x, packed[0].gate_up_proj[index]), expected, **CLOSE)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name: str) -> None:
    model, packed, x = pair(name)
    grads = []
    for each in (packed.train(), model.train()):
        y = x.clone().requires_grad_()
        each(y).square().sum().backward()
        grads.append([y.grad, *(p.grad for p in each.parameters())])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own use
@pytest.mark.parametrize("name", LINEAR)
def test_forward_mode(name: str) -> None:
    model, packed, x = pair(name)
    ours, theirs = (torch.func.jvp(each, (x,), (x,))[1] for each in (packed, model))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", LAYERS)
def test_compile(name: str) -> None:
    _, packed, x = pair(name)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), packed(x), **CLOSE)


@pytest.mark.parametrize("name", LAYERS)
def test_travels(name: str, tmp_path: Any) -> None:
    model, packed, x = pair(name)
    fresh, expected = make(name)[0], packed(x)
    ocs.save(packed, tmp_path / "model.safetensors")
    assert torch.equal(ocs.load(tmp_path / "model.safetensors", fresh, packed=True)(x), expected)
    other = copy.deepcopy(packed)
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(x), expected)
    if name != "Conv1D":  # whose module is not there
        assert torch.equal(pickle.loads(pickle.dumps(packed))(x), expected)
    assert torch.equal(ocs.unpack(packed)(x), model(x))


# --- A weight as others read it ---------------------------------------------------------------------------------------


def read(name: str = "other linear") -> tuple[Tensor, Tensor]:
    """A packed weight, and the same in floats."""
    model, packed, _ = pair(name)
    weight = packed[0].gate_up_proj if "experts" in name else packed[0].weight
    assert isinstance(weight, ReadWeight)
    return weight, (model[0].gate_up_proj if "experts" in name else model[0].weight) + 0


OPERATIONS = {
    "linear": lambda w, x: F.linear(x, w),
    "linear by name": lambda w, x: F.linear(input=x, weight=w, bias=None),
    "matmul": lambda w, x: x @ w.T,
    "matmul by mT": lambda w, x: torch.matmul(x, w.mT),
    "mm": lambda w, x: torch.mm(x, w.t()),
    "addmm": lambda w, x: torch.addmm(torch.ones(6), x, w.t()),
    "addmm, scaled": lambda w, x: torch.addmm(torch.ones(6), x, w.t(), beta=2),
    "addmm of a matrix": lambda w, x: torch.addmm(torch.ones(5, 6), x, w.t()),
    "weight first": lambda w, x: w @ x.T,
    "einsum": lambda w, x: torch.einsum("oc,nc->no", w, x),
    "in another dtype": lambda w, x: F.linear(x.double(), w.double()),
    "sum": lambda w, x: w.sum(),
    "a row": lambda w, x: w[2],
    "a slice": lambda w, x: w[1:3, ::2],
    "clone": lambda w, x: w.clone(),
    "concatenated": lambda w, x: torch.cat([w, w]),
    "twice transposed": lambda w, x: F.linear(x, w.t().t()),
    "norm": lambda w, x: torch.linalg.vector_norm(w, dim=1),
    "numpy": lambda w, x: torch.from_numpy(w.numpy().copy()) if not isinstance(w, ReadWeight) else w.clone(),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_whatever_is_done_with_it(name: str) -> None:
    (weight, plain), x = read(), torch.randn(5, 8)
    with torch.no_grad():
        found, expected = (OPERATIONS[name](w, x) for w in (weight, plain))
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected, **CLOSE)


def test_experts_together() -> None:
    (weight, plain), x = read("experts"), torch.randn(3, 5, 8)
    torch.testing.assert_close(torch.bmm(x, weight.mT), torch.bmm(x, plain.mT), **CLOSE)
    torch.testing.assert_close(weight[torch.tensor([2, 0])], plain[torch.tensor([2, 0])])
    torch.testing.assert_close(weight[1:], plain[1:])
    assert len(weight) == 3
    assert (weight.shape, weight.dtype, weight.ndim) == (plain.shape, plain.dtype, plain.ndim)


def test_what_torch_refuses_is_refused() -> None:
    weight, _ = read()
    for wrong in (torch.randn(5, 9), torch.randn(5, 32)):
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            F.linear(wrong, weight)
