"""A report as text: the cells of its table, and what it sums up to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ocs.report.data import LayerReport, Report

_NUMBERS = ("bits", "splits", "max |w|", "once split", "clip at", "SQNR dB")
HEADER = ("layer", "kind", "weight", *_NUMBERS, "outputs dB", "packed", "input", "")
RIGHT_ALIGNED = (*_NUMBERS, "packed")


def report_text(report: Report) -> str:
    """Lay out the table of a report, with its summary below."""
    columns = columns_of(report)
    lines = [_line_of(group[0]) if len(group) == 1 else _line_of_all(group) for group in _groups(report)]
    rows = [columns, *([line.get(name, "") for name in columns] for line in lines)]
    return "\n".join([*table(rows, RIGHT_ALIGNED), summary_of(report)])


def table(rows: Sequence[Sequence[str]], right_aligned: Collection[str] = ()) -> list[str]:
    """Lay out rows of cells, the header first, in columns that are as wide as they need."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.rjust if name in right_aligned else str.ljust for name in rows[0]]
    lines = ["  ".join(pad(*cell) for pad, *cell in zip(pads, row, widths, strict=True)) for row in rows]
    return [line.rstrip() for line in lines]


def columns_of(report: Report) -> list[str]:
    """Name the columns to show: inputs only where one is quantized, steps only where they are known."""
    hidden = set()
    if all(layer.act_bits is None for layer in report.layers):
        hidden.add("input")
    if not any(layer.steps for layer in report.layers):
        hidden.add("outputs dB")
    return [name for name in HEADER if name not in hidden]


def cells_of(report: Report, columns: list[str]) -> list[list[str]]:
    """Write these columns of each layer's line."""
    lines = [_line_of(layer) for layer in report.layers]
    return [[line.get(name, "") for name in columns] for line in lines]


def _groups(report: Report) -> list[list[LayerReport]]:
    """Put weights together that were left as they are for the same reason; each that was quantized is alone."""
    groups: dict[tuple[object, ...], list[LayerReport]] = {}
    for i, layer in enumerate(report.layers):
        key = (i,) if layer.status == "quantized" else (layer.status, layer.reason)
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def _line_of_all(group: list[LayerReport]) -> dict[str, str]:
    """Write the cells of weights that were left as they are for the same reason, by column."""
    kinds, shapes = ({line[name] for line in map(_line_of, group)} for name in ("kind", "weight"))
    names = {layer.name: layer.name or "(model)" for layer in group}
    first, *_, last = [*names.values()] * 2
    verb = "skipped" if group[0].status == "skipped" else f"{'stay' if len(names) > 1 else 'stays'} float"
    size = _size(sum(layer.float_bytes for layer in group))
    return {
        "layer": first if first == last else f"{first} ... {last}",
        "kind": kinds.pop() if len(kinds) == 1 else "",
        "weight": shapes.pop() if len(shapes) == 1 else "",
        "": f"{len(names)} {plural(len(names), 'layer')} {verb}: {group[0].reason} ({size})",
    }


def _line_of(layer: LayerReport) -> dict[str, str]:
    """Write the cells of a layer, by column."""
    line = {"layer": layer.label, "kind": layer.kind, "weight": "x".join(map(str, layer.shape))}
    if layer.status != "quantized":
        size = f" ({_size(layer.float_bytes)})" if layer.float_bytes else ""
        return line | {"": f"{layer.status}: {layer.reason}{size}"}
    if isinstance(layer.threshold, float):
        clip = f"{layer.threshold:.3g}"
    else:
        clip = f"{max(layer.threshold, default=0.0):.3g} max"
    return line | {
        "bits": str(layer.bits),
        "splits": f"+{layer.splits}",
        "max |w|": f"{layer.max_before:.3g}",
        "once split": f"{layer.max_after:.3g}",
        "clip at": clip + _method(layer.clip),
        "SQNR dB": f"{layer.sqnr_db:.1f}",
        "outputs dB": _steps(layer.gains),
        "packed": _size(layer.packed_bytes),
        "input": _input(layer),
        "": layer.reason,
    }


def summary_of(report: Report) -> str:
    """Sum up a report in a sentence."""
    weights = len(report.quantized)
    layers = len({layer.name for layer in report.quantized})
    several = f" ({weights} weights)" if weights > layers else ""
    left = len({layer.name for layer in report.layers if layer.status != "quantized"})
    text = f"{layers} {plural(layers, 'layer')} quantized{several}, {left} left float, in {report.seconds:.2f} s"
    if report.batch_norms:
        folded = sum(not reason for reason in report.batch_norms.values())
        text += f", {folded} of {len(report.batch_norms)} batch norms folded"
    if report.equalized:
        moved = sum(not reason for reason in report.equalized.values())
        text += f", {moved} of {len(report.equalized)} norms and layers equalized with those after them"
    if not report.quantized:
        return text
    text += _roundings(report)
    if report.mean_steps:
        text += f"; outputs, mean dB: {_steps(report.mean_steps)}"
    return f"{text}: {_share(report)}, mean SQNR {report.mean_sqnr_db:.1f} dB"


def _share(report: Report) -> str:
    """Say how much of the model was quantized, and what it takes now; never more than is true."""
    packed = f"{_size(report.float_bytes)} -> {_size(report.packed_bytes)} packed"
    copies = f"x{report.relative_size:.3f} with their copies"
    if not report.weight_bytes:
        return f"weights {copies}, {packed}"
    quantized = f"{_size(report.weight_bytes - report.float_weight_bytes)} of {_size(report.weight_bytes)}"
    file = f"the file {_size(report.file_bytes)} of {_size(report.model_bytes)}"
    return f"{_percent(report.quantized_share)} of the weights ({quantized}), {copies}, {packed}, {file}"


def _percent(share: float) -> str:
    """Write a share in percent, rounded down: 100 % is all."""
    return f"{math.floor(100 * share)} %" if share >= 0.01 or not share else "less than 1 %"


def plural(count: int, word: str) -> str:
    """Put a word in the plural but for one thing."""
    return word if count == 1 else f"{word}s"


def _roundings(report: Report) -> str:
    """Count the weights by their rounding, where a recipe chose it, and those of which it knew nothing."""
    if not any(layer.input_mean for layer in report.quantized):
        return ""
    counts = Counter(layer.rounding for layer in report.quantized)
    text = "; rounding: " + ", ".join(f"{count} {rounding}" for rounding, count in counts.most_common())
    unknown = sum(layer.input_known is False for layer in report.quantized)
    return f"{text} ({unknown} of them without knowing their inputs)" if unknown else text


def _method(clip: str | float) -> str:
    """Name the clip method, where there is one."""
    if clip == "none":
        return ""
    return f" {clip}" if isinstance(clip, str) else f" x{clip:g}"


def _steps(gains: dict[str, float]) -> str:
    """Write what nearest rounding leaves, and what each option adds."""
    nearest = [f"{db:.1f}" for db in gains.values()][:1]
    more = [f"{gain:+.1f} {what}" for what, gain in gains.items()][1:]
    return " ".join(nearest + more)


def _input(layer: LayerReport) -> str:
    """Write how the input is quantized."""
    if layer.act_bits is None:
        return ""
    splits = f" +{layer.act_splits}" if layer.act_splits else ""
    if layer.act_split == "oracle":
        return f"{layer.act_bits} bits{splits} oracle"
    if layer.act_dynamic:
        return f"{layer.act_bits} bits, a scale per row"
    lowest = "+-" if layer.act_signed else "0 .. "
    return f"{layer.act_bits} bits{splits}, {lowest}{layer.act_threshold:.3g}{_method(layer.act_clip)}"


def _size(count: int) -> str:
    """Write so many bytes with three digits or so, and their unit."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
