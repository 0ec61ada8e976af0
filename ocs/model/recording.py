"""Record the graph of a module as torch.fx does, unnoticed by other threads.

fx.Tracer.trace replaces nn.Module.__call__ and __getattr__ for the whole process. Here only the modules that are
traced, which are a copy, get classes of their own, with another nn.Module at the end of their bases.
"""

import builtins
import math
import operator
import sys
import threading
from collections.abc import Iterator
from functools import lru_cache, partial
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace as of_fx

from ocs.model.references import Place
from ocs.model.rewrite import Slot, Step, eager, for_a_while

_CALL, _GETATTR = nn.Module.__call__, nn.Module.__getattr__
_lock = threading.RLock()  # of what is patched below


def record(tracer: fx.Tracer, root: nn.Module) -> fx.Graph:
    """Trace a module, which is the tracer's to change."""
    return for_a_while(
        [(_lock.acquire, _lock.release)], lambda: for_a_while(_steps(root), partial(_trace, tracer, root))
    )


def _trace(tracer: fx.Tracer, root: nn.Module) -> fx.Graph:
    """Do what fx.Tracer.trace does but for its patches."""
    tracer.root, tracer.root_module_name = root, root._get_name()
    tracer.submodule_paths = {module: name for name, module in root.named_modules()}
    tracer.graph = fx.Graph(tracer_cls=type(tracer))
    attributes = ((name, key, t) for name, m in root.named_modules() for key, t in vars(m).items())
    tracer.tensor_attrs = {
        t: f"{name}.{key}".removeprefix(".")
        for name, key, t in attributes
        if isinstance(t, Tensor | torch.ScriptObject)
    }
    _observe(tracer, root)
    forward, args = tracer.create_args_for_root(type(root).forward, True, None)
    tracer.create_node("output", "output", (tracer.create_arg(forward(*args)),), {})
    return tracer.graph


# --- Classes of traced modules ----------------------------------------------------------------------------------------


class _Unregistered:
    """Keeps classes made here from their bases' __init_subclass__, which may list them."""

    def __init_subclass__(cls, **options: Any) -> None:
        pass


def _observe(tracer: fx.Tracer, root: nn.Module) -> None:
    """Let the tracer see calls and look-ups of a module and its parts."""
    proxies: dict[str, fx.Proxy] = {}

    class Recorded(nn.Module):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return tracer.call_module(self, partial(_CALL, self), args, kwargs)

        def __getattr__(self, name: str) -> Any:
            return tracer.getattr(name, _GETATTR(self, name), proxies)

    classes: dict[type, type] = {}
    for module in list(root.modules()):
        kind = type(module)
        if kind not in classes:
            classes[kind] = _class(kind, Recorded)
        object.__setattr__(module, "__class__", classes[kind])


def _class(kind: type, recorded: type) -> type:
    """Make a class that does what another does, but for what it takes from nn.Module and from torch's attention."""
    readable = tuple(own for base, own in _READABLE.items() if issubclass(kind, base))
    own = () if kind in (nn.Module, *_READABLE) else (kind,)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type.__new__(type(kind), kind.__name__, (_Unregistered, *own, *readable, recorded), names)


def _unfused(kind: type[nn.Module]) -> type[nn.Module]:
    """Derive from a block of torch's one that does not ask its inputs whether fused kernels would do: they cannot tell.

    Its forward is the same code, which sees a `torch` that says that such kernels are switched off.
    """
    forward = kind.forward
    mha = SimpleNamespace(get_fastpath_enabled=bool)
    seen = {**forward.__globals__, "torch": _Overlaid(torch, backends=_Overlaid(torch.backends, mha=mha))}
    own = FunctionType(forward.__code__, seen, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__, own.__annotations__ = forward.__kwdefaults__, forward.__annotations__
    return type(kind.__name__, (kind,), {"forward": own, "__module__": kind.__module__})


class _Overlaid:
    """A Python module with some attributes of its own."""

    def __init__(self, module: Any, **own: Any) -> None:
        vars(self).update(own, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


_FUSED = (nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.MultiheadAttention)
_READABLE = {kind: _unfused(kind) for kind in _FUSED}


def unfused_classes(model: nn.Module) -> Iterator[Slot]:
    """Give torch's blocks in a model, and what derives from them, classes that take no fused path."""
    for module in model.modules():
        if isinstance(module, _FUSED):
            yield Slot(Place(module, "__class__", object.__setattr__, getattr), _unfused_class(type(module)))


@lru_cache(maxsize=64)
def _unfused_class(kind: type) -> type:
    return _class(kind, nn.Module)


# --- Functions that torch.fx keeps whole ------------------------------------------------------------------------------


def _steps(root: nn.Module) -> Iterator[Step]:
    """Have functions under torch.fx.wrap, and those of `math`, take what is traced, and compiled ones run as written.

    For whoever calls them with anything else they do what they did.
    """
    if "torch._dynamo" in sys.modules:
        yield from eager()
    for table, name in {(id(table), name): (table, name) for table, name in _kept_whole(root)}.values():
        recorded = of_fx._create_wrapped_func(table.get(name) or getattr(builtins, name))
        back = partial(operator.setitem, table, name, table[name]) if name in table else partial(table.pop, name)
        yield partial(operator.setitem, table, name, recorded), back


def _kept_whole(root: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Find these functions: the table of a Python module, and the name there."""
    forwards = [getattr(module.forward, "__globals__", {}) for module in root.modules()]
    functions = {id(value) for name, value in vars(math).items() if not name.startswith("_") and callable(value)}
    for table in {id(each): each for each in (vars(math), *forwards)}.values():
        yield from ((table, name) for name, value in list(table.items()) if name[0] != "_" and id(value) in functions)
    yield from ((table, name) for (_, name), table in of_fx._wrapped_fns_to_patch.copy().items())
