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
    """Take one input as it is, a tuple or list as several, and a dict as arguments by name; what holds no tensor is a
    TypeError.
    """
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
    given, shapes = _with_two_rows(example) if dynamic else example, ShapesCollection()
    for tensor in _batched(given) if dynamic else ():
        shapes[tensor] = {0: Dim.AUTO}
    program = undisturbed(
        lowered, lambda: torch.export.export(lowered, given.args, given.kwargs, dynamic_shapes=shapes, strict=False)
    )
    program = program.run_decompositions({})
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


# --- A batch of any size -------------------------------------------------------------------------------------------------


def _batched(example: Example) -> list[Tensor]:
    """Find the tensors whose first dimension is that of the first tensor."""
    first = next((tensor for tensor in example.tensors if tensor.dim()), None)
    return [tensor for tensor in example.tensors if tensor.dim() and len(tensor) == len(first)]


def _with_two_rows(example: Example) -> Example:
    """Give a batch of one twice: torch.export takes a size of 1 for a constant."""
    batched = {id(tensor) for tensor in _batched(example) if len(tensor) == 1}
    return pytree.tree_map(lambda leaf: torch.cat([leaf, leaf]) if id(leaf) in batched else leaf, example)


def _check_dynamic(program: ExportedProgram) -> None:
    """Warn where the program is bound to the batch size of the example."""
    names = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"}
    inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    sizes = [each.shape[0] for each in inputs if isinstance(each, Tensor) and each.dim()]
    if sizes and not any(isinstance(size, torch.SymInt) for size in sizes):
        warnings.warn(
            f"the model computes with its batch size as a constant: what is exported takes {sizes[0]} rows only",
            stacklevel=4,
        )
