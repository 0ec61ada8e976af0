"""Batches as people have them, and the call of a model that each one means."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter, signature
from traceback import walk_tb
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ocs.errors import error_context
from ocs.model.wrappers import named_modules, unwrapped
from ocs.nn.registry import is_quantizable, replacement_of
from ocs.nn.weights import input_weight

_SAY_WHICH = "give dicts of arguments by name, or a callable that runs the model"


def check_data(data: Any, what: str) -> None:
    """Refuse what is no batches, and what is one of them."""
    if not isinstance(data, Iterable) or isinstance(data, str | bytes):
        raise TypeError(f"{what}={data!r}: use batches, (batch, target) pairs, or a callable that runs the model")
    pair = isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)
    differ = pair and (data[0].dim(), data[0].dtype) != (data[1].dim(), data[1].dtype)
    if isinstance(data, Mapping | PackedSequence | np.ndarray) or differ:
        kind = "(batch, target) pair" if pair else type(data).__name__
        raise TypeError(f"{what} is one {kind}: put it in a list, {what}=[...]; of arrays make tensors")


def call(model: nn.Module, batch: Any) -> None:
    """Call a model on a batch: a dict has arguments by name, and of a tuple or list forward's signature says what is.

    It gets as many parts as it requires, the first at least; one more is the target, and not used.
    """
    args, kwargs = arguments_of(model, batch)
    model(*args, **kwargs)


def arguments_of(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Find the arguments that a model is called with on a batch, on its device."""
    args, kwargs = _arguments(model, batch)
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    return _moved(args, device), _moved(kwargs, device)


@contextmanager
def batch_context(model: nn.Module, what: str, number: int) -> Iterator[None]:
    """Name the batch in every error, and the layer in those of torch; say what was wrong where a width was."""
    with error_context(f"{what}, batch {number}"):
        try:
            yield
        except (RuntimeError, AssertionError) as error:
            name, problem = _where(model, error)
            if problem:
                raise ValueError(f"{name}: {problem}") from error
            if name:
                error.add_note(f"in {name}")
            raise


# --- What a batch means -----------------------------------------------------------------------------------------------


def _arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Find the arguments of forward in a batch."""
    parameters = _parameters(model)
    parts = [batch] if not _has_parts(batch) or _is_list_of_images(batch, parameters) else [*batch]
    by_name = bool(parts) and isinstance(parts[0], Mapping)
    taken = 1 if by_name else _count_taken(parts, parameters)
    if not parts or len(parts) > taken + 1:
        raise ValueError(f"it gave {len(parts)} things at once: use a callable that runs the model on them, or dicts")
    args = () if by_name else tuple(parts[:taken])
    if any(isinstance(part, np.ndarray) for part in args):
        raise TypeError("it gave a numpy array: give tensors, torch.from_numpy(batch)")
    return args, dict(parts[0]) if by_name else {}


def _has_parts(batch: Any) -> bool:
    return isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence)


def _parameters(model: nn.Module) -> list[Parameter]:
    """List what forward takes by position; of a wrapped model, what the model inside takes."""
    by_position = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.VAR_POSITIONAL)
    return [each for each in signature(unwrapped(model).forward).parameters.values() if each.kind in by_position]


def _is_list_of_images(batch: Any, parameters: list[Parameter]) -> bool:
    """Tell whether a list is what forward takes whole, as detection models do."""
    if not isinstance(batch, list) or not parameters or not all(isinstance(part, Tensor) for part in batch):
        return False
    annotated = re.search(r"\b([Ll]ist|Sequence|Iterable)\b", str(parameters[0].annotation))
    return bool(annotated) or (parameters[0].name == "images" and all(part.dim() == 3 for part in batch))


def _count_taken(parts: list[Any], parameters: list[Parameter]) -> int:
    """Count the parts that forward gets; a ValueError where one might be an argument as well as the target."""
    takes_any = any(each.kind is Parameter.VAR_POSITIONAL for each in parameters)
    required = sum(each.default is Parameter.empty and each.kind is not Parameter.VAR_POSITIONAL for each in parameters)
    taken = max(required, 1)
    if len(parts) <= taken:
        return len(parts)
    may_take = takes_any or (len(parameters) > taken and parameters[taken].default is None)
    if may_take and _are_alike(parts[0], parts[taken]):
        names = [each.name for each in parameters if each.kind is not Parameter.VAR_POSITIONAL]
        asked = ", ".join(map(str, parameters[: taken + 1]))
        example = ", ".join(f"{name!r}: ..." for name in names[: taken + 1])
        raise ValueError(
            f"it gave {len(parts)} things at once, and part {taken} may be an argument of forward({asked}) or the "
            f"target: {_SAY_WHICH}" + (f"; {{{example}}}" if len(names) > taken else "")
        )
    return taken


def _are_alike(first: Any, other: Any) -> bool:
    """Tell whether a part could be one more input: it has the first one's items, and positions or channels."""
    tensors = isinstance(first, Tensor) and isinstance(other, Tensor)
    return tensors and min(first.dim(), other.dim()) >= 2 and first.shape[:2] == other.shape[:2]


def _moved(value: Any, device: torch.device) -> Any:
    """Move the tensors in tuples, lists and dicts to a device."""
    if isinstance(value, Tensor | PackedSequence):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(each, device) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_moved(each, device) for each in value)
    return value


# --- Where it failed --------------------------------------------------------------------------------------------------


def _where(model: nn.Module, error: Exception) -> tuple[str, str]:
    """Name the innermost module that was running, and say what was wrong with the width of its input, if it was."""
    names, found = {id(module): name for name, module in named_modules(model)}, ("", "")
    for frame, _ in walk_tb(error.__traceback__):
        layer = frame.f_locals.get("self")
        if isinstance(layer, nn.Module) and names.get(id(layer)):
            found = names[id(layer)], _problem_of_width(layer, frame.f_locals)
    return found


def _problem_of_width(layer: nn.Module, arguments: Mapping[str, Any]) -> str:
    """Say that a float layer's input has another number of channels than it needs, if that is so."""
    x = arguments.get(replacement_of(layer).input_names[0]) if is_quantizable(layer) else None
    if not isinstance(x, Tensor):
        return ""
    axis, needed = (weight := input_weight(layer)).input_axis, weight.in_channels
    if x.dim() < -axis or x.shape[axis] == needed:
        return ""
    return f"its input has {x.shape[axis]} channels, it needs {needed}"
