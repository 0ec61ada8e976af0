"""Every reference through which a model holds its layers: as children, and in whatever other objects it has.

The walk goes from modules through attributes, containers, functions' closures and defaults, and whatever else the
garbage collector knows of, and stops at tensors, classes, Python modules and the globals of functions.
"""

import gc
import operator
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from ocs.nn.registry import is_quantizable, replacement_of


class Place(NamedTuple):
    """Where something can be put, and how: put(where, key, new)."""

    where: Any
    key: Any
    put: Callable[[Any, Any, Any], Any] = operator.setitem
    get: Callable[[Any, Any], Any] = operator.getitem


class Edge(NamedTuple):
    """A reference to a module, or to something immutable that may hold one."""

    holder: str  # in words
    child: Any
    place: Place | None  # None where nothing else can be put there


def edges_of(modules: Iterable[nn.Module], closed: Collection[int] = ()) -> Iterator[Edge]:
    """Find all references from these modules on, those of children first; not from modules whose id is in `closed`."""
    todo = deque((module, type(module).__name__) for module in modules if id(module) not in closed)
    seen: dict[int, Any] = {}  # by id; it keeps alive what is made on the way
    while todo:
        thing, name = todo.popleft()
        if id(thing) in seen or id(thing) in closed:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, nn.Module):
            todo.extend(
                (base, base.__name__) for base in type(thing).__mro__ if not base.__module__.startswith("torch.")
            )
        inner = _is_renewed(type(thing))
        for child, place, label in _references(thing):
            kind = type(child)
            if kind in _ATOMS or issubclass(kind, _STOPS):
                continue
            holder, is_module = f"'{label}' of {name}" if label else name, issubclass(kind, nn.Module)
            if not inner and (is_module or _is_renewed(kind)):
                yield Edge(holder, child, place)
            if id(child) not in seen:
                todo.append((child, kind.__name__ if is_module else holder))


def held_elsewhere(model: nn.Module) -> dict[int, str]:
    """Say, by id, of the modules that are also held where no other can be put, who holds them."""
    found: dict[int, str] = {}
    for edge in edges_of(model.modules()):
        for module in _fixed(edge.child) if edge.place is not None else _modules_in(edge.child):
            reason = f"is also held by {edge.holder}, which cannot be given another layer"
            found.setdefault(id(module), reason)
    return found


# --- What refers to what ----------------------------------------------------------------------------------------------

_NUMBERS = (int, float, complex, bool, torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format)
_ATOMS = frozenset((str, bytes, type(None), slice, range, type(...), Tensor, nn.Parameter, *_NUMBERS))
_SIMPLE = frozenset((dict, OrderedDict, list, tuple, set))
_COMPLETE = frozenset((dict, OrderedDict, list, deque, types.CellType, types.FunctionType))  # all they hold is listed
_STOPS = (Tensor, type, types.ModuleType, types.CodeType, types.FrameType, types.TracebackType, np.generic)
_References = Iterator[tuple[Any, Place | None, str]]  # a child, where it is put, and the attribute's name if it is one


def _references(thing: Any) -> _References:
    """List what a thing refers to."""
    kind = type(thing)
    if _is_renewed(kind):
        yield from ((child, None, "") for child in _contents(thing))
    elif issubclass(kind, type):
        for name, child in list(vars(thing).items()):
            yield child, Place(thing, name, type.__setattr__, getattr), name
    elif issubclass(kind, dict):
        yield from _of_dict(thing)
    elif issubclass(kind, list | deque):
        if not _ATOMS.issuperset(map(type, thing)):
            yield from ((child, Place(thing, i), "") for i, child in enumerate(thing))
    elif kind is types.CellType:
        yield _value(thing, "cell_contents"), Place(thing, "cell_contents", setattr, getattr), ""
    elif kind is types.FunctionType:
        yield from ((cell, None, "") for cell in thing.__closure__ or ())
        yield thing.__defaults__, Place(thing, "__defaults__", setattr, getattr), ""
        yield from ((table, None, "") for table in (thing.__kwdefaults__, thing.__dict__))
    elif issubclass(kind, np.ndarray) and thing.dtype.hasobject:
        yield from ((child, Place(thing.flat, i), "") for i, child in enumerate(thing.flat))
    if not (kind in _COMPLETE or issubclass(kind, type) or _is_renewed(kind)) and gc.is_tracked(thing):
        yield from _of_object(thing, kind)


def _of_dict(table: dict[Any, Any]) -> _References:
    """List keys, which cannot be exchanged, and values of a dict."""
    for key, child in list(dict.items(table)):
        if not _holds_nothing(child):
            yield child, Place(table, key), key if type(key) is str else ""
        if type(key) not in _ATOMS:
            yield key, None, ""


def _of_object(thing: Any, kind: type) -> _References:
    """List the attributes of an object, those in slots, too, and whatever else it refers to."""
    table, module = _value(thing, "__dict__"), issubclass(kind, nn.Module)
    if module:
        yield table.get("_modules"), None, ""
    known = {id(kind), id(table)}
    for name, child in list((table or {}).items()):
        known.add(id(child))
        if not (_holds_nothing(child) or (module and name in ("_parameters", "_buffers", "_modules"))):
            yield child, Place(table, name), name
    for name in _slots(kind):
        child = _value(thing, name)
        known.add(id(child))
        yield child, Place(thing, name, object.__setattr__, object.__getattribute__), name
    if not module:
        listed = thing if issubclass(kind, dict | list | deque) else ()
        known.update(map(id, dict.values(thing) if issubclass(kind, dict) else listed))
        yield from ((child, None, "") for child in gc.get_referents(thing) if id(child) not in known)


@lru_cache(maxsize=1024)
def _slots(kind: type) -> tuple[str, ...]:
    """Name the attributes that objects of a class have in slots."""
    slotted = (vars(base) for base in kind.__mro__ if "__slots__" in vars(base))
    return tuple(n for own in slotted for n, member in own.items() if type(member) is types.MemberDescriptorType)


def _holds_nothing(child: Any) -> bool:
    """Tell quickly of most things that they hold no module."""
    kind = type(child)
    return kind in _ATOMS or (
        kind in _SIMPLE and (not child or (kind is tuple and _ATOMS.issuperset(map(type, child))))
    )


def _value(thing: Any, name: str) -> Any:
    """Give an attribute without calling code of the thing's class; None where there is none."""
    try:
        return object.__getattribute__(thing, name)
    except (AttributeError, ValueError):  # a ValueError of an empty cell
        return None


# --- What is made anew around another layer ---------------------------------------------------------------------------


def renewed(thing: Any, known: dict[int, Any]) -> Any:
    """Make something immutable again around other modules; itself where it holds none of them.

    known: what stands for what, by id of the old thing.
    """
    kind = type(thing)
    if id(thing) in known or not _is_renewed(kind):
        return known.get(id(thing), thing)
    old = _contents(thing)
    new = [renewed(each, known) for each in old]
    if any(a is not b for a, b in zip(old, new, strict=True)):
        return _RENEWED.get(kind, lambda thing, parts: kind._make(parts))(thing, new)
    return thing


def _renewed_method(method: types.MethodType, parts: list[Any]) -> Any:
    owner, function = parts
    if issubclass(type(method.__self__), nn.Module) and owner is not method.__self__:
        return getattr(owner, method.__name__)
    return types.MethodType(function, owner)


def _renewed_partial(old: partial, parts: list[Any]) -> partial:
    count = len(old.args)
    function, args, values = parts[0], parts[1 : 1 + count], parts[1 + count :]
    new = partial(function, *args, **dict(zip(old.keywords, values, strict=True)))
    vars(new).update(vars(old))
    return new


_RENEWED: dict[type, Callable[[Any, list[Any]], Any]] = {
    tuple: lambda _, parts: tuple(parts),
    frozenset: lambda _, parts: frozenset(parts),
    set: lambda _, parts: set(parts),
    types.MappingProxyType: lambda old, parts: types.MappingProxyType(dict(zip(old, parts, strict=True))),
    types.MethodType: _renewed_method,
    partial: _renewed_partial,
    weakref.ref: lambda old, parts: weakref.ref(parts[0], old.__callback__),
}


def _contents(thing: Any) -> list[Any]:
    """List what is in something immutable, as renewed() gives it to what makes it again."""
    kind = type(thing)
    if kind is types.MethodType:
        return [thing.__self__, thing.__func__]
    if kind is partial:
        return [thing.func, *thing.args, *thing.keywords.values()]
    if kind is weakref.ref:
        return [thing()]
    return list(thing.values() if kind is types.MappingProxyType else thing)


@lru_cache(maxsize=1024)
def _is_renewed(kind: type) -> bool:
    """Tell whether things of this kind are made anew around another layer; named tuples are, too."""
    return kind in _RENEWED or (issubclass(kind, tuple) and hasattr(kind, "_make"))


def _modules_in(thing: Any) -> Iterator[nn.Module]:
    """Find the modules that something immutable holds, or is."""
    kind = type(thing)
    if issubclass(kind, nn.Module):
        yield thing
    elif _is_renewed(kind):
        for each in _contents(thing):
            yield from _modules_in(each)


def _fixed(thing: Any) -> Iterator[nn.Module]:
    """Find the modules of which something immutable holds a method that no replacement has."""
    kind = type(thing)
    if kind is types.MethodType and issubclass(type(thing.__self__), nn.Module):
        module = thing.__self__
        kinds = (nn.Identity, *((replacement_of(module),) if is_quantizable(module) else ()))
        lazy = isinstance(module, LazyModuleMixin)  # it has a hook of its own until it has values
        if not lazy and not any(hasattr(kind, thing.__name__) for kind in kinds):
            yield module
    elif _is_renewed(kind):
        for each in _contents(thing):
            yield from _fixed(each)
