"""States as a stranger might write them, for every kind of layer: refused as a whole, or held for what they say."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from conftest import Everything, repeats
from torch import Tensor, nn

import ocs
from ocs.nn.base import QuantizedLayer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")]
CASES = repeats(40, 3000)

HOSTILE: list[Callable[[Tensor], Any]] = [
    lambda t: t[None],
    lambda t: t.flatten()[:-1],
    lambda t: torch.cat([t.flatten(), t.flatten()]),
    lambda t: t.new_empty(0),
    lambda t: t.new_empty(1).expand(2**40),
    lambda t: t.reshape(-1)[:1].expand(t.shape) if t.numel() else t,
    lambda t: t.t() if t.dim() == 2 else t,
    lambda t: t.to(torch.float64) * float("nan"),
    lambda t: t.float() + float("inf"),
    lambda t: -t.float(),
    lambda t: t.float() * 1e-45,
    lambda t: t.double() * 1e300,
    lambda t: t.float() + 0.5,
    lambda t: t.float().half(),
    lambda t: t.to(torch.int64) + 2**40,
    lambda t: t.to(torch.int64) - 2**40,
    lambda t: t.to(torch.int32) + 1,
    lambda t: t.to(torch.int32) - 1,
    lambda t: t.to(torch.int16),
    lambda t: t.to(torch.uint8),
    lambda t: t.to(torch.int64).to(torch.uint64),
    lambda t: t.bool(),
    lambda t: t.to(torch.complex64),
    lambda t: torch.full_like(t, 255 if t.dtype == torch.uint8 else 127),
    lambda t: torch.zeros_like(t),
    lambda t: torch.randint_like(t, 0, 100),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: torch.nested.nested_tensor([t.float().flatten()]),
    lambda t: nn.Parameter(t.float()),
    lambda t: nn.UninitializedParameter(),
    lambda t: t.tolist(),
    lambda t: t.float().numpy(),
    lambda t: None,
    lambda t: "weights",
    lambda t: {"a": t},
    lambda t: 10**400,
    lambda t: type("Tensor", (), {"shape": t.shape, "dtype": t.dtype})(),
    lambda t: ...,
]  # fmt: skip


def make(packed: bool, **options: Any) -> Everything:
    torch.manual_seed(0)
    net = Everything().eval()
    ocs.quantize(net, **{"wbits": 4, "r": 0.2, "skip": None, "embeddings": True} | options)
    return ocs.pack(net) if packed else net


def layer_of(net: nn.Module, key: str) -> tuple[str, nn.Module]:
    name = key.rpartition(".")[0]
    return name, net.get_submodule(name)


def held(layer: nn.Module) -> dict[str, Tensor]:
    return {
        key: tensor.clone()
        for key, tensor in (*layer._parameters.items(), *layer._buffers.items())
        if tensor is not None
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[key]) for key, tensor in a.items())


OPTIONS = {
    "plain": {},
    "inputs": {"abits": 8, "act_r": 0.2, "calibration": lambda net: net(*Everything.inputs())},
    "groups": {"granularity": "group", "group": 32},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_all_or_nothing(name: str, packed: bool) -> None:
    """A layer takes a state whose tensors can be its own, and is as it was where it does not."""
    start, chance, taken = make(packed, **OPTIONS[name]), random.Random(name), 0
    ours = [key for key in start.state_dict() if isinstance(layer_of(start, key)[1], QuantizedLayer)]
    biases = dict(
        start.named_parameters(remove_duplicate=False)
    )  # which torch checks, while it loads the rest of the layer
    net = copy.deepcopy(start)
    for _ in range(CASES):
        key = chance.choice(ours)
        path, layer = layer_of(net, key)
        before, state, assign = held(layer), dict(net.state_dict()), chance.randrange(2) == 1
        hostile = chance.choice(HOSTILE)
        try:
            state[key] = hostile(state[key])
        except (RuntimeError, NotImplementedError):  # torch has no such tensor of this one
            continue
        if state[key] is ...:
            del state[key]
        refused = ""
        try:
            net.load_state_dict(state, assign=assign)
        except RuntimeError as error:
            refused = str(error)
        if refused:
            assert key in biases or (path in refused and same(held(layer), before))
            continue
        taken += 1
        with suppress(Exception) if key in biases else nullcontext():  # a sparse bias, say
            net(*Everything.inputs())
        net = copy.deepcopy(start)
    assert 0 < taken < CASES


@pytest.mark.parametrize("dtype", [torch.uint64, torch.float16])
def test_the_form_of_an_input_in_another_dtype(dtype: torch.dtype) -> None:
    """Its values count: torch compares no uint64 with a byte."""
    net, key = make(False, **OPTIONS["inputs"]), "net.stem.input_form"
    state, own = dict(net.state_dict()), net.state_dict()[key]
    net.load_state_dict(state | {key: own.to(torch.int64).to(dtype)}, assign=True)
    assert net.state_dict()[key].dtype == torch.uint8
    assert torch.equal(net.state_dict()[key], own)
    with pytest.raises(RuntimeError, match=r"net\.stem: input_form is \[9"):
        net.load_state_dict(state | {key: (own.to(torch.int64) * 0 + 9).to(dtype)})
