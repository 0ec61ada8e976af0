"""Rewrite a model in place, all or nothing."""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import nn

Slot = tuple[MutableMapping[str, Any], str, Any]  # where, under which name, what shall stand there

_NOTHING = object()  # stood there


def module_slots(model: nn.Module, replacements: Mapping[int, nn.Module]) -> Iterator[Slot]:
    """Find every place in the model where a module stands that has a replacement (by id of the old module)."""
    parents = [parent for parent in model.modules() if id(parent) not in replacements]
    for parent in [*parents, *replacements.values()]:  # which may hold children that are replaced too
        for name, child in parent._modules.items():
            if id(child) in replacements:
                yield parent._modules, name, replacements[id(child)]


def exchange(slots: list[Slot]) -> None:
    """Put every object where it belongs or, if that fails anywhere, leave everything as it was."""
    done: list[Slot] = []
    try:
        for where, name, new in slots:
            done.append((where, name, where.get(name, _NOTHING)))
            where[name] = new
    except BaseException:
        for where, name, old in done:
            if old is _NOTHING:
                where.pop(name, None)
            else:
                where[name] = old
        raise
