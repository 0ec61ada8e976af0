"""What a report sums up to: in a sentence, and in some lines that each answer a question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING

from ocs.report.words import counted, decibels, in_decibels, percent, printable, size

if TYPE_CHECKING:
    from ocs.report.data import LayerReport, Report

MEANING = {  # of the steps that a layer's report has, but for those whose names say it
    "nearest": "rounding to nearest",
    "OCS": "splitting",
    "channel": "a scale per channel",
    "naive": "plain halves",
}


def summary_of(report: Report) -> str:
    """Sum up a report in a sentence."""
    text = what_was_done(report)
    if not report.quantized:
        return text
    if rounding := _roundings(report):
        text += f"; rounding: {rounding}"
    return f"{text}: {_share(report)}, mean SQNR {report.mean_sqnr_db:.1f} dB"


def _share(report: Report) -> str:
    """Say how much of the model was quantized, and what it takes now; never more than is true."""
    packed = f"{size(report.float_bytes)} -> {size(report.packed_bytes)} packed"
    copies = f"x{report.relative_size:.3f} with their copies"
    if not report.weight_bytes:
        return f"weights {copies}, {packed}"
    quantized = f"{size(report.weight_bytes - report.float_weight_bytes)} of {size(report.weight_bytes)}"
    file = f"the file {size(report.file_bytes)} of {size(report.model_bytes)}"
    return f"{percent(report.quantized_share)} of the weights ({quantized}), {copies}, {packed}, {file}"


def what_was_done(report: Report) -> str:
    """Count what was quantized, left float and folded."""
    weights = len(report.quantized)
    layers = len({layer.name for layer in report.quantized})
    several = f" ({weights} weights)" if weights > layers else ""
    left = len({layer.name for layer in report.layers if layer.status != "quantized"})
    text = f"{counted(layers, 'layer')} quantized{several}, {left} left float, in {report.seconds:.2f} s"
    if report.batch_norms:
        folded = sum(not reason for reason in report.batch_norms.values())
        text += f", {folded} of {len(report.batch_norms)} batch norms folded"
    if report.equalized:
        moved = sum(not reason for reason in report.equalized.values())
        text += f", {moved} of {len(report.equalized)} norms and layers equalized with those after them"
    return text


def facts_of(report: Report) -> dict[str, str]:
    """Answer what one asks first, by question; what stays float is left_float's."""
    if not report.quantized:
        return {}
    return {name: text for name, text in _facts(report).items() if text}


def _facts(report: Report) -> dict[str, str]:
    splits, channels = (sum(getattr(layer, name) for layer in report.quantized) for name in ("splits", "channels"))
    worst = min(report.quantized, key=lambda layer: layer.sqnr_db)
    overhead = f"the weights that run are x{report.relative_size:.3f}"
    return {
        "bits": _by_bits(report),
        "size": _size(report),
        "splits": f"{splits} copies added to {channels} channels; {overhead}" if splits else "none",
        "error": f"SQNR {in_decibels(report.mean_sqnr_db)} on average, {decibels(worst.sqnr_db)} at worst "
        f"({printable(worst.label)})",
        "outputs": _outputs(report),
        "rounding": _roundings(report),
    }


def _by_bits(report: Report) -> str:
    """Count the weights by their bits."""
    counts = Counter(layer.bits for layer in report.quantized)
    if len(counts) == 1:
        return f"{next(iter(counts))}, {_granularity(report)}"
    listed = ", ".join(f"{bits} ({counted(count, 'weight')})" for bits, count in sorted(counts.items()))
    return f"{listed}, {_granularity(report)}"


def _granularity(report: Report) -> str:
    per = sorted({layer.granularity for layer in report.quantized}, reverse=True)
    names = {"channel": "output channel", "group": "group of input channels"}
    return " or ".join(f"one scale per {names.get(each, each)}" for each in per)


def _size(report: Report) -> str:
    """Say what the model takes before and after, and how much of it was quantized; never more than is true."""
    packed = f"{size(report.float_bytes)} -> {size(report.packed_bytes)}"
    if not report.weight_bytes:
        return f"{packed}, the quantized weights"
    file = f"{size(report.model_bytes)} -> {size(report.file_bytes)} as a file"
    return f"{file}; quantized: {percent(report.quantized_share)} of the weights, {packed}"


def _outputs(report: Report) -> str:
    """Say what each option did for the outputs' ratio, and where that is known from."""
    means = report.mean_steps
    if not means:
        return ""
    total = sum(means.values())
    parts = [f"{db:+.1f} by {MEANING.get(what, what)}" for what, db in means.items()]
    first = parts[0].removeprefix("+").replace(" by ", " ")
    return f"SQNR {total:.1f} dB on average, {outputs_known(report)}: {', '.join([first, *parts[1:]])}"


def outputs_known(report: Report) -> str:
    """Say where the ratios of outputs are from."""
    measured = [outputs_measured(layer) for layer in report.quantized if layer.steps]
    return "from calibration" if all(measured) else "estimated or from calibration" if any(measured) else "estimated"


def outputs_measured(layer: LayerReport) -> bool:
    """Tell whether the ratios of a layer's outputs are from calibration, not estimated."""
    return layer.rounding in ("gptq", "learned")


def _roundings(report: Report) -> str:
    """Count the weights by their rounding, where a recipe chose it, and those rounded without knowing inputs."""
    if not any(layer.input_mean for layer in report.quantized):
        return ""
    parts = []
    for rounding, count in Counter(layer.rounding for layer in report.quantized).most_common():
        unknown = sum(layer.rounding == rounding and layer.input_known is False for layer in report.quantized)
        tail = f" ({unknown} of them without knowing their inputs)" if unknown and rounding != "gptq" else ""
        parts.append(f"{count} {rounding}{tail}")
    return ", ".join(parts)


def left_float(report: Report) -> list[str]:
    """Say what stays float and why, a sentence for each reason, the largest first."""
    groups = grouped([layer for layer in report.layers if layer.status != "quantized"], _reason)
    groups.sort(key=lambda group: -sum(layer.float_bytes for layer in group))
    return [
        f"{_names(group)} {'(skipped) ' if group[0].status == 'skipped' else ''}"
        f"{size(sum(layer.float_bytes for layer in group))}: {group[0].reason}"
        for group in groups
    ]


def notes_of(report: Report) -> list[str]:
    """Say what was not done as asked, a sentence for each."""
    groups = grouped([layer for layer in report.quantized if layer.reason], _reason)
    return [f"{_names(group)}: {group[0].reason}" for group in groups]


def left_unfolded(report: Report) -> list[str]:
    """Say which batch norms stay and why, a sentence for each reason."""
    groups: dict[str, list[str]] = {}
    for name, reason in report.batch_norms.items():
        if reason:
            groups.setdefault(reason, []).append(printable(name))
    return [
        f"{counted(len(names), 'batch norm')} not folded, {' to '.join(dict.fromkeys((names[0], names[-1])))}: {reason}"
        for reason, names in groups.items()
    ]


def grouped(layers: Iterable[LayerReport], key: Callable[[LayerReport], Hashable]) -> list[list[LayerReport]]:
    """Part layers by what they have in common, in the order of the first of each group."""
    groups: dict[Hashable, list[LayerReport]] = {}
    for layer in layers:
        groups.setdefault(key(layer), []).append(layer)
    return [*groups.values()]


def _reason(layer: LayerReport) -> tuple[str, str]:
    return layer.status, layer.reason


def _names(group: list[LayerReport]) -> str:
    names = [*{printable(layer.name) or "(model)": None for layer in group}]
    if len(names) <= 2:
        return " and ".join(names)
    return f"{len(names)} layers, {names[0]} to {names[-1]}"


def worst_first(report: Report) -> list[LayerReport]:
    """Sort the quantized weights by what rounding left of them, the worst first."""
    return sorted(report.quantized, key=lambda layer: layer.sqnr_db)
