"""Forwards on the instance: those that accelerate's hooks put there go over to the layer that replaces it."""

import functools
from types import MethodType

from torch import nn


def has_hook(module: nn.Module) -> bool:
    """Tell whether accelerate's hook wraps the module's forward, and that is its class's."""
    forward = vars(module).get("forward")
    is_wrapper = isinstance(forward, functools.partial) and len(forward.args) == 1 and forward.args[0] is module
    return is_wrapper and "_hf_hook" in vars(module) and _is_own(module, vars(module).get("_old_forward"))


def reason_of_forward(module: nn.Module) -> str:
    """Say what stands on the instance in place of its class's forward, and cannot go over to another layer, or ""."""
    forward = vars(module).get("forward")
    if "__call__" in vars(module) or not (forward is None or has_hook(module) or _is_own(module, forward)):
        return f"this {type(module).__name__} has a forward of its own, as wrappers give it"
    if has_hook(module) and any(getattr(hook, "offload", False) for hook in _hooks(module)):
        return "accelerate loads its weights at each call"
    return ""


def take_hook(layer: nn.Module, module: nn.Module) -> None:
    """Give a layer the hook of the module that it replaces."""
    if has_hook(module):
        own = MethodType(type(layer).forward, layer)
        wrapper = functools.partial(module.forward.func, layer)
        vars(layer).update(_hf_hook=module._hf_hook, _old_forward=own, forward=functools.update_wrapper(wrapper, own))


def _is_own(module: nn.Module, forward: object) -> bool:
    """Tell whether this is the module's forward by its class: hooks that were removed leave it on the instance."""
    return getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward


def _hooks(module: nn.Module) -> list[object]:
    hook = module._hf_hook
    return [hook, *getattr(hook, "hooks", ())]
