"""Run batches through the float model while observers see the inputs of its layers; it is as it was afterwards."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from ocs.calibration.ranks import rank_count, sum_over_ranks
from ocs.errors import error_context
from ocs.nn.registry import is_quantizable, replacement_of
from ocs.progress import with_progress

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
    model: nn.Module, data: Data, watches: Sequence[Watch], progress: bool | None = None, *, what: str = "calibration"
) -> None:
    """Run the batches through the model, in eval mode and without gradients, and fill the observers.

    The model is as it was afterwards, whatever happens. what: the argument that data is, for errors.
    """

    def run() -> list[float]:
        with undisturbed(model), ExitStack() as hooks:
            for watch in watches:
                hooks.callback(_hook(watch).remove)
            return [_run(model, data, progress, what)]

    (batches,) = sum_over_ranks(run, 1)
    _check_count(batches, what)
    if rank_count() > 1:
        for watch in watches:
            watch.observer.reduce()


def outputs_of(model: nn.Module, data: Data) -> list[Tensor]:
    """Collect every float tensor that the model returns for the batches, float64; in eval mode without gradients."""
    outputs: list[Tensor] = []
    hook = model.register_forward_hook(lambda _, args, output: outputs.extend(_float_tensors(output)))
    try:
        with undisturbed(model):
            batches = _run(model, data, False)
    finally:
        hook.remove()
    _check_count(batches, "calibration")
    if not outputs:
        raise ValueError(
            "calibration cannot tell which layers count: the model returns no float tensor, nor a tuple or dict of them"
        )
    return outputs


def with_sample(data: Data) -> tuple[Data, Data]:
    """Take one batch from data (a callable as it is); returns it, and data that still gives all batches."""
    if isinstance(data, Callable | Tensor):
        return data, data
    _check_data(data, "calibration")
    batches = iter(data)
    for batch in batches:
        return [batch], data if batches is not data else chain([batch], batches)
    return [], data


# --- Running the model ------------------------------------------------------------------------------------------------


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Set eval mode, no gradients, and no compiled code or fused transformer layers, which would not call the hooks.

    Flags are set one by one, as a train() of the model's own may do more than set them.
    """
    training = {module: module.training for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for module in training:
                module.training = False
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, flag in training.items():
            module.training = flag


def _hook(watch: Watch) -> RemovableHandle:
    """Let the observer see what the module is called with."""

    def take(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with error_context(watch.name):
            watch.observer.observe(layer, _named(layer, args, kwargs))

    return watch.module.register_forward_pre_hook(take, with_kwargs=True)


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
    _check_data(data, what)
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    count = 0
    for batch in with_progress([data] if isinstance(data, Tensor) else data, "calibrate", progress, "batch"):
        try:
            _call(model, batch, device, what)
        except Exception as error:
            error.add_note(f"while calibrating on batch {count}")
            raise
        count += 1
    return count


def _float_tensors(output: Any) -> Iterator[Tensor]:
    """Find the float tensors in tuples, lists and dicts, in order."""
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output.detach().double()
    elif isinstance(output, Mapping | tuple | list):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _float_tensors(part)


def _check_count(batches: float, what: str) -> None:
    """Refuse data that gave nothing."""
    if not batches:
        raise ValueError(f"{what} is empty: it gave no batch (was it an iterator that is used up?)")


def _check_data(data: Any, what: str) -> None:
    """Refuse what is no batches, and what is one of them."""
    if not isinstance(data, Iterable) or isinstance(data, str | bytes):
        raise TypeError(f"{what}={data!r}: use batches, (batch, target) pairs, or a callable that runs the model")
    pair = isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)
    if isinstance(data, Mapping | PackedSequence | np.ndarray) or (pair and data[0].dim() != data[1].dim()):
        kind = "(batch, target) pair" if pair else type(data).__name__
        raise TypeError(f"{what} is one {kind}: put it in a list, {what}=[...]; of arrays make tensors")


def _call(model: nn.Module, batch: Any, device: torch.device, what: str) -> None:
    """Call the model on a batch: of a (batch, target) pair on the batch alone, of a dict on its entries by name."""
    if isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence):
        if not 1 <= len(batch) <= 2:
            raise ValueError(f"{what} gave {len(batch)} things at once: use a callable that runs the model on them")
        batch = batch[0]
    if isinstance(batch, np.ndarray):
        raise TypeError(f"{what} gave a numpy array: give tensors, torch.from_numpy(batch)")
    if isinstance(batch, Mapping):
        model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
        return
    model(batch.to(device) if isinstance(batch, Tensor | PackedSequence) else batch)
