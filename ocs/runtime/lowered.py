"""What each kind of quantized layer is lowered to: see ocs.lower."""

from collections.abc import Callable
from operator import getitem, methodcaller
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import register_parametrization

from ocs.kernels.constants import qmax
from ocs.nn.attention import QuantMultiheadAttention
from ocs.nn.base import QuantizedLayer
from ocs.nn.convolution import QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d
from ocs.nn.embedding import QuantEmbedding, QuantEmbeddingBag
from ocs.nn.input_parts import InputParts, largest_factor
from ocs.nn.input_rows import row_scales, rows_on_grid
from ocs.nn.own_forward import QuantOwnForward
from ocs.nn.product import QuantLinear, QuantProduct
from ocs.nn.state import INPUT_BUFFERS, weight_buffers
from ocs.nn.weights import parameter_of
from ocs.runtime.arithmetic import Arithmetic
from ocs.runtime.body import Body, Grid, narrowed
from ocs.runtime.whole_numbers import WholeNumbers, in_columns, whole_numbers

# --- Inputs -----------------------------------------------------------------------------------------------------------


def input_grid(layer: QuantizedLayer, arithmetic: Arithmetic) -> Grid | None:
    """Give the 8-bit grid of a layer's input, None where it is float or each of its rows has its own."""
    if layer.input_grid is None or layer.input_grid.dynamic:
        return None
    scale, largest = float(layer.input_scale), layer.input_grid.qmax
    if arithmetic.signed and largest > 127:
        raise ValueError("its inputs are 8 bits without sign, and the target takes int8: use act_signed=True")
    if arithmetic.signed:
        return Grid(scale, 0, -largest if layer.input_grid.signed else 0, largest, torch.int8)
    if layer.input_grid.signed:
        return Grid(scale, 128, 128 - largest, 128 + largest, torch.uint8)
    return Grid(scale, 0, 0, largest, torch.uint8)


def _rounded(body: Body, x: fx.Node, grid: Grid | None) -> fx.Node:
    return x if grid is None else body.dequantize(body.quantize(x, grid), grid)


def _with_rounded_rows(x: fx.Node, layer: QuantizedLayer) -> fx.Node:
    """Write out the rounding of each row, in floats, where each has its own scale: no operator common to engines is it.

    A layer without such a grid gets its input as it is.
    """
    if layer.input_grid is None or not layer.input_grid.dynamic:
        return x
    return rows_on_grid(fx.Proxy(x), layer.input_grid.bits).node


class _Columns(NamedTuple):
    """What a product multiplies: the parts of its input's channels, and the integers of its weight."""

    parts: InputParts  # of the input, as calibration split it
    channel: Tensor  # int64 [G (C + n_a)]: the channel of each part, group by group
    place: Tensor  # int64 [G (C + n_a)]: where each part stands in `parts`
    weight: WholeNumbers


def _columns(layer: QuantProduct, arithmetic: Arithmetic, grid: Grid | None) -> _Columns:
    """Add the copies in the weight up, and let each part of the input meet its channel's sum."""
    ints, _, source = layer.weight_state("weight")
    groups, C, limit = layer.groups, layer.channels["weight"], 127 if grid is None else arithmetic.limit(grid.high)
    parts, own = layer.static_parts(), torch.arange(groups * C, device=ints.device).view(groups, C)
    if parts.source is None and ints.shape[1] == C and qmax(layer.bits) <= limit:  # the very integers
        return _Columns(parts, own.flatten(), own.flatten(), WholeNumbers(ints, own.flatten()))
    whole = whole_numbers(ints, source, groups, C)
    channel = place = own
    if parts.source is not None:
        copies = parts.source.view(groups, -1)
        further = groups * C + torch.arange(copies.numel(), device=ints.device).view(groups, -1)
        channel, place = torch.cat([own, copies], 1), torch.cat([own, further], 1)
        index = (channel - own[:, :1]).view(groups, 1, -1, *[1] * (whole.dim() - 2))
        grouped = whole.unflatten(0, (groups, -1))
        whole = grouped.gather(2, index.expand(-1, grouped.shape[1], -1, *whole.shape[2:])).flatten(0, 1)
    return _Columns(parts, channel.flatten(), place.flatten(), in_columns(whole, groups, limit))


def _parts_of_rows(body: Body, x: fx.Node, layer: QuantProduct, columns: _Columns) -> fx.Node:
    """Write out, in floats, the rounding of the parts of an input whose rows have their own scales."""
    parts, bits, x = columns.parts, layer.input_grid.bits, fx.Proxy(x).float()
    held = {"factor": parts.factor[columns.place], "shift": parts.shift[columns.place], "channel": columns.channel}
    held["largest"] = largest_factor(parts)
    factor, shift, channel, largest = (fx.Proxy(body.tensor(*each), x.tracer) for each in held.items())
    scale = row_scales(x, bits, largest)
    x = torch.index_select(x, -1, channel) * factor + shift * scale
    return rows_on_grid(x, bits, scale).to(body.dtype).node


def _operand(
    body: Body, x: fx.Node, layer: QuantProduct, columns: _Columns, grid: Grid | None, arithmetic: Arithmetic
) -> fx.Node:
    """Round the parts of an input, and give each as often as the weight has columns for it."""
    axis, parts, per_channel = layer.input_axis, columns.parts, (-1, *[1] * (-layer.input_axis - 1))
    if parts.factor is None:
        x = _with_rounded_rows(x, layer)
    elif layer.input_grid.dynamic:
        x = _parts_of_rows(body, x, layer, columns)
    else:
        factor = parts.factor[columns.place].view(per_channel).to(body.dtype)
        shift = (parts.shift * parts.scale)[columns.place].view(per_channel).to(body.dtype)
        x = body.call(torch.index_select, x, axis, body.tensor("channel", columns.channel))
        x = body.call(torch.mul, x, body.tensor("factor", factor))
        x = body.call(torch.add, x, body.tensor("shift", shift))
    gathers = columns.weight.source.numel() > columns.channel.numel()
    source = body.tensor("source", columns.weight.source) if gathers else None
    early = gathers and arithmetic.signed  # TensorRT gathers floats
    if early:
        x = body.call(torch.index_select, x, axis, source)
    x = x if grid is None else body.quantize(x, grid)
    if gathers and not early:
        x = body.call(torch.index_select, x, axis, source)
    return x if grid is None else body.dequantize(x, grid)


# --- Products ---------------------------------------------------------------------------------------------------------


def _linear(layer: QuantLinear, arithmetic: Arithmetic) -> nn.Module:
    body, grid = Body(layer.original.dtype), input_grid(layer, arithmetic)
    columns = _columns(layer, arithmetic, grid)
    x = _operand(body, body.input("input"), layer, columns, grid, arithmetic)
    weight = body.weight("weight", columns.weight.ints, layer.scale)
    return body.module_returning(body.call(F.linear, x, weight, body.tensor("bias", layer.bias)))


def _convolution(layer: QuantProduct, arithmetic: Arithmetic) -> nn.Module:
    body, grid = Body(layer.original.dtype), input_grid(layer, arithmetic)
    columns, x, padding = _columns(layer, arithmetic, grid), body.input("input"), layer.padding
    if layer.padding_mode != "zeros":
        x = body.call(F.pad, x, tuple(layer._reversed_padding_repeated_twice), mode=layer.padding_mode)
        padding = (0,) * len(layer.kernel_size)
    x = _operand(body, x, layer, columns, grid, arithmetic)
    weight = body.weight("weight", columns.weight.ints, layer.scale)
    bias = body.tensor("bias", layer.bias)
    y = body.call(type(layer).convolve, x, weight, bias, layer.stride, padding, layer.dilation, layer.groups)
    return body.module_returning(y)


def _transposed(layer: QuantProduct, arithmetic: Arithmetic) -> nn.Module:
    """Lower a transposed convolution; scales of several groups lie on no axis, so that weight is permuted as floats."""
    body, grid, groups = Body(layer.original.dtype), input_grid(layer, arithmetic), layer.groups
    columns = _columns(layer, arithmetic, grid)
    x, ints = _operand(body, body.input("input"), layer, columns, grid, arithmetic), columns.weight.ints
    if groups == 1 or not layer.scale.dim():
        weight = body.weight("weight", layer.in_float_layout(ints).contiguous(), layer.scale, axis=1)
    else:
        weight = body.call(torch.unflatten, body.weight("weight", ints, layer.scale), 0, (groups, -1))
        weight = body.call(torch.flatten, body.call(torch.transpose, weight, 1, 2), 0, 1)
    bias = body.tensor("bias", layer.bias)
    geometry = (layer.stride, layer.padding, layer.output_padding, groups, layer.dilation)
    return body.module_returning(body.call(type(layer).convolve, x, weight, bias, *geometry))


# --- Attention --------------------------------------------------------------------------------------------------------

_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_ATTENTION_OPTIONS = {
    "key_padding_mask": None, "need_weights": True, "attn_mask": None, "average_attn_weights": True, "is_causal": False,
}  # fmt: skip


def _attention(layer: QuantMultiheadAttention, arithmetic: Arithmetic) -> nn.Module:
    """Lower attention to torch's function of it, with a weight for each of query, key and value."""
    body, grid = Body(dtype_of(layer)), input_grid(layer, arithmetic)
    inputs = [_with_rounded_rows(body.input(name), layer) for name in layer.input_names]
    options = {name: body.input(name, default) for name, default in _ATTENTION_OPTIONS.items()}
    inputs = inputs if grid is None else [body.quantize(x, grid) for x in inputs]
    if layer.batch_first:  # of three dimensions; two have no batch, and stay
        inputs = [body.call(torch.movedim, x, 0, -2) for x in inputs]
    inputs = inputs if grid is None else [body.dequantize(x, grid) for x in inputs]  # directly before the products
    weights = {name: body.weight(name, *each) for name, each in _projections(layer).items()}
    biases = [body.tensor(name, getattr(layer, name)) for name in ("in_proj_bias", "bias_k", "bias_v")]
    out = _output_projection(body, layer.out_proj)
    attended = body.call(
        F.multi_head_attention_forward, *inputs, layer.embed_dim, layer.num_heads, None, *biases,
        layer.add_zero_attn, 0.0, out, body.tensor("out_proj_bias", layer.out_proj.bias), training=False,
        use_separate_proj_weight=True, **weights, **options,
    )  # fmt: skip
    output, averaged = (body.call(getitem, attended, i) for i in (0, 1))
    if layer.batch_first:
        output = body.call(torch.movedim, output, -2, 0)
    lowered = body.module_returning(output, averaged)
    lowered._qkv_same_embed_dim = False  # transformer layers ask whether they can fuse it
    lowered._register_deepcopy_hook(methodcaller("__setattr__", "_qkv_same_embed_dim", False))
    return lowered


def _output_projection(body: Body, out_proj: nn.Module) -> fx.Node:
    if isinstance(out_proj, QuantLinear):
        return body.weight("out_proj_weight", *_whole_weight(out_proj, "weight"))
    return body.tensor("out_proj_weight", out_proj.weight)


def _projections(layer: QuantMultiheadAttention) -> dict[str, tuple[Tensor, Tensor]]:
    """Give integers and scale of the projections of query, key and value."""
    if "in_proj_weight" not in layer.channels:
        return {name: _whole_weight(layer, name) for name in layer.channels}
    whole, scale = _whole_weight(layer, "in_proj_weight")
    scales = scale.chunk(3) if scale.dim() else (scale,) * 3
    return dict(zip(_PROJECTIONS, zip(whole.chunk(3), scales, strict=True), strict=True))


def _whole_weight(layer: QuantizedLayer, name: str) -> tuple[Tensor, Tensor]:
    """Give the sums of a weight's columns, int32 [O, C, ...], and its scale."""
    ints, scale, source = layer.weight_state(name)
    return whole_numbers(ints, source, layer.groups, layer.channels[name]), scale


# --- Embeddings -------------------------------------------------------------------------------------------------------


def _embedding(layer: QuantEmbedding, arithmetic: Arithmetic) -> nn.Module:
    body = Body(layer.like.dtype)
    return body.module_returning(_rows(body, body.input("input"), layer))


def _rows(body: Body, index: fx.Node, layer: QuantEmbedding | QuantEmbeddingBag) -> fx.Node:
    """Look up integers and their scales."""
    ints = body.call(F.embedding, index, body.tensor("weight", layer.weight_int))
    scales = body.call(F.embedding, index, body.tensor("weight_scale", layer.scale.unsqueeze(-1)))
    rows = body.call(torch.mul, ints, scales)
    return rows if body.dtype == torch.float32 else body.call("to", rows, body.dtype)


def _embedding_bag(layer: QuantEmbeddingBag, arithmetic: Arithmetic) -> nn.Module:
    """Lower to a table of just the rows that are looked up, padding ones in one row more."""
    body = Body(layer.like.dtype)
    index, offsets, weights = body.input("input"), body.input("offsets", None), body.input("per_sample_weights", None)
    flat = body.call(torch.flatten, index)
    found, count, padding = _rows(body, flat, layer), body.call("numel", index), None
    places = body.call(torch.arange, count, device=body.call(getattr, index, "device"))
    if layer.padding_idx is not None:
        places = body.call(torch.where, body.call(torch.eq, flat, layer.padding_idx), count, places)
        found, padding = body.call(F.pad, found, (0, 0, 0, 1)), count
    places = body.call("view_as", places, index)
    options = {"mode": layer.mode, "include_last_offset": layer.include_last_offset, "padding_idx": padding}
    bags = body.call(F.embedding_bag, places, found, offsets, per_sample_weights=weights, **options)
    return body.module_returning(bags)


# --- Layers that keep a forward of their own, with float or parametrized weights --------------------------------------


def _recurrent(layer: QuantizedLayer, arithmetic: Arithmetic) -> nn.Module:
    """Lower to torch's own layer, with dequantized weights: no integer form of it is common to engines."""
    if layer.input_grid is not None and layer.input_grid.dynamic:
        raise ValueError(
            "act_scale='dynamic' rounds its hidden states at each step, which torch's own layers do not: quantize with"
            " act_scale='static' or without abits for it, by overrides"
        )
    kind, names = layer.float_kind, ("input_size", "hidden_size", "bias", "num_layers", "batch_first", "dropout")
    names += ("bidirectional", "nonlinearity") + (("proj_size",) if kind is nn.LSTM else ())
    options = {name: vars(layer)[name] for name in names if name in vars(layer)}
    twin = kind(**options, device="meta", dtype=dtype_of(layer))
    for name in layer.channels:
        setattr(twin, name, nn.Parameter(layer.folded(name).to(dtype_of(layer)), requires_grad=False))
    for name, parameter in layer._parameters.items():
        setattr(twin, name, parameter)
    twin.weight_scales = {name: layer.weight_state(name)[1] for name in layer.channels}  # files of ONNX hold integers
    return _behind_grid(twin, layer, arithmetic, ("input", "hx"))


OWN = ("input_grid", "channels", "expand", "settings", "bits", "float_class")  # what a quantized layer has of its own


def _own_forward(layer: QuantOwnForward, arithmetic: Arithmetic) -> nn.Module:
    """Lower to the float layer's class, whose weight is made of integers whenever its forward reads it."""
    twin = _blank(layer)
    vars(twin).update({name: value for name, value in vars(layer).items() if name not in {*vars(twin), *OWN}})
    integers = {buffer for name in layer.channels for buffer in (*weight_buffers(name), parameter_of(name))}
    twin._modules.update(layer._modules)
    twin._buffers.update({k: v for k, v in layer._buffers.items() if k not in integers and k not in INPUT_BUFFERS})
    return _behind_grid(_parametrized(twin, layer), layer, arithmetic, layer.input_names)


def readable(layer: QuantizedLayer) -> nn.Module:
    """Lower a layer whose parent reads its weight to torch's own, whose weight is made of integers when it is read."""
    twin = _blank(layer)
    vars(twin).update({name: value for name, value in vars(layer).items() if name in layer.float_kind.__constants__})
    return _parametrized(twin, layer)


def _blank(layer: QuantizedLayer) -> nn.Module:
    twin = layer.float_kind.__new__(layer.float_kind)
    nn.Module.__init__(twin)
    twin._parameters.update(layer._parameters)
    return twin


def _parametrized(twin: nn.Module, layer: QuantizedLayer) -> nn.Module:
    """Give a module the integers of a layer's weights, and what dequantizes them."""
    for name in dict.fromkeys(map(parameter_of, layer.channels)):
        ints, scale = _stored(layer, name)
        twin.register_buffer(name, ints)
        register_parametrization(twin, name, _dequantizer(scale, dtype_of(layer)), unsafe=True)
    return twin


def _stored(layer: QuantizedLayer, name: str) -> tuple[Tensor, Tensor]:
    """Give the integers of a parameter in its own layout, those of all experts together, and scales that fit."""
    parts = [_whole_weight(layer, part) for part in layer.channels if parameter_of(part) == name]
    whole = [layer.in_float_layout(narrowed(ints)) for ints, _ in parts]
    scales = [layer.in_float_layout(_scales_like(ints, scale)) for ints, scale in parts]
    if name in layer.channels:
        return whole[0].contiguous(), scales[0]
    return torch.stack(whole), torch.stack(scales)


def _scales_like(ints: Tensor, scale: Tensor) -> Tensor:
    """Give each row [O, C, ...] its scale, [O, C, 1, ...]: layouts of groups need both axes."""
    return scale.expand(len(ints)).view(-1, *[1] * (ints.dim() - 1)).expand(-1, ints.shape[1], *[-1] * (ints.dim() - 2))


def _dequantizer(scale: Tensor, dtype: torch.dtype) -> nn.Module:
    body = Body(dtype)
    floats = body.call(torch.mul, body.input("ints"), body.tensor("scale", scale))
    return body.module_returning(floats if dtype == torch.float32 else body.call("to", floats, dtype))


def _behind_grid(twin: nn.Module, layer: QuantizedLayer, arithmetic: Arithmetic, names: tuple[str, ...]) -> nn.Module:
    """Put the rounding of its first argument before a module, if it has one."""
    grid = input_grid(layer, arithmetic)
    if layer.input_grid is None:
        return twin
    body = Body(dtype_of(layer))
    first, *others = names
    x = _rounded(body, _with_rounded_rows(body.input(first), layer), grid)
    others = [body.input(name, None) for name in others]
    y = body.module("layer", twin, x, *others)
    return body.module_returning(y)


def dtype_of(layer: QuantizedLayer) -> torch.dtype:
    """Give the dtype that a layer computes in."""
    return layer._buffers[layer.forward_buffer(next(iter(layer.channels)))].dtype


_LOWERINGS: tuple[tuple[tuple[type, ...], Callable[..., nn.Module]], ...] = (
    ((QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d), _transposed),
    ((QuantLinear,), _linear),
    ((QuantProduct,), _convolution),
    ((QuantMultiheadAttention,), _attention),
    ((QuantEmbedding,), _embedding),
    ((QuantEmbeddingBag,), _embedding_bag),
    ((QuantOwnForward,), _own_forward),
    ((QuantizedLayer,), _recurrent),
)


def lowering_of(layer: QuantizedLayer) -> Callable[[QuantizedLayer, Arithmetic], nn.Module]:
    """Find the function that lowers layers of this kind."""
    return next(lowering for kinds, lowering in _LOWERINGS if isinstance(layer, kinds))
