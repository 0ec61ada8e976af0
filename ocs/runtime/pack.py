"""Pack a quantized model: k bits for an integer of k bits, and products that read them as they are."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ocs.errors import error_context
from ocs.model.rewrite import exchange, keeps_grad_mode, module_slots
from ocs.model.wrappers import named_modules, unwrapped
from ocs.nn.base import QuantizedLayer
from ocs.nn.packed.kinds import packed_kind
from ocs.nn.packed.layer import PackedLayer
from ocs.nn.packed.weight import PackedWeight
from ocs.progress import with_progress

T = TypeVar("T")


@keeps_grad_mode
def pack(model: nn.Module, *, progress: bool | None = None) -> nn.Module:
    """Pack a quantized model in place, all or nothing: its layers hold k bits for each integer and no float weight.

    Linear layers, attention, experts, LSTM, GRU, RNN and their cells multiply the packed weights, embeddings unpack the
    rows that are looked up, convolutions their weight at each call. A layer whose input is rounded (abits) multiplies
    integers, sums exact; else float inputs. Both equal the quantized layer to float rounding, in float32 and bfloat16.

        ocs.quantize(model, wbits=4, r=0.02, recipe="best")
        ocs.pack(model)
        model(batch)                # weights take an eighth, and at batch 1 the time to read them

    It can be saved by ocs.save or as a state_dict (loads into a packed model), copied, pickled, compiled and exported;
    `weight` is dequantized whenever it is read. Gradients reach inputs, and in training biases, by way of that.

    Args:
        model: quantized by ocs.quantize or ocs.load.
        progress: show a bar; by default where it takes over two seconds, a terminal looks on and tqdm is installed.

    Returns:
        The model, or what it became where it is itself a quantized layer.

    Raises:
        ValueError: no layer is quantized, or all are packed already.
        TypeError: the model is no nn.Module.
    """
    layers = {n: each for n, each in _layers(model, QuantizedLayer).items() if not isinstance(each, PackedLayer)}
    if not layers:
        raise ValueError("no layer of the model is quantized and not yet packed: call ocs.quantize or ocs.load first")
    pack_once = _once(PackedWeight.of)
    return _exchanged(model, layers, lambda layer: packed_kind(type(layer)).of(layer, pack_once), "pack", progress)


@keeps_grad_mode
def unpack(model: nn.Module, *, progress: bool | None = None) -> nn.Module:
    """Unpack a packed model in place, all or nothing: its layers are those that ocs.pack found, to the bit.

        ocs.unpack(model)
        ocs.lower(model)            # for engines that take int8

    Args:
        model: packed by ocs.pack or ocs.load.
        progress: show a bar; by default where it takes over two seconds, a terminal looks on and tqdm is installed.

    Returns:
        The model, or what it became where it is itself a packed layer.

    Raises:
        ValueError: no layer is packed.
        TypeError: the model is no nn.Module.
    """
    layers = _layers(model, PackedLayer)
    if not layers:
        raise ValueError("no layer of the model is packed: there is nothing to unpack")
    unpack_once = _once(PackedWeight.state)
    return _exchanged(model, layers, lambda layer: layer.unpacked(unpack_once), "unpack", progress)


def _layers(model: nn.Module, kind: type[QuantizedLayer]) -> dict[str, Any]:
    """Find a model's layers of a kind by name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}: use a quantized nn.Module")
    return {name: module for name, module in named_modules(unwrapped(model)) if isinstance(module, kind)}


def _exchanged(
    model: nn.Module, layers: dict[str, Any], convert: Callable[[Any], nn.Module], title: str, progress: bool | None
) -> nn.Module:
    """Put what layers are converted to in their place."""
    converted = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, layer in with_progress(layers.items(), title, progress):
            with error_context(*([name] if name else [])):
                converted[id(layer)] = convert(layer)
    exchange(module_slots(model, converted))
    return converted.get(id(unwrapped(model)), model)


def _once(function: Callable[..., T]) -> Callable[..., T]:
    """Let layers that share the tensors of a weight share what is made of it."""
    made: dict[tuple[Any, ...], T] = {}

    def result(*weight: Any) -> T:
        key = tuple(id(each) if isinstance(each, Tensor) else each for each in weight)
        if key not in made:
            made[key] = function(*weight)
        return made[key]

    return result
