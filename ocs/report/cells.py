"""What the columns of a report's tables are called, and what stands in them; text and pages share them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ocs.report.words import clip_method, decibels, printable, size, span

if TYPE_CHECKING:
    from ocs.report.data import LayerReport, Report

RIGHT_ALIGNED = ("bits", "channels+copies", "SQNR dB", "outputs dB", "size")
MEANING = {  # of each column, in order
    "layer": "the layer's name in the model, and the weight's where it has several",
    "kind": "the float layer's class",
    "shape": "of the float weight",
    "bits": "of each integer",
    "channels+copies": "input channels, + the copies that splitting added",
    "max |w| -> split": "the largest weight, -> once outlier channels are split",
    "clipped at": "where split weights saturate, and the method that found it; the largest of all output channels "
    "where each has its own",
    "SQNR dB": "power of the weight over that of its rounding errors: 6 dB more are half the error",
    "outputs dB": "the same of the layer's outputs, estimated, or with rounding='gptq' from the inputs of calibration",
    "size": "of the packed integers, their scales and the list of copies",
    "input": "how the layer's input is quantized",
    "note": "why it is as it is",
}


def outputs_db(layer: LayerReport) -> float | None:
    """Give the ratio of a layer's outputs in dB with all its options, where that is known."""
    return layer.steps[-1][1] if layer.steps else None


def largest_threshold(layer: LayerReport) -> float:
    """Give the threshold of a quantized weight, the largest where output channels have their own."""
    return layer.threshold if isinstance(layer.threshold, float) else max(layer.threshold, default=0.0)


def columns_of(report: Report) -> list[str]:
    """Name the columns that this report needs: inputs only where one is quantized, clipping only where one is."""
    quantized, hidden = report.quantized, set()
    if all(layer.act_bits is None for layer in quantized):
        hidden.add("input")
    if not any(layer.steps for layer in quantized):
        hidden.add("outputs dB")
    if all(layer.clip == "none" for layer in quantized):
        hidden.add("clipped at")
    return [name for name in MEANING if name not in hidden]


def cells_of(layer: LayerReport) -> dict[str, str]:
    """Write the cells of a layer, by column."""
    cells = {"layer": printable(layer.label), "kind": layer.kind, "shape": "x".join(map(str, layer.shape))}
    if layer.status != "quantized":
        note = f"{layer.status}: {layer.reason}"
        return cells | {"size": size(layer.float_bytes) if layer.float_bytes else "", "note": note}
    return cells | {
        "bits": str(layer.bits),
        "channels+copies": f"{layer.channels}+{layer.splits}" if layer.splits else str(layer.channels),
        "max |w| -> split": f"{layer.max_before:.3g}{f' -> {layer.max_after:.3g}' if layer.splits else ''}",
        "clipped at": _clip(layer),
        "SQNR dB": decibels(layer.sqnr_db),
        "outputs dB": decibels(outputs_db(layer)) if layer.steps else "",
        "size": size(layer.packed_bytes),
        "input": input_of(layer),
        "note": layer.reason,
    }


def cells_of_all(layers: Sequence[LayerReport]) -> dict[str, str]:
    """Write the cells of several quantized layers of a kind in one line."""
    channels, splits = (sum(getattr(layer, name) for layer in layers) for name in ("channels", "splits"))
    return {
        "layer": f"{len(layers)} more {layers[0].kind}",
        "bits": str(layers[0].bits),
        "channels+copies": f"{channels}+{splits}" if splits else str(channels),
        "SQNR dB": span([layer.sqnr_db for layer in layers]),
        "outputs dB": span(dbs) if (dbs := [outputs_db(layer) for layer in layers if layer.steps]) else "",
        "size": size(sum(layer.packed_bytes for layer in layers)),
    }


def _clip(layer: LayerReport) -> str:
    """Write where a weight saturates and what decided it; nothing where none does."""
    if layer.clip == "none":
        return ""
    at_most = "" if isinstance(layer.threshold, float) else " at most"
    return f"{largest_threshold(layer):.3g}{at_most} ({clip_method(layer.clip)})"


def input_of(layer: LayerReport) -> str:
    """Write how the input is quantized."""
    if layer.act_bits is None:
        return ""
    bits = f"{layer.act_bits} bits"
    splits = f", {layer.act_splits} split" if layer.act_splits else ""
    if layer.act_split == "oracle":
        return f"{bits}, by each batch{splits}"
    if layer.act_dynamic:
        return f"{bits}, a scale per row{splits}"
    lowest = f"-{layer.act_threshold:.3g}" if layer.act_signed else "0"
    clip = "" if layer.act_clip == "none" else f" ({clip_method(layer.act_clip)})"
    return f"{bits}, {lowest} to {layer.act_threshold:.3g}{clip}{splits}"
