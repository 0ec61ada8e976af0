"""Which float layers can be quantized, and what replaces each of them.

The class of a quantized layer is registered where it is defined.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from torch import nn

if TYPE_CHECKING:
    from ocs.nn.base import QuantizedLayer

REPLACEMENTS: dict[type[nn.Module], type[QuantizedLayer]] = {}
Kind = TypeVar("Kind", bound=type)


def register(kind: Kind) -> Kind:
    """Let this class of quantized layers replace the float layers that it names as its `float_kind`."""
    REPLACEMENTS[kind.float_kind] = kind
    return kind


def is_quantizable(module: nn.Module) -> bool:
    """Whether the module is of a kind that can be quantized."""
    return isinstance(module, tuple(REPLACEMENTS))


def replacement_of(module: nn.Module) -> type[QuantizedLayer]:
    """Find the class of quantized layers that replaces this float layer."""
    return next(new for kind, new in REPLACEMENTS.items() if isinstance(module, kind))
