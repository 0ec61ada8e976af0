"""What a model does, as torch.fx sees it: one graph for each way to call it.

Nothing here changes the model. Where a proof is needed (batchnorm_folding), all of it must be traced; where an
estimate will do (input_statistics), the parts that can be, each by itself.
"""

import copy
import inspect
import itertools
import textwrap
from collections import ChainMap
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from ocs.model.recording import record
from ocs.model.wrappers import unwrap_children, unwrapped
from ocs.nn.base import QuantizedLayer
from ocs.nn.registry import is_quantizable

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MOST_OPTIONAL = 3  # arguments of a model's forward: each one doubles the number of traces


class Trace(NamedTuple):
    """What a model does in one call."""

    graph: fx.Graph
    read: set[str]  # names of the modules whose parameters or buffers are looked up from outside


def traces(model: nn.Module) -> list[Trace]:
    """Trace the model once for each choice of optional arguments.

    Raises whatever torch.fx or the model's own code raises where one trace fails.
    """
    _check(model)
    return [_trace(model, _Tracer(arguments)) for arguments in _choices(type(model).forward)]


def traced_parts(model: nn.Module) -> list[tuple[str, list[Trace]]]:
    """Trace the model, or where that cannot be its parts, by name; never fails.

    A part that cannot be traced stands as one node in what is around it. Optional arguments for which a trace fails are
    left out.
    """
    return _parts(model)[0]


def own_graph(module: nn.Module, **attributes: Any) -> fx.Graph:
    """Trace what a module's own forward does, each of its children as one node; it may have other attributes there.

    Raises whatever torch.fx or the module's own code raises where that fails.
    """
    _check(module)
    copied = copy.deepcopy(module, _kept(module))
    vars(copied).update(attributes)
    return _trace(copied, _OwnTracer({})).graph


def first_line(error: Exception) -> str:
    """Shorten what an error says."""
    return textwrap.shorten(next(iter(str(error).splitlines()), "") or type(error).__name__, 100, placeholder=" ...")


def _is_node(module: nn.Module) -> bool:
    """Tell whether a module, a layer or norm, is one node of a graph."""
    return isinstance(module, QuantizedLayer | _BatchNorm) or is_quantizable(module)


def has_hooks(module: nn.Module) -> bool:
    """Tell whether more may run than the module's forward."""
    return any(vars(module).get(hooks) for hooks in _HOOKS)


def asks_for_shape(node: fx.Node) -> bool:
    """Tell whether a node asks for what a tensor's values do not change: its shape, dtype or device."""
    if node.op == "call_method":
        return node.target in ("size", "dim")
    facts = ("shape", "ndim", "dtype", "device")
    return node.op == "call_function" and node.target is getattr and node.args[1] in facts


# --- One trace --------------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Records layers, norms and modules with hooks as one node each: hooks must not run on what are no tensors.

    arguments: values for some of the arguments of the model's forward; the others are symbolic.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments
        self.read: set[int] = set()  # ids of tensors
        self.nodes: set[nn.Module] = set()  # layers and norms

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Do not look into layers and norms, subclasses of torch's among them, which torch.fx would look into."""
        return m in self.nodes or has_hooks(m) or super().is_leaf_module(m, module_qualified_name)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Remember which tensors the model looks up: buffers leave no other mark."""
        if isinstance(attr_val, Tensor):
            self.read.add(id(attr_val))
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_args_for_root(self, root_fn: Callable, is_module: bool, concrete_args: Any = None) -> tuple[Any, list]:
        """Give the model's forward its arguments, the model first."""
        names = inspect.unwrap(root_fn).__code__.co_varnames
        fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        return fn, [self.arguments.get(name, arg) for name, arg in zip(names, args, strict=False)]


class _OwnTracer(_Tracer):
    """Looks into no child."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Record each child as one node."""
        return True


class _OpenTracer(_Tracer):
    """Looks into torch's own blocks of layers (transformers), too, and not into what is opaque.

    A forward is called without more arguments than it names, and without its decorators.
    """

    def __init__(self, arguments: dict[str, Any], opaque: Collection[str]) -> None:
        super().__init__(arguments)
        self.opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Look into blocks of layers, but not into what is opaque: by name, as the traced modules are copies."""
        if module_qualified_name in self.opaque:
            return True
        block = not (m in self.nodes or has_hooks(m)) and any(part in self.nodes for part in m.modules())
        return not block and super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Callable, is_module: bool, concrete_args: Any = None) -> tuple[Any, list]:
        """Give the model's forward no more arguments than it names, and empty ones for *args and **kwargs."""
        root_fn = inspect.unwrap(root_fn)
        fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        code, flags = root_fn.__code__, root_fn.__code__.co_flags
        named = code.co_argcount + code.co_kwonlyargcount
        args = args[:named]
        if flags & inspect.CO_VARARGS:
            args.append(())
        if flags & inspect.CO_VARKEYWORDS:
            args.append({})
        return fn, args


def _check(model: nn.Module) -> None:
    """Refuse a model of which more runs than a trace would see."""
    own_call = type(model).__call__ is not nn.Module.__call__ and not isinstance(model, fx.GraphModule)
    if own_call or "forward" in vars(model):
        raise ValueError("its forward is not all that runs")
    if _has_any_global_hook():
        raise ValueError("there are hooks on all modules")


def _trace(model: nn.Module, tracer: _Tracer) -> Trace:
    # A forward may keep what it computes, and torch.fx its constants: neither in the user's model.
    copied = copy.deepcopy(model, _kept(model))
    if set(copied.modules()) & set(model.modules()):
        raise ValueError("it cannot be copied: its parts remain the same")
    unwrap_children(copied)
    tracer.nodes = {module for module in copied.modules() if _is_node(module)}  # by the classes that they still have
    graph = record(tracer, copied)
    tensors = ((name, [*m._parameters.values(), *m._buffers.values()]) for name, m in copied.named_modules())
    return Trace(graph, {name for name, own in tensors if any(id(t) in tracer.read for t in own)})


def _kept(model: nn.Module) -> dict[int, Tensor]:
    """Find what a copy to be traced shares with the model, by id: parameters, and what is made of them (pruning)."""
    held = (t for module in model.modules() for t in (*module._parameters.values(), *vars(module).values()))
    return {id(t): t for t in held if isinstance(t, Tensor) and (isinstance(t, nn.Parameter) or not t.is_leaf)}


def _choices(forward: Callable) -> list[dict[str, Any]]:
    """List every way to call it as to its optional arguments: left out or given, True or False."""
    optional = [p for p in inspect.signature(forward).parameters.values() if p.default is not p.empty]
    if len(optional) > _MOST_OPTIONAL:
        raise ValueError(f"its forward has {len(optional)} optional arguments")
    values = [
        [{p.name: True}, {p.name: False}] if isinstance(p.default, bool) else [{p.name: p.default}, {}]
        for p in optional
    ]
    return [dict(ChainMap(*choice)) for choice in itertools.product(*values)]


# --- Parts ------------------------------------------------------------------------------------------------------------


Parts = list[tuple[str, list[Trace]]]


def _parts(module: nn.Module) -> tuple[Parts, list[str]]:
    """Trace a module and what is opaque in it, by name; returns the names of what is opaque, too, "" for itself."""
    found = _whole(module, ())
    if found:
        return [("", found)], []
    parts, opaque = [], []
    for name, child in ((name, unwrapped(child)) for name, child in module.named_children()):
        if _is_node(child) or not any(_is_node(part) for part in child.modules()):
            continue
        of_child, opaque_in_child = _parts(child)
        parts += [(f"{name}.{part}".removesuffix("."), found) for part, found in of_child]
        opaque += [f"{name}.{part}".removesuffix(".") for part in opaque_in_child]
    found = _whole(module, opaque) if opaque else []
    if not found:
        return parts, ["", *opaque]
    called = {str(node.target) for trace in found for node in trace.graph.nodes if node.op == "call_module"}
    left = tuple(f"{name}." for name in opaque if name in called)
    return [("", found), *(part for part in parts if f"{part[0]}.".startswith(left))], opaque


def _whole(module: nn.Module, opaque: Collection[str]) -> list[Trace]:
    """Trace a module once for each choice of optional arguments for which that can be done."""
    found = []
    try:
        _check(module)
        choices = _estimated_choices(type(module).forward)
    except Exception:  # noqa: BLE001 - a forward without a signature, or none that runs
        return found
    for arguments in choices:
        try:
            found.append(_trace(module, _OpenTracer(arguments, opaque)))
        except Exception:  # noqa: BLE001 - the module's own code runs here, on what are no tensors
            continue
    return found


def _estimated_choices(forward: Callable) -> list[dict[str, Any]]:
    """List every way to call it, or where there are too many the one that leaves all optional arguments out."""
    try:
        return _choices(forward)
    except ValueError:
        optional = [p for p in inspect.signature(forward).parameters.values() if p.default is not p.empty]
        return [{p.name: p.default for p in optional}]
