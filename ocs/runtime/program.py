"""A quantized model as one exported program of integers: what every engine starts from."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from ocs.calibration.run import undisturbed
from ocs.errors import quiet
from ocs.model.wrappers import named_modules, unwrapped
from ocs.runtime.arithmetic import arithmetic_of
from ocs.runtime.between_layers import round_between_layers
from ocs.runtime.lower import is_lowered, lower, quantized_layers

Additions = Literal["float", "one", "all"]  # which terms of residual additions are rounded


class Example(NamedTuple):
    """Arguments of a model's forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors in them, in order."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


def as_example(example: Any) -> Example:
    """Take one input, a tuple or list of several, or a dict of arguments by name; a TypeError where there is none."""
    if isinstance(example, Mapping):
        found = Example((), dict(example))
    else:
        found = Example(tuple(example) if isinstance(example, tuple | list) else (example,), {})
    if not found.tensors:
        raise TypeError(f"example={example!r}: use a tensor, a tuple of arguments, or a dict of arguments by name")
    return found


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
    ranges = {name: each.output_range for name, each in named_modules(lowered) if _has_range(each)}
    axes, shapes = _axes(lowered) if dynamic else (), ShapesCollection()
    given = _with_two_rows(example, axes)
    for tensor in given.tensors:
        shapes[tensor] = {axis: Dim.AUTO for axis in axes if any(tensor is each for each in _batched(given, axis))}
    with quiet():
        program = undisturbed(
            lowered, lambda: torch.export.export(lowered, given.args, given.kwargs, dynamic_shapes=shapes, strict=False)
        ).run_decompositions({})
    if dynamic:
        _check_dynamic(program)
    if additions != "float":
        signed = arithmetic_of(target).signed
        round_between_layers(program, ranges, signed=signed, keep_a_product=additions == "one")
    return program


def lowered_copy(model: nn.Module, target: str) -> nn.Module:
    """Lower a copy of a model that shares its tensors; a lowered model is taken as it is."""
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}: use a quantized nn.Module")
    if is_lowered(model):
        return model
    quantized_layers(model)
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return lower(copy.deepcopy(model, tensors), target=target)


def _has_range(module: nn.Module) -> bool:
    return vars(module).get("output_range") is not None


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
