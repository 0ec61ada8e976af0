"""Grids of fewer bits than their integers have, for engines that know the range of the type alone.

ONNX's QuantizeLinear saturates where the type does, and Inductor puts no other quantization into its products. A grid
of 255 of the 256 codes (8 bits, symmetric) is taken for the whole: what saturates may be off by one step there.
"""

import torch
from torch import fx
from torch.export import ExportedProgram


def clip_integers(program: ExportedProgram) -> None:
    """Let a program quantize to the whole range of 8 bits, and clip the integers to their grid, in place."""
    for node, low, high in _narrow_grids(program):
        with program.graph.inserting_after(node):
            clipped = program.graph.call_function(torch.ops.aten.clamp.default, (node, low, high))
        clipped.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(clipped, delete_user_cb=lambda user, own=clipped: user is not own)
    program.graph_module.recompile()


def clip_floats(program: ExportedProgram) -> None:
    """Clip to the range of a grid before rounding to it, in place; of a ReLU before that nothing is left."""
    for node, low, high in _narrow_grids(program):
        x, scale, zero_point = node.args[:3]
        relu = torch.ops.aten.relu.default
        clips_as_well = isinstance(x, fx.Node) and x.target == relu and low == zero_point and len(x.users) == 1
        with program.graph.inserting_before(node):
            bounds = ((code - zero_point) * scale for code in (low, high))
            clipped = program.graph.call_function(
                torch.ops.aten.hardtanh.default, (x.args[0] if clips_as_well else x, *bounds)
            )
        clipped.meta["val"] = x.meta["val"]
        node.replace_input_with(x, clipped)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()


def _narrow_grids(program: ExportedProgram) -> list[tuple[fx.Node, int, int]]:
    """Widen every grid to the range of its type; gives those that were narrower, and what they were."""
    found, quantizes = [], torch.ops.quantized_decomposed.quantize_per_tensor.default
    for node in program.graph.nodes:
        if node.target == quantizes:
            x, scale, zero_point, low, high, dtype = node.args
            node.args = (x, scale, zero_point, torch.iinfo(dtype).min, torch.iinfo(dtype).max, dtype)
            found += [(node, low, high)] if high - low < 254 and not _is_pooled(node) else []
    return found


def _is_pooled(node: fx.Node) -> bool:
    """Tell whether what is rounded is the maximum of values of the same grid, which needs no clipping."""
    pool = node.args[0]
    if "max_pool" not in str(pool.target):
        return False
    x = pool.args[0]
    return x.target == torch.ops.quantized_decomposed.dequantize_per_tensor.default and x.args[1:3] == node.args[1:3]
