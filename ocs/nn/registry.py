"""Which float layers can be quantized, and what replaces each of them.

The class of a quantized layer is registered where it is defined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from torch import nn

if TYPE_CHECKING:
    from ocs.nn.base import QuantizedLayer

REPLACEMENTS: dict[type[nn.Module], type[QuantizedLayer]] = {}
FINDERS: list[Callable[[nn.Module], type[QuantizedLayer] | None]] = []  # for modules that no class in the former tells
Kind = TypeVar("Kind", bound=type)


def register(kind: Kind) -> Kind:
    """Let this class of quantized layers replace the float layers that it names as its `float_kind`."""
    REPLACEMENTS[kind.float_kind] = kind
    return kind


def is_quantizable(module: nn.Module) -> bool:
    """Whether the module is of a kind that can be quantized."""
    return _kind_of(module) is not None


def replacement_of(module: nn.Module) -> type[QuantizedLayer]:
    """Find the class of quantized layers that replaces this float layer; a TypeError where there is none."""
    kind = _kind_of(module)
    if kind is None:
        raise TypeError(f"{type(module).__name__} is no layer that can be quantized")
    return kind


def _kind_of(module: nn.Module) -> type[QuantizedLayer] | None:
    """Find what replaces the nearest class that the module is of, or else what a finder knows."""
    found = next((REPLACEMENTS[kind] for kind in type(module).__mro__ if kind in REPLACEMENTS), None)
    if found is not None:
        return found.for_class(type(module))
    return next(filter(None, (find(module) for find in FINDERS)), None)
