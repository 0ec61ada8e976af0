"""Run batches through the float model while observers see the inputs of its layers; it is as it was afterwards."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from itertools import chain
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ocs.calibration.batches import batch_context, call, check_data
from ocs.calibration.ranks import rank_count, sum_over_ranks
from ocs.errors import error_context
from ocs.model.recording import unfused_classes
from ocs.model.rewrite import Step, added_entry, attribute, eager, for_a_while
from ocs.nn.registry import is_quantizable, replacement_of
from ocs.progress import with_progress

T = TypeVar("T")
Data = Iterable[Any] | Callable[[nn.Module], Any]


class Observer(Protocol):
    """Something that keeps what it needs of the inputs of a module."""

    def observe(self, layer: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Take in one call of the module with these arguments by name."""

    def reduce(self) -> None:
        """Merge what all ranks have seen."""


class Watch(NamedTuple):
    """A module whose calls an observer sees, and the name that errors give it."""

    name: str
    module: nn.Module
    observer: Observer


def observe(
    model: nn.Module,
    data: Data,
    watches: Sequence[Watch],
    progress: bool | None = None,
    *,
    steps: Iterable[Step] = (),
    what: str = "calibration",
) -> None:
    """Run the batches through the model, in eval mode and without gradients, and fill the observers.

    The model is as it was afterwards, whatever happens. steps: let others see it run, too. what: the argument that data
    is, for errors.
    """
    steps = [*chain.from_iterable(map(_hooks, watches)), *steps]

    def run() -> list[float]:
        return [undisturbed(model, partial(_run, model, data, progress, what), steps)]

    (batches,) = sum_over_ranks(run, 1)
    _check_count(batches, what)
    if rank_count() > 1:
        for watch in watches:
            watch.observer.reduce()


class Call(NamedTuple):
    """A call of a module: copies of what it was given and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def calls_of(model: nn.Module, data: Data, module: nn.Module) -> list[Call]:
    """Record every call of a module while the batches run through the model, in eval mode without gradients."""
    given, calls = [], []
    before, after = object(), object()

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(copy.deepcopy((args, kwargs)))  # the module may write to them

    def finish(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.append(Call(*given.pop(), copy.deepcopy(output)))  # what follows may write to it

    steps = [
        added_entry(module._forward_pre_hooks_with_kwargs, before, True),
        added_entry(module._forward_pre_hooks, before, take),
        added_entry(module._forward_hooks, after, finish),
    ]
    _check_count(undisturbed(model, partial(_run, model, data, False), steps), "calibration")
    return calls


def outputs_of(model: nn.Module, data: Data) -> list[Tensor]:
    """Collect every float tensor that the model returns for the batches, float64; in eval mode without gradients."""
    outputs: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.extend(tensor.detach().double() for tensor in float_tensors(output))

    hook = added_entry(model._forward_hooks, object(), take)
    batches = undisturbed(model, partial(_run, model, data, False), [hook])
    _check_count(batches, "calibration")
    if not outputs:
        raise ValueError(
            "calibration cannot tell which layers count: the model returns no float tensor, nor a tuple or dict of them"
        )
    return outputs


def kept(data: Data) -> Data:
    """Keep batches that can be run through once only for as often as they are needed; a callable as it is."""
    if isinstance(data, Callable | Tensor | list):
        return data
    check_data(data, "calibration")
    return [*data]


def with_sample(data: Data) -> tuple[Data, Data]:
    """Take one batch from data (a callable as it is); returns it, and data that still gives all batches."""
    if isinstance(data, Callable | Tensor):
        return data, data
    check_data(data, "calibration")
    batches = iter(data)
    for batch in batches:
        return [batch], data if batches is not data else chain([batch], batches)
    return [], data


# --- Running the model ------------------------------------------------------------------------------------------------


def undisturbed(model: nn.Module, body: Callable[[], T], steps: Iterable[Step] = ()) -> T:
    """Call body() in eval mode, without gradients, compiled code or fused transformer layers, which call no hooks.

    Everything is as it was afterwards, these steps undone. Flags are set one by one, as a train() of the model's own
    may do more than set them.
    """
    slots = [attribute(module, "training", False) for module in model.modules()]
    no_grad = [(partial(torch._C._set_grad_enabled, flag)) for flag in (False, torch.is_grad_enabled())]
    slots += unfused_classes(model)
    return for_a_while([*eager(), tuple(no_grad), *(slot.step() for slot in slots), *steps], body)


def _hooks(watch: Watch) -> Iterator[Step]:
    """Let the observer see what the module is called with."""

    def take(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with error_context(watch.name):
            watch.observer.observe(layer, _named(layer, args, kwargs))

    yield added_entry(watch.module._forward_pre_hooks_with_kwargs, key := object(), True)
    yield added_entry(watch.module._forward_pre_hooks, key, take)


def _named(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name the arguments of a module's call; the first of a layer as its kind does, whatever its forward calls it."""
    names = [*signature(layer.forward).parameters]
    found = dict(zip(names, args, strict=False)) | kwargs
    inputs = replacement_of(layer).input_names if is_quantizable(layer) else ()
    if len(inputs) == 1 and inputs[0] not in kwargs:
        found[inputs[0]] = args[0] if args else found.pop(names[0])
    return found


def _run(model: nn.Module, data: Data, progress: bool | None, what: str = "calibration") -> int:
    """Run all batches; returns how many there were."""
    if isinstance(data, Callable):
        data(model)
        return 1
    check_data(data, what)
    batches = iter(with_progress([data] if isinstance(data, Tensor) else data, "calibrate", progress, "batch"))
    number = 0
    while True:
        with batch_context(model, what, number):
            try:
                batch = next(batches)
            except StopIteration:
                break
            call(model, batch)
        number += 1
    return number


def float_tensors(output: Any) -> Iterator[Tensor]:
    """Find the float tensors in tuples, lists and dicts, in order."""
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from float_tensors(part)


def _check_count(batches: float, what: str) -> None:
    """Refuse data that gave nothing."""
    if not batches:
        raise ValueError(f"{what} is empty: it gave no batch (was it an iterator that is used up?)")
