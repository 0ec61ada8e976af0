"""A packed weight as the forward of another class reads it: a tensor whose linear products stay packed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ocs.nn.packed.weight import PackedWeight, is_autocast


class ReadWeight(Tensor):
    """A packed weight as a tensor [O, C], [C, O] or [E, O, C]: linear products with it stay packed.

    For forwards that are not ours: F.linear, torch.addmm and matrix products by one weight multiply the packed one;
    whatever else is done with it is done with its dequantized copy, made anew.
    """

    parts: list[PackedWeight]  # one, or one for each expert
    transposed: bool
    stacked: bool

    @staticmethod
    def of(parts: list[PackedWeight], dtype: torch.dtype, *, transposed: bool, stacked: bool) -> ReadWeight:
        """Make such a tensor without values of its own."""
        outputs, channels = parts[0].form.shape[0], parts[0].form.channels
        shape = [channels, outputs] if transposed else [outputs, channels]
        shape = [len(parts), *shape] if stacked else shape
        made = Tensor._make_wrapper_subclass(ReadWeight, shape, dtype=dtype, device=parts[0].codes.device)
        made.parts, made.transposed, made.stacked = parts, transposed, stacked
        return made

    def dense(self) -> Tensor:
        """Make the float weight."""
        weights = [part.folded().to(self.dtype) for part in self.parts]
        weights = [weight.t() if self.transposed else weight for weight in weights]
        return torch.stack(weights) if self.stacked else weights[0]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Multiply packed where that can be; do all else with floats."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _ATTRIBUTES:
                return func(*args, **kwargs)
            result = _packed_result(func, args, kwargs)
            return func(*map(_dense, args), **{k: _dense(v) for k, v in kwargs.items()}) if result is None else result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Do what reaches the dispatcher with floats."""
        return func(*map(_dense, args), **{name: _dense(value) for name, value in (kwargs or {}).items()})


_ATTRIBUTES = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout")),
    *(getattr(Tensor, name) for name in ("dim", "size", "numel", "is_floating_point", "__len__")),
}  # fmt: skip


def _dense(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_dense, value))
    return value.dense() if isinstance(value, ReadWeight) else value


def _packed_result(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute what packed weights can, None where they cannot."""
    if func is F.linear and not set(kwargs) - {"bias", "weight", "input"}:
        named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        return _product(named["input"], named["weight"], named.get("bias"), transposed=False)
    if kwargs:
        return None
    if func in (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__):
        return _product(args[0], args[1], None, transposed=True)
    if func is torch.addmm and len(args) == 3:
        return _product(args[1], args[2], args[0], transposed=True)
    if func in (Tensor.__getitem__, Tensor.t, Tensor.T.__get__, Tensor.mT.__get__):
        return _view(func, *args)
    return None


def _view(func: Any, weight: ReadWeight, index: Any = None) -> ReadWeight | None:
    """Take one expert's weight, or transpose one."""
    if func is not Tensor.__getitem__:
        if weight.stacked:
            return None
        return ReadWeight.of(weight.parts, weight.dtype, transposed=not weight.transposed, stacked=False)
    one = isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point())
    if not (weight.stacked and one) or isinstance(index, bool):
        return None
    return ReadWeight.of([weight.parts[int(index)]], weight.dtype, transposed=weight.transposed, stacked=False)


def _product(x: Any, weight: Any, bias: Any, *, transposed: bool) -> Tensor | None:
    """Compute x w^T + bias, where w is packed, one matrix, and no gradient is asked for."""
    if not isinstance(weight, ReadWeight) or isinstance(x, ReadWeight) or weight.stacked:
        return None
    part, fits = weight.parts[0], x.dtype == weight.dtype or (is_autocast(x) and x.is_floating_point())
    plain = x.layout == torch.strided and not x.is_nested and x.shape[-1:] == (part.form.channels,)
    if not (plain and fits) or weight.transposed != transposed or (torch.is_grad_enabled() and x.requires_grad):
        return None
    if bias is not None and (bias.dim() != 1 or bias.numel() != part.form.shape[0]):
        return None
    return part.multiply(x, bias)
