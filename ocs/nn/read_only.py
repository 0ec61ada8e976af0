"""The weight of a quantized layer as other code reads it: what the layer computes, which no write could change."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

_WAY_OUT = "is made from integers and cannot be written: change the float model (merge its adapters), then quantize it"


def refusal(layer: object, name: str) -> str:
    """Say to whoever writes a quantized layer's weight what to do instead."""
    return f"{type(layer).__name__}: its {name} {_WAY_OUT}"


def read_only(weight: Tensor, layer: object, name: str) -> Tensor:
    """Make a tensor that shares a weight's memory and refuses writes; what is traced or compiled gets a plain one."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.fx._symbolic_trace._is_fx_tracing_flag
    if traced or type(weight) is not Tensor:
        return weight
    return _wrapped(weight, refusal(layer, name))


class ReadOnlyWeight(Tensor):
    """A tensor that operations read as any other, but that none may write, nor a view of it, nor its `data`.

    The operators' schemas say which of their arguments they write; results that are no views are plain tensors.
    """

    refusal: str
    __torch_function__ = torch._C._disabled_torch_function_impl  # so that torch's fast paths take it

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run an operator on plain tensors, if it does not write one of these."""
        kwargs = kwargs or {}
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        for each in tree_leaves([given.get(name) for name in written]):
            if isinstance(each, cls):
                raise RuntimeError(each.refusal)
        result = func(*tree_map_only(cls, _plain, args), **tree_map_only(cls, _plain, kwargs))
        if not any(argument.alias_info is not None for argument in func._schema.returns):
            return result
        text = next(each.refusal for each in tree_leaves((args, kwargs)) if isinstance(each, cls))
        return tree_map_only(Tensor, lambda view: _wrapped(view, text), result)

    @property
    def data(self) -> Tensor:
        """The same tensor, as read-only."""
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
        array = _plain(self).numpy(force=force)
        array.flags.writeable = False
        return array

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Convert to a numpy array."""
        return self.numpy().__array__(*args, **kwargs)

    def tolist(self) -> Any:
        """Convert to a list of numbers."""
        return _plain(self).tolist()

    def __repr__(self, **options: Any) -> str:
        """Show the values as of any tensor."""
        return _plain(self).__repr__(**options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Copy to a plain tensor, which may be written."""
        return _plain(self).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain tensor."""
        return _plain(self).clone().__reduce_ex__(protocol)


def _wrapped(weight: Tensor, text: str) -> Tensor:
    made = Tensor._make_subclass(ReadOnlyWeight, weight)
    made.refusal = text
    return made


def _plain(weight: Tensor) -> Tensor:
    with torch._C._DisableTorchDispatch():
        return torch.ops.aten.alias.default(weight)
