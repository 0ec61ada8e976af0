"""A quantized model as one exported program of integers: what every engine starts from."""

import copy
import threading
import warnings
from collections.abc import Mapping
from functools import partial
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from ocs.calibration.run import undisturbed
from ocs.errors import error_context, quiet
from ocs.model.rewrite import Step
from ocs.model.wrappers import named_modules, unwrapped
from ocs.nn.base import QuantizedLayer
from ocs.runtime.arithmetic import arithmetic_of
from ocs.runtime.between_layers import round_between_layers
from ocs.runtime.lower import lower, lowered_for, quantized_layers

Additions = Literal["float", "one", "all"]  # which terms of residual additions are rounded
ONE_EXPORT = threading.RLock()  # torch exports and compiles in one thread at a time, whatever the model


class Example(NamedTuple):
    """Arguments of a model's forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def leaves(self) -> list[Any]:
        """All that is in them, in order."""
        return pytree.tree_leaves((self.args, self.kwargs))

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors in them, in order."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]


def bound(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Example:
    """Put the arguments of a call in the order of forward, however it gave them; a TypeError where they do not fit."""
    try:
        found = signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"the arguments do not fit {type(model).__name__}.forward: {error}") from None
    return Example(found.args, found.kwargs)


def as_example(model: nn.Module, example: Any) -> Example:
    """Take one input, a tuple or list of several, or a dict of arguments by name; a TypeError where there is none."""
    given = example if isinstance(example, tuple | list | Mapping) else (example,)
    if not Example(tuple(given), dict(given) if isinstance(given, Mapping) else {}).tensors:
        kind = f"a {type(example).__name__} without tensors"
        raise TypeError(f"example is {kind}: use a tensor, a tuple of arguments, or a dict of arguments by name")
    with error_context("example"):
        return bound(model, (), given) if isinstance(given, Mapping) else bound(model, tuple(given), {})


def program_of(
    model: nn.Module, example: Example, *, target: str = "this", additions: Additions = "all", dynamic: bool = True
) -> ExportedProgram:
    """Export what a quantized model computes, in integers; the model itself stays as it is.

    Args:
        model: quantized, or lowered already.
        example: arguments of its forward.
        target: see ocs.lower.
        additions: what is rounded of each residual addition, to 8 bits: nothing, all terms whose range is known, or all
            but one product that an engine adds to while it is still in floats.
        dynamic: let the first dimension vary, of all tensors that have the first one's.

    Returns:
        A functional program of aten and quantized_decomposed operators.
    """
    lowered = lowered_copy(model, target)
    program = _exported(lowered, _apart(example), dynamic)
    if any(getattr(node.target, "namespace", "") == "ocs" for node in program.graph.nodes):
        raise ValueError(
            "a quantized layer is held where lowering does not find it (a closure?): make it a child module"
        )
    if additions != "float":
        ranges = [{n: vars(m)[what] for n, m in named_modules(lowered) if vars(m).get(what)} for what in _RANGES]
        signed = arithmetic_of(target).signed
        round_between_layers(program, *ranges, signed=signed, keep_a_product=additions == "one")
    return program


_RANGES = ("output_range", "input_range")


def _apart(example: Example) -> Example:
    """Copy the tensors, so that none stands for two arguments: torch.export would make one of these."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, example)


def _exported(model: nn.Module, example: Example, dynamic: bool) -> ExportedProgram:
    """Export a lowered model, with a batch of any size where that is wanted and can be."""

    def export(given: Example, axes: tuple[int, ...]) -> ExportedProgram:
        shapes = ShapesCollection()
        for tensor in given.tensors:
            shapes[tensor] = {axis: Dim.AUTO for axis in axes if any(tensor is each for each in _batched(given, axis))}
        with quiet():
            exported = torch.export.export(model, given.args, given.kwargs, dynamic_shapes=shapes, strict=False)
            return exported.run_decompositions({})

    if not dynamic:
        return undisturbed(model, lambda: export(example, ()), _kept())
    axes = _axes(model)
    doubled = _with_two_rows(example, axes)
    try:
        program = undisturbed(model, lambda: export(doubled, axes), _kept())
    except Exception:
        if doubled is example:
            raise
        program = undisturbed(model, lambda: export(example, ()), _kept())  # what has one row may be no batch
    _check_dynamic(program)
    return program


def _kept() -> list[Step]:
    """Have what torch replaces while it traces as it was afterwards, which an interrupt may keep torch from."""
    places = ((nn.Module, "__call__"), (nn.Module, "__getattr__"), (torch.fx._symbolic_trace, "_is_fx_tracing_flag"))
    return [(step := partial(setattr, *place, getattr(*place)), step) for place in places]


def lowered_copy(model: nn.Module, target: str) -> nn.Module:
    """Lower a copy of a model that shares its tensors; a lowered model is taken as it is."""
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}: use a quantized nn.Module")
    before, simulated = lowered_for(model), any(isinstance(each, QuantizedLayer) for each in model.modules())
    if before is not None and arithmetic_of(before) != arithmetic_of(target):
        raise ValueError(f"target={target!r}: the model was lowered for {before!r}, lower the quantized one again")
    if before is not None and not simulated:
        return model
    layers = quantized_layers(model)
    kept = [*model.parameters(), *(buffer for layer in layers.values() for buffer in layer.buffers())]
    try:
        copied = copy.deepcopy(model, {id(tensor): tensor for tensor in kept})
    except Exception as error:
        message = f"{type(model).__name__} cannot be copied ({error}): lower it in place first, ocs.lower(model)"
        raise ValueError(message) from error
    return lower(copied, target=target)


# --- A batch of any size ----------------------------------------------------------------------------------------------


def _axes(model: nn.Module) -> tuple[int, ...]:
    """Give the axes that a batch may lie on: the first, or the second where recurrent layers have time first."""
    time_first = any(isinstance(each, nn.RNNBase) and not each.batch_first for each in model.modules())
    return (0, 1) if time_first else (0,)


def _batched(example: Example, axis: int) -> list[Tensor]:
    """Find the tensors that are as long on an axis as the first one that has it."""
    having = [tensor for tensor in example.tensors if tensor.dim() > axis]
    return [tensor for tensor in having if tensor.shape[axis] == having[0].shape[axis]]


def _with_two_rows(example: Example, axes: tuple[int, ...]) -> Example:
    """Give a batch of one twice: torch.export takes a size of 1 for a constant."""
    for axis in axes:
        single = {id(tensor) for tensor in _batched(example, axis) if tensor.shape[axis] == 1}
        if not single:
            continue
        example = pytree.tree_map(
            lambda leaf, axis=axis, single=single: torch.cat([leaf, leaf], axis) if id(leaf) in single else leaf,
            example,
        )
    return example


def _check_dynamic(program: ExportedProgram) -> None:
    """Warn where the program is bound to the shapes of the example."""
    names = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"}
    inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    shapes = [[str(size) for size in each.shape] for each in inputs if isinstance(each, Tensor)]
    if all(size.isdigit() for shape in shapes for size in shape):
        warnings.warn(
            f"the model computes with its batch size as a constant: what is exported takes shapes {shapes} only",
            stacklevel=4,
        )
