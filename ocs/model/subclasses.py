"""Which subclasses of torch's layers compute what these do: proven by their code, not by running it."""

from collections.abc import Callable
from functools import lru_cache
from inspect import CO_VARARGS, CO_VARKEYWORDS
from types import CodeType
from typing import Any

from torch import nn

_CALLS = ("forward", "__call__", "__getattr__", "__getattribute__")


@lru_cache(maxsize=1024)
def changed_methods(kind: type[nn.Module], of: type[nn.Module]) -> tuple[str, ...]:
    """Name what a subclass defines that a call of the layer `of` uses, unless that is the same in effect.

    What a call does not use is harmless: static and class methods, properties, methods for others to call.
    """
    used = _used_by_calls(of)
    changed = {}
    for each in kind.__mro__[: kind.__mro__.index(of)]:
        for name, value in vars(each).items():
            if name in used and not _same(value, getattr(of, name, None)):
                changed[name] = None
    return tuple(changed)


@lru_cache(maxsize=64)
def _used_by_calls(of: type[nn.Module]) -> frozenset[str]:
    """Find every name that the code of a call may look up, in the methods of the layer that it names, and so on."""
    used, todo = set(), [*_CALLS]
    while todo:
        name = todo.pop()
        if name in used:
            continue
        used.add(name)
        method = getattr(of, name, None)
        names = _names(getattr(method, "__code__", None))
        if getattr(nn.Module, name, None) is method:  # which calls much that is none of the layer's
            names = [each for each in names if hasattr(nn.Module, each)]
        todo += names
    return frozenset(used - {"__class__", "__dict__", "__init__", "__doc__", "__module__", "__name__"})


def _names(code: CodeType | None) -> list[str]:
    """List the names in a function's code and in that of the functions in it."""
    if code is None:
        return []
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _names(const)]
    return [*code.co_names, *inner]


def _same(method: Any, of_torch: Any) -> bool:
    """Tell whether a method does what torch's does: it is that, a copy of it, or hands on to super()."""
    code, original = getattr(method, "__code__", None), getattr(of_torch, "__code__", None)
    if method is of_torch:
        return True
    if code is None or original is None:
        return False
    return _is_copy(method, of_torch) or any(_does(code, template.__code__) for template in _HAND_ON)


def _is_copy(method: Callable, of_torch: Callable) -> bool:
    """Tell whether a method has the code of torch's, and its names mean the same where it stands."""
    if not _does(method.__code__, of_torch.__code__) or _constants(method) != _constants(of_torch):
        return False
    here, there = method.__globals__, of_torch.__globals__
    return all(here.get(name) is there.get(name) for name in method.__code__.co_names if name in there or name in here)


def _does(code: CodeType, other: CodeType) -> bool:
    """Tell whether two functions run the same instructions on the same names, whatever they call their arguments."""
    parts = ("co_code", "co_names", "co_argcount", "co_kwonlyargcount", "co_freevars")
    variadic = (CO_VARARGS | CO_VARKEYWORDS) & (code.co_flags ^ other.co_flags)
    return not variadic and all(getattr(code, part) == getattr(other, part) for part in parts)


def _constants(method: Callable) -> list[Any]:
    return [const for const in method.__code__.co_consts if const != method.__doc__]


class _HandsOn:
    """Forwards that do nothing but call the next class's."""

    def one(self, x: Any) -> Any:
        return super().forward(x)

    def any(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


_HAND_ON = (_HandsOn.one, _HandsOn.any)
