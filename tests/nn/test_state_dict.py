"""States that are loaded: every tensor of them is checked, and the float layer's hooks see them."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ocs


def quantized(layer: nn.Module | None = None, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4) if layer is None else layer)
    ocs.quantize(net, wbits=4, r=0.3, skip=None, **options)
    return net


def on_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


# --- What is in them --------------------------------------------------------------------------------------------------

BAD: dict[str, dict[str, Callable[[Tensor], object]]] = {
    "integers out of range, scale on meta": {"weight_int": lambda t: t * 0 + 99, "scale": on_meta},
    "source out of range, integers on meta": {"source": lambda t: t + 1000, "weight_int": on_meta},
    "scale on meta alone": {"scale": on_meta},
    "source of another size, all on meta": {
        "source": lambda t: on_meta(t[:-1]), "weight_int": on_meta, "scale": on_meta},
    "input scale on meta alone": {"input_scale": on_meta},
    "a list": {"weight_int": Tensor.tolist},
    "a number": {"scale": float},
    "an array": {"source": Tensor.numpy},
    "sparse": {"weight_int": Tensor.to_sparse},
    "a sparse source": {"source": Tensor.to_sparse},
    "complex": {"scale": lambda t: t + 1j},
    "input form a list": {"input_form": Tensor.tolist},
    "input scale None, source sparse": {"input_scale": lambda t: None, "source": Tensor.to_sparse},
}  # fmt: skip


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_each_tensor_is_checked(case: str, assign: bool) -> None:
    net = quantized(abits=4, calibration=lambda model: model(torch.ones(2, 6)))
    before = copy.deepcopy(net.state_dict())
    state = net.state_dict()
    for name, damage in BAD[case].items():
        state[f"0.{name}"] = damage(state[f"0.{name}"])
    first = next(iter(BAD[case]))
    with pytest.raises(RuntimeError, match=rf"0: .*{first}|0: .*{list(BAD[case])[-1]}"):
        net.load_state_dict(state, assign=assign)
    after = net.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_all_on_meta_is_a_state_without_values() -> None:
    net = quantized()
    net.load_state_dict({name: on_meta(tensor) for name, tensor in net.state_dict().items()}, assign=True)
    assert all(tensor.is_meta for tensor in net.state_dict().values())


# --- Hooks ------------------------------------------------------------------------------------------------------------


def rename(module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """Take the integers under an older name."""
    module.seen = True
    if prefix + "old_int" in state:
        state[prefix + "weight_int"] = state.pop(prefix + "old_int")


def note(module: nn.Module, keys: Any) -> None:
    module.loaded = True


def add(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state[prefix + "version"] = torch.tensor(2)


def hooked() -> tuple[nn.Linear, Any]:
    layer = nn.Linear(6, 4)
    handle = layer.register_load_state_dict_pre_hook(rename)
    layer.register_load_state_dict_post_hook(note)
    layer.register_state_dict_post_hook(add)
    return layer, handle


TRAVEL = {"as it is": lambda net: net, "copy": copy.deepcopy, "pickle": lambda net: pickle.loads(pickle.dumps(net))}


@pytest.mark.parametrize("travel", TRAVEL)
def test_hooks_of_the_state_are_carried_over(travel: str) -> None:
    """They are called with the quantized layer, once, before anything is checked."""
    state = quantized().state_dict()
    state["0.old_int"] = state.pop("0.weight_int")
    state["0.version"] = torch.tensor(2)
    net = quantized(hooked()[0])
    gc.collect()  # the float layer
    net = TRAVEL[travel](net)
    assert int(net.state_dict()["0.version"]) == 2
    keys = net.load_state_dict(state, strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], ["0.version"])
    assert net[0].seen
    assert net[0].loaded
    assert torch.equal(net[0].weight_int, quantized()[0].weight_int)


def test_a_hook_is_removed_by_its_handle() -> None:
    layer, handle = hooked()
    net = quantized(layer)
    handle.remove()
    net.load_state_dict(net.state_dict(), strict=False)
    assert not hasattr(net[0], "seen")


def test_a_hook_is_called_once() -> None:
    calls, layer = [], nn.Linear(6, 4)
    layer.register_load_state_dict_pre_hook(lambda module, *others: calls.append(type(module).__name__))
    net = quantized(layer)
    net.load_state_dict(net.state_dict())
    assert calls == ["QuantLinear"]


class Versioned(nn.Linear):
    """Its hook is its own method, which knows the float layer alone."""

    def __init__(self) -> None:
        super().__init__(6, 4)
        self._register_load_state_dict_pre_hook(self._upgrade)

    def _upgrade(self, *arguments: Any) -> None:
        pass


class Converting(nn.Linear):
    """It converts what it loads."""

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)


@pytest.mark.parametrize("layer", [Versioned(), Converting(6, 4)])
def test_a_layer_that_loads_its_state_by_itself_stays_float(layer: nn.Module) -> None:
    report = ocs.quantize(nn.Sequential(layer, nn.Linear(4, 40)))
    assert report.layers[0].reason == f"{type(layer).__name__} has a way of its own to save or load its state"
