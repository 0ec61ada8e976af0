"""Compare a quantized model with the float one on the same inputs, without labels."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from ocs.calibration.batches import arguments_of, batch_context, check_data
from ocs.calibration.run import undisturbed
from ocs.model.batchnorm_folding import FoldedBatchNorm
from ocs.model.rewrite import Step, added_entry, keeps_grad_mode
from ocs.model.wrappers import named_modules, unwrapped
from ocs.nn.base import QuantizedLayer
from ocs.progress import with_progress
from ocs.report.comparison import Agreement, Comparison
from ocs.weight.error import sqnr_db


@keeps_grad_mode
def compare(
    float_model: nn.Module, model: Callable[..., Any], batches: Any, *, progress: bool | None = None
) -> Comparison:
    """Compare what a quantized model computes with what the float one does, without labels.

    Of a model of ocs layers every layer's output is compared, too, in running order and with the errors of all layers
    before it, so that the layer that breaks a model is seen at once. Of what was lowered, compiled or exported, the
    model's outputs are.

        float_model = copy.deepcopy(model)
        ocs.quantize(model, wbits=4)
        print(ocs.compare(float_model, model, batches))

    Args:
        float_model: as it was before ocs.quantize; it is run in eval mode and without gradients.
        model: the quantized one, or any callable that takes the same arguments.
        batches: inputs, as ocs.calibrate takes them; a single tensor is one batch.
        progress: show a bar; by default where it takes over two seconds, a terminal looks on and tqdm is installed.

    Returns:
        A Comparison: print it, .to_json() it, or .plot() it.

    Raises:
        ValueError: there is no batch, or the models return no float tensors of the same shapes.
    """
    if not isinstance(float_model, nn.Module):
        raise TypeError(f"float_model is {type(float_model).__name__}: use the nn.Module that was quantized")
    inside = unwrapped(float_model)
    pairs = _layers(inside, model) if isinstance(model, nn.Module) else {}
    modules = named_modules(unwrapped(model)) if isinstance(model, nn.Module) else ()
    folded = {name for name, each in modules if isinstance(each, FoldedBatchNorm)}
    sums, of_layers, top1, count = {}, {}, [0, 0], 0
    check_data(batches, "batches")
    for number, batch in enumerate(
        with_progress([batches] if isinstance(batches, Tensor) else batches, "compare", progress, "batch")
    ):
        with batch_context(inside, "batches", number):
            args, kwargs = arguments_of(inside, batch)
            theirs, float_layers = _run(float_model, args, kwargs, pairs, folded)
            ours, layers = _run(model, args, kwargs, pairs, folded)
            counts = len(_outputs(ours)), len(_outputs(theirs))
            if counts[0] != counts[1]:
                raise ValueError(f"the model returns {counts[0]} float tensors, the float model {counts[1]}")
            _add(sums, _outputs(theirs), _outputs(ours))
            _add(of_layers, float_layers, layers)
            _count_top1(top1, _outputs(theirs), _outputs(ours))
        count += 1
    if not sums:
        raise ValueError("there is nothing to compare: batches are empty, or the models return no float tensors")
    return Comparison(
        count,
        tuple(_agreement(name, each) for name, each in sums.items()),
        top1[0] / top1[1] if top1[1] else None,
        tuple(_agreement(name, each, pairs[name]) for name, each in of_layers.items()),
    )


# --- Running both -----------------------------------------------------------------------------------------------------


def _layers(float_model: nn.Module, model: nn.Module) -> dict[str, str]:
    """Name the quantized layers that the float model has, too, with their kinds."""
    names = {name for name, _ in named_modules(float_model)}
    found = {name: each for name, each in named_modules(unwrapped(model)) if isinstance(each, QuantizedLayer)}
    if found and not any(name in names for name in found):
        raise ValueError("the models have no layer in common: use the float model that was quantized")
    return {name: each.float_kind.__name__ for name, each in found.items() if name in names}


def _run(
    model: Callable[..., Any], args: Any, kwargs: Any, names: Mapping[str, str], folded: set[str]
) -> tuple[Any, dict[str, list[Tensor]]]:
    """Call a model; gives what it returns, and the output of each call of these layers, in running order.

    folded: names of the BatchNorms that were folded: theirs is then the output of the layer before them.
    """
    if not isinstance(model, nn.Module):
        with torch.no_grad():
            return model(*args, **kwargs), {}
    outputs: dict[str, list[Tensor]] = {}
    steps = [*_watch(dict(named_modules(unwrapped(model))), names, folded, outputs)]
    return undisturbed(model, partial(model, *args, **kwargs), steps), outputs


def _watch(
    modules: Mapping[str, nn.Module], names: Mapping[str, str], folded: set[str], outputs: dict[str, list[Tensor]]
) -> Iterator[Step]:
    """Copy the outputs of layers, and of BatchNorms directly after them that were folded: others may write to them."""
    last: dict[str, weakref.ref[Tensor]] = {}  # of each layer, as it gave it

    def take(name: str, module: nn.Module, args: Any, output: Any) -> None:
        first = next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)), None)
        if first is not None and first.is_floating_point():
            outputs.setdefault(name, []).append(first.clone())
            last[name] = weakref.ref(first)

    def take_normed(module: nn.Module, args: Any, output: Any) -> None:
        for name, tensor in last.items():
            if args and tensor() is args[0]:
                outputs[name][-1] = output.clone()

    for name in names:
        yield added_entry(modules[name]._forward_hooks, object(), partial(take, name))
    for name in folded:
        if isinstance(modules.get(name), _BatchNorm | FoldedBatchNorm):
            yield added_entry(modules[name]._forward_hooks, object(), take_normed)


def _outputs(output: Any) -> dict[str, list[Tensor]]:
    """Name the float tensors that a model returns."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return {"the model" if len(leaves) == 1 else f"the model, {i}": [leaf] for i, leaf in enumerate(leaves)}


# --- Adding up --------------------------------------------------------------------------------------------------------


def _add(sums: dict[str, Tensor], theirs: Mapping[str, list[Tensor]], ours: Mapping[str, list[Tensor]]) -> None:
    """Add the power of both, their product and that of their difference, float64 [4], name by name."""
    for name in theirs:
        for x, y in zip(theirs[name], ours.get(name, ()), strict=False):
            if x.shape != y.shape:
                raise ValueError(f"{name}: its output is {list(y.shape)}, of the float model {list(x.shape)}")
            sums[name] = sums.get(name, 0) + _sums(*(each.detach().double().flatten().cpu() for each in (x, y)))


def _sums(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x @ x, y @ y, x @ y, (x - y) @ (x - y)])


def _count_top1(top1: list[int], theirs: Mapping[str, list[Tensor]], ours: Mapping[str, list[Tensor]]) -> None:
    """Count the positions of the first output, and those where both have the largest value at the same place."""
    for (x,), (y,) in [*zip(theirs.values(), ours.values(), strict=False)][:1]:
        if x.dim() > 1 and x.shape[-1] > 1:
            same = x.argmax(-1).cpu() == y.argmax(-1).cpu()
            top1[0] += int(same.sum())
            top1[1] += same.numel()


def _agreement(name: str, sums: Tensor, kind: str = "") -> Agreement:
    x, y, product, noise = sums.tolist()
    cosine = product / (x * y) ** 0.5 if x and y else float(x == y)
    return Agreement(name, sqnr_db(x, noise), cosine, kind)
