"""Names, patterns, types and predicates that say which layers are meant."""

import fnmatch
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import nn

from ocs.model.targets import Target
from ocs.nn.convolution import CONVOLUTIONS

FEW_CHANNELS = 4  # that an image has at most


class _FirstLayer:
    """The model's first convolution, where it sees the image or sound (section 5 of the paper).

    It has at most four input channels, in one group, and is no patch embedding, whose patches do not overlap.
    """

    def __repr__(self) -> str:
        return "ocs.FIRST_LAYER"


FIRST_LAYER = _FirstLayer()

Predicate = Callable[[str, nn.Module], bool]
Selector = _FirstLayer | str | type[nn.Module] | Predicate


def selectors(skip: Selector | Collection[Selector] | None) -> list[Selector]:
    """List the selectors of `skip` one by one."""
    if skip is None:
        return []
    return list(skip) if isinstance(skip, list | tuple | set) else [skip]


def selected(selector: Selector, targets: Sequence[Target], argument: str = "skip") -> list[Target]:
    """List the targets that a selector means.

    Raises:
        ValueError: a name or pattern fits none.
        TypeError: it is no selector.
    """
    if isinstance(selector, _FirstLayer):
        convolutions = [target for target in targets if isinstance(target.module, CONVOLUTIONS)][:1]
        return [target for target in convolutions if _sees_input(target.module)]
    if isinstance(selector, str):
        return fitting(selector, targets, argument)
    if isinstance(selector, type):
        return [target for target in targets if isinstance(target.module, selector)]
    if callable(selector) and not isinstance(selector, nn.Module):
        return [target for target in targets if selector(target.name, target.module)]
    raise TypeError(f"{argument}={selector!r}: use ocs.FIRST_LAYER, a name or pattern, a module type, or a predicate")


def _sees_input(convolution: nn.Module) -> bool:
    """Tell by its sizes whether a model's first convolution sees what the model is given."""
    size, stride = convolution.kernel_size, convolution.stride
    embeds_patches = size == stride and max(size) > 1
    return convolution.in_channels <= FEW_CHANNELS and convolution.groups == 1 and not embeds_patches


def fitting(pattern: str, targets: Sequence[Target], argument: str) -> list[Target]:
    """List the targets that have this name or fit this glob pattern; a ValueError where none does."""
    found = [target for target in targets if _has_name(target, pattern)]
    if not found:
        raise ValueError(f"{argument}={pattern!r}: no layer has that name; the layers are {_names(targets)}")
    return found


def _has_name(target: Target, pattern: str) -> bool:
    return pattern in target.aliases or any(fnmatch.fnmatchcase(alias, pattern) for alias in target.aliases)


def _names(targets: Sequence[Target]) -> str:
    names = [target.name for target in targets]
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown


def shown_selector(selector: Any) -> str:
    """Write a selector as a user wrote it."""
    return repr(selector) if isinstance(selector, str) else getattr(selector, "__name__", repr(selector))


def is_default(selector: Selector) -> bool:
    """Tell whether it is ocs.FIRST_LAYER, or a copy of that."""
    return isinstance(selector, _FirstLayer)


def reason_to_skip(selector: Selector) -> str:
    """Say why the layers that a selector means are left out, as reports do."""
    return "first convolution" if is_default(selector) else f"skip={shown_selector(selector)}"
