"""Biases that the integers of a product cannot hold.

ONNX Runtime rounds the bias of an integer product to int32 with the scale of the product, input scale times weight
scale. Where a channel's weights are next to nothing, as those of a dead BatchNorm once it is folded, that scale is so
small that the bias overflows. Such a bias is added apart, in floats.
"""

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

LARGEST = 2**24  # steps of the product's scale: beyond it a bias counts and its product does not


def take_wide_biases_out(program: ExportedProgram) -> None:
    """Add the biases of products that would overflow after the product instead of in it, in place."""
    for node in list(program.graph.nodes):
        name = getattr(node.target, "__name__", "")
        if getattr(node.target, "namespace", "") != "aten" or not name.startswith(("conv", "linear")):
            continue
        if len(node.args) < 3 or not isinstance(node.args[2], fx.Node) or not _is_wide(program, node):
            continue
        rank = 0 if name.startswith("linear") else node.meta["val"].dim() - 2
        bias = node.args[2]
        node.update_arg(2, None)
        with program.graph.inserting_after(node):
            added = program.graph.call_function(torch.ops.aten.add.Tensor, (node, bias))
        added.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(added, delete_user_cb=lambda user, own=added: user is not own)
        if rank:
            with program.graph.inserting_before(added):
                shaped = program.graph.call_function(torch.ops.aten.view.default, (bias, [-1, *[1] * rank]))
            shaped.meta["val"] = bias.meta["val"].view(-1, *[1] * rank)
            added.update_arg(1, shaped)
    program.graph_module.recompile()


def _is_wide(program: ExportedProgram, product: fx.Node) -> bool:
    """Tell whether any bias of an integer product takes too many steps of its scale."""
    x, weight, bias = product.args[:3]
    ops = torch.ops.quantized_decomposed
    of_channel = isinstance(weight, fx.Node) and weight.target == ops.dequantize_per_channel.default
    if x.target != ops.dequantize_per_tensor.default or not of_channel:
        return False
    scale, values = _value(program, weight.args[1]), _value(program, bias)
    if scale is None or values is None or scale.shape != values.shape:
        return False
    return bool((values.abs().double() > LARGEST * scale.double() * x.args[1]).any())


def _value(program: ExportedProgram, node: fx.Node) -> Tensor | None:
    """Find the parameter or buffer that a node stands for."""
    signature = program.graph_signature
    name = signature.inputs_to_parameters.get(node.name) or signature.inputs_to_buffers.get(node.name)
    return None if name is None else program.state_dict.get(name, program.constants.get(name))
