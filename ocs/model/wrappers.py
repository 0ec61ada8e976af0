"""The names of a model's modules without those of wrappers: torch.compile's, DataParallel's and the like."""

from collections.abc import Iterator
from typing import Any

from torch import nn

_INSIDE = {  # by the wrapper's class, which need not have been imported: the child that it wraps
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": "_checkpoint_wrapped_module",
}


def unwrapped(model: Any) -> Any:
    """Give the module inside all wrappers; anything else as it is."""
    while isinstance(model, nn.Module):
        kinds = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__)
        child = next((_INSIDE[kind] for kind in kinds if kind in _INSIDE), None)
        if child is None:
            break
        model = model._modules[child]
    return model


def named_modules(model: nn.Module, *, every_name: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Name all modules as nn.Module.named_modules does, as if there were no wrappers.

    every_name: list a module as often as it has names, not once.
    """
    seen: set[int] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        module = unwrapped(module)
        if id(module) in seen and not every_name:
            return
        seen.add(id(module))
        yield name, module
        for key, child in module._modules.items():
            if child is not None:
                yield from walk(child, f"{name}.{key}" if name else key)

    return walk(model, "")


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Find a module by the name that named_modules gives it."""
    module = unwrapped(model)
    for key in name.split(".") if name else ():
        module = unwrapped(module._modules[key])
    return module


def unwrap_children(model: nn.Module) -> None:
    """Take the wrappers inside a model out of it, in place."""
    for module in model.modules():
        for key, child in module._modules.items():
            module._modules[key] = unwrapped(child)
