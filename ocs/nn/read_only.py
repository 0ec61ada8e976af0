"""The weight of a quantized layer as other code reads it: what the layer computes, which no write could change."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WAY_OUT = "is made from integers and cannot be written: change the float model (merge its adapters), then quantize it"


def refusal(layer: object, name: str) -> str:
    """Say to whoever writes a quantized layer's weight what to do instead."""
    return f"{type(layer).__name__}: its {name} {_WAY_OUT}"


def read_only(weight: Tensor, layer: object, name: str) -> Tensor:
    """Make a tensor that shares a weight's memory and refuses writes; what is traced, compiled or learned is plain."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.fx._symbolic_trace._is_fx_tracing_flag
    if traced or weight.requires_grad or torch._C._len_torch_dispatch_stack() or type(weight) is not Tensor:
        return weight
    return _wrapped(weight, refusal(layer, name))


class ReadOnlyWeight(Tensor):
    """A tensor that operations read as any other, but that none may write, nor a view of it, nor its `data`.

    The operators' schemas say which of their arguments they write; results that are no views are plain tensors.
    """

    plain: Tensor  # of the same memory
    refusal: str  # what to say to who writes it
    __torch_function__ = torch._C._disabled_torch_function_impl  # so that torch's fast paths take it

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run an operator on plain tensors, if it does not write one of these."""
        kwargs = kwargs or {}
        written, returns_views = _effects(func)
        for each in _read_only([*(args[i] for i, _ in written if i < len(args)), *(kwargs.get(n) for _, n in written)]):
            raise RuntimeError(each.refusal)
        result = func(*map(_plain, args), **{name: _plain(value) for name, value in kwargs.items()})
        if not returns_views:
            return result
        text = next(_read_only([*args, *kwargs.values()])).refusal
        return [_wrapped(view, text) for view in result] if isinstance(result, list) else _wrapped(result, text)

    @property
    def data(self) -> Tensor:
        """This tensor without its gradient, read-only, too."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError(self.refusal)

    @property
    def requires_grad(self) -> bool:
        """False: no gradient reaches the integers."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Refuse to be trained."""
        if requires_grad:
            raise RuntimeError(self.refusal)
        return self

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """Give a numpy array that shares the memory and is read-only, too."""
        array = self.plain.numpy(force=force)
        array.flags.writeable = False
        return array

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Convert to a numpy array."""
        return self.numpy().__array__(*args, **kwargs)

    def tolist(self) -> Any:
        """Convert to a list of numbers."""
        return self.plain.tolist()

    def __repr__(self, **options: Any) -> str:
        """Show the values as of any tensor."""
        return self.plain.__repr__(**options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Copy to a plain tensor, which may be written."""
        return self.plain.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain tensor."""
        return self.plain.clone().__reduce_ex__(protocol)


class _UnfusedWeight(ReadOnlyWeight):
    """One that torch's fused layers do not take, as they ask for tensors without a function of their own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Do what is asked for as with any other."""
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def unfused(weight: ReadOnlyWeight) -> Tensor:
    """Make of such a tensor one that torch's fused layers do not take."""
    return _wrapped(weight.plain, weight.refusal, _UnfusedWeight)


def _wrapped(weight: Tensor, text: str, kind: type[ReadOnlyWeight] = ReadOnlyWeight) -> Tensor:
    made = Tensor._make_subclass(kind, weight)
    made.plain, made.refusal = weight, text
    return made


def _plain(value: Any) -> Any:
    """Take the plain tensor of an argument that is one of these, or a list of arguments."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value.plain if isinstance(value, ReadOnlyWeight) else value


def _read_only(values: list[Any]) -> Iterator[ReadOnlyWeight]:
    """Find these tensors among arguments, some of which are lists."""
    for value in values:
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(each, ReadOnlyWeight):
                yield each


@lru_cache(maxsize=1024)
def _effects(func: Any) -> tuple[list[tuple[int, str]], bool]:
    """Tell which arguments an operator writes, by place and name, and whether its results are views."""
    arguments, results = func._schema.arguments, func._schema.returns
    written = [(i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    return written, any(each.alias_info is not None for each in results)
