"""Lower a quantized model to plain torch: int8 weights, and grids that integer engines recognize."""

import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from operator import methodcaller

import torch
from torch import Tensor, fx, nn

from ocs.errors import error_context
from ocs.model.rewrite import Slot, attribute, exchange, keeps_grad_mode, module_slots
from ocs.model.targets import reason_read_by_parent
from ocs.model.wrappers import named_modules, unwrapped
from ocs.nn.base import QuantizedLayer, hooks_of
from ocs.nn.convolution import QuantConv
from ocs.nn.product import QuantLinear, QuantProduct
from ocs.runtime.arithmetic import Arithmetic, arithmetic_of
from ocs.runtime.lowered import OWN, dtype_of, lowering_of, readable
from ocs.runtime.whole_numbers import whole_numbers


@keeps_grad_mode
def lower(model: nn.Module, *, target: str = "this") -> nn.Module:
    """Lower a quantized model in place, for engines that compute with integers; all or nothing.

    Every ocs layer becomes a torch.fx.GraphModule of plain torch operators: it needs no ocs to run, to be pickled or
    exported. It holds int8 weights, copies of split channels added up where the sums fit (section 3.1 of the paper: the
    function is the same), else in as few columns as they need; a scale for each output channel; and the grid of its
    input as a pair of quantize and dequantize, in uint8, signed inputs with zero point 128. It computes what the
    quantized layer did, to float rounding, but that an input halfway between two points of its grid may go to the other
    one: torch multiplies by 1 / scale. Where each row of an input has its own scale, its rounding is written out in
    floats. Recurrent layers become torch's own, with the dequantized weights in float.

        ocs.quantize(model, wbits=5, r=0.02, abits=8, calibration=batches, fold_bn=True)
        ocs.lower(model)
        program = torch.export.export(model.eval(), (example,))

    A lowered model is for inference: it is in eval mode, ocs.save does not take it, and there is no way back. The grids
    of inputs are part of its code and not of its state_dict: pickle or export it whole. Hooks survive copies, but not
    pickling, and the float `weight` that may be read of convolutions and linear layers survives neither.

    Args:
        model: quantized by ocs.quantize or ocs.load.
        target: whose arithmetic the integers must fit: "this" machine's, x86 with "vnni" or only with "avx2", where
            products of 8-bit integers saturate in silence, or "tensorrt", whose inputs are int8 with zero point 0.
            For "avx2" weights whose products might saturate are cut into more columns.

    Warns:
        UserWarning: layers get more than a fifth more columns for that.

    Returns:
        The model, or what it became where it is itself a quantized layer.

    Raises:
        ValueError: nothing in the model is quantized, or a layer cannot be lowered: Oracle OCS, whose splits are each
            batch's own, and recurrent layers whose hidden states are rounded (act_scale="dynamic").
        TypeError: the model is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}: use a quantized nn.Module")
    arithmetic = arithmetic_of(target)
    layers = quantized_layers(model)
    with torch.no_grad():
        lowered = {}
        for name, layer in layers.items():
            with error_context(name):
                read = isinstance(layer, QuantProduct) and bool(reason_read_by_parent(model, [name]))
                lowered[id(layer)] = _with_all_that_layer_had(lower_layer(layer, arithmetic, read=read), layer, target)
    if arithmetic.saturates:
        _say_what_grew({name: (layer, lowered[id(layer)]) for name, layer in layers.items()})
    exchange([*module_slots(model, lowered), *_for_inference(model)])
    return lowered.get(id(unwrapped(model)), model)


def _for_inference(model: nn.Module) -> Iterator[Slot]:
    """Put a model into eval mode, and keep torch's encoders from reading weights that are not there any more."""
    for module in model.modules():
        yield attribute(module, "training", False)
        if isinstance(module, nn.TransformerEncoder):
            yield attribute(module, "use_nested_tensor", False)


def _say_what_grew(pairs: Mapping[str, tuple[QuantizedLayer, nn.Module]]) -> None:
    """Warn of layers that got more columns since their products would saturate."""
    grown = {}
    for name, (layer, lowered) in pairs.items():
        if isinstance(layer, QuantProduct) and isinstance(lowered, fx.GraphModule):
            columns = layer.weight_int[:1].numel()
            grown |= {name: lowered.weight_int.numel() / len(layer.weight_int) / columns}
    grown = {name: times for name, times in grown.items() if times > _GROWTH}
    if grown:
        first, *others = grown
        more = f" and {len(others)} more" if others else ""
        warnings.warn(
            f"{first}{more}: {max(grown.values()):.1f} times the columns at most, as products of 8-bit weights and"
            " inputs saturate on this kind of machine but for weights up to 64: with wbits=7 no column is added",
            stacklevel=4,
        )


def _float_weight(groups: int, channels: int, dtype: torch.dtype, lowered: nn.Module) -> Tensor:
    """Make the float layer's weight for whoever reads it, columns of one channel added up."""
    if "channel" in lowered._buffers:
        raise AttributeError("weight: channels of its input are split, so that it is no single tensor")
    ints, scale, source = lowered.weight_int, lowered.weight_scale, lowered._buffers.get("source")
    whole = ints if source is None else whole_numbers(ints, source, groups, channels)
    return (whole * scale.view(-1, *[1] * (ints.dim() - 1))).to(dtype)


_GROWTH = 1.2  # beyond which more columns are worth a word
_MARK = "lowered_for"  # what tells a lowered layer, and for which target


def lowered_for(model: nn.Module) -> str | None:
    """Tell for which target a model, or a part of it, was lowered; None where nothing was."""
    return next((vars(module)[_MARK] for module in model.modules() if _MARK in vars(module)), None)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Find a model's quantized layers by name, those inside others not; a ValueError where there is none."""
    found = {name: module for name, module in named_modules(model) if isinstance(module, QuantizedLayer)}
    inside = {id(each) for layer in found.values() for each in layer.modules() if each is not layer}
    found = {name: layer for name, layer in found.items() if id(layer) not in inside}
    if not found:
        raise ValueError("no layer of the model is quantized: call ocs.quantize(model, ...) or ocs.load first")
    return found


def lower_layer(layer: QuantizedLayer, arithmetic: Arithmetic, *, read: bool = False) -> nn.Module:
    """Make the plain module that computes what a quantized layer does.

    read: its parent reads its weight, which then must be one of floats.
    """
    if layer.input_grid is not None and layer.input_grid.oracle:
        raise ValueError("act_split='oracle' chooses splits and scale for each batch: quantize with 'static'")
    if layer.scale_group:
        raise ValueError(
            "granularity='group' has a scale for each group of input channels, and engines take one for each output"
            " channel: quantize with granularity='channel', or run the model by ocs.pack"
        )
    if dtype_of(layer) == torch.float64:
        raise ValueError("it is in float64, in which no engine quantizes: use model.float()")
    return (readable(layer) if read else lowering_of(layer)(layer, arithmetic)).eval()


def _with_all_that_layer_had(lowered: nn.Module, layer: QuantizedLayer, target: str) -> nn.Module:
    """Give a lowered layer the hooks and public attributes of the quantized one."""
    taken = {*dir(lowered), *layer.channels, *OWN}
    public = {name: value for name, value in vars(layer).items() if not name.startswith("_") and name not in taken}
    kept = public | hooks_of(layer) | {_MARK: target}
    vars(lowered).update(kept)
    if isinstance(lowered, fx.GraphModule) and isinstance(layer, QuantLinear | QuantConv):
        type(lowered).weight = property(partial(_float_weight, layer.groups, layer.channels["weight"], dtype_of(layer)))
    if isinstance(lowered, fx.GraphModule):  # whose copies keep nothing else
        for name, value in kept.items():
            lowered._register_deepcopy_hook(methodcaller("__setattr__", name, value))
    return lowered
