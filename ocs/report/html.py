"""A report and a comparison as pages: one file without any resource elsewhere, and the same piece for notebooks.

What is read from a model (names, kinds, reasons, settings) is escaped. Without scripts all can be read, not sorted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ocs.report.cells import MEANING, cells_of, columns_of, largest_threshold, outputs_db
from ocs.report.comparison import losses, row_of
from ocs.report.summary import MEANING as STEPS
from ocs.report.summary import facts_of, left_float, notes_of, outputs_known, what_was_done
from ocs.report.svg import decibels_by_layer, histogram_pair
from ocs.report.words import counted, decibels, fine_percent, in_decibels, percent, printable, size

if TYPE_CHECKING:
    from ocs.report.comparison import Agreement, Comparison
    from ocs.report.data import LayerReport, Report

EXTRA = {  # not on phones
    "kind", "shape", "clipped at", "input", "channels+copies", "max |w| -> split", "size", "cosine",
}  # fmt: skip
FIRST_TO_GO, ROOM = ("kind", "shape", "input"), 9  # of more columns than fit, these stand in the rows that open
LEGEND = (
    '<p class="soft">Headers sort, rows open: to the weights before and after in steps of the grid, counts on a'
    " logarithmic scale; dashed: where the grid ends; orange: weights beyond it, which splitting halves and clipping"
    " cuts.</p>"
)
SHOWN = 60  # channels that are listed


def page(title: str, piece: str) -> str:
    """Make a page of its own of a piece of HTML."""
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width'
        f', initial-scale=1"><meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        "<style>body { margin: 0 } @media (prefers-color-scheme: dark) { body { background: #14181d } }</style></head>"
    )
    return f"{head}<body>{piece}</body></html>\n"


@cache
def _resource(name: str) -> str:
    return files("ocs.report").joinpath(name).read_text(encoding="utf-8")


def _piece(content: str) -> str:
    """Wrap content with the styles that apply to it alone, and the script that sorts its tables."""
    style, script = _resource("page.css"), _resource("page.js")
    return f'<div class="ocs-report"><style>{style}</style>{content}</div><script>{script}</script>'


# --- A report ---------------------------------------------------------------------------------------------------------


def report_piece(report: Report, comparison: Comparison | None = None) -> str:
    """Write a report, and if given what a comparison says of its layers' outputs."""
    parts = [f"<h1>{escape(what_was_done(report))}</h1>", _tiles(_numbers(report))]
    parts.append(_facts(facts_of(report)))
    parts.append(_list("What stays float, and why", left_float(report)))
    parts.append(_list("What was not done as asked", notes_of(report)))
    parts.append(_list("Batch norms that were not folded", _reasons(report.batch_norms)))
    parts.append(_list("Norms and layers that were not equalized", _reasons(report.equalized)))
    if comparison is not None:
        parts.append("<h2>Error by layer, where the model ran</h2>")
        parts.append(_comparison(comparison, "<details><summary>Layer by layer</summary>", "</details>"))
    if report.quantized:
        parts += ["<h2>Error by layer, in the model's order</h2>", _chart(report)]
    parts += [f"<h2>{counted(len(report.layers), 'weight')}, one by one</h2>", LEGEND, _layers(report)]
    if report.settings:
        settings = {name: repr(value) for name, value in report.settings.items()}
        parts.append(
            f"<h2>Options</h2><details><summary>As quantize() was called</summary>{_facts(settings)}</details>"
        )
    return _piece("".join(parts))


def _reasons(found: dict[str, str]) -> list[str]:
    """Say of what was left as it is why; what was not has no reason."""
    return [f"{printable(name)}: {reason}" for name, reason in found.items() if reason]


def _numbers(report: Report) -> dict[str, str]:
    """Say the most important numbers, by what they are."""
    if not report.quantized:
        return {}
    numbers = {}
    if report.model_bytes:
        saved = 1 - report.file_bytes / report.model_bytes
        less = f", {percent(saved)} less" if saved >= 0.01 else ""
        numbers[f"as a file: {size(report.model_bytes)} before{less}"] = size(report.file_bytes)
    if report.weight_bytes:
        numbers["of the weights are quantized"] = percent(report.quantized_share)
    numbers["more weights to run, by splitting"] = f"+{100 * (report.relative_size - 1):.1f} %"
    numbers["mean SQNR of the weights"] = in_decibels(report.mean_sqnr_db)
    return numbers


def _chart(report: Report) -> str:
    """Draw the ratio of each weight, and of its layer's outputs where that is known."""
    layers = report.quantized
    curves = [[layer.sqnr_db for layer in layers]]
    legend = "SQNR of each weight in dB, higher is better"
    if any(layer.steps for layer in layers):
        curves.append([outputs_db(layer) for layer in layers])
        legend += f"; dashed: of the layer's outputs, {outputs_known(report)}"
    if any(layer.sqnr_db == math.inf for layer in layers):
        legend += "; exact weights are left out"
    chart = decibels_by_layer([printable(layer.label) for layer in layers], curves)
    return _with_legend(chart, f"{legend}.")


def _layers(report: Report) -> str:
    """Write the table; each row opens to what is known of its weight."""
    columns = [name for name in columns_of(report) if name != "note"]
    if len(columns) > ROOM:
        columns = [name for name in columns if name not in FIRST_TO_GO]
    bars = _Bars(report)
    bodies = []
    for layer in report.layers:
        cells = cells_of(layer)
        row = "".join(_cell(name, cells, layer, bars) for name in columns)
        kind = "" if layer.status == "quantized" else ' class="float"'
        more = f'<tr class="more"><td colspan="{len(columns)}">{_details(layer, cells, columns)}</td></tr>'
        bodies.append(f"<tbody{kind}><tr>{row}</tr>{more}</tbody>")
    heads = "".join(_head(name) for name in columns)
    return _table(heads, bodies, many=bool({"clipped at", "outputs dB"} & {*columns}))


def _head(name: str, meaning: str = "") -> str:
    extra = ' class="extra"' if name in EXTRA else ""
    return f'<th scope="col"{extra} title="{escape(meaning or MEANING.get(name, ""))}">{escape(name)}</th>'


def _table(heads: str, bodies: Sequence[str], *, many: bool = False) -> str:
    return f'<table class="sortable{" many" if many else ""}"><thead><tr>{heads}</tr></thead>{"".join(bodies)}</table>'


class _Bars:
    """How long the bars of a table are, as shares of the longest."""

    def __init__(self, report: Report) -> None:
        layers = report.quantized
        ratios = [layer.sqnr_db for layer in layers] + [outputs_db(layer) for layer in layers if layer.steps]
        self.db = max(filter(math.isfinite, ratios), default=0.0)
        self.bytes = max([_key("size", layer) for layer in report.layers], default=0)

    def of(self, name: str, layer: LayerReport) -> float | None:
        """Say how long the bar in a cell is, 0 to 1; None where there is none."""
        if name == "size":
            return _bar(_key(name, layer), self.bytes)
        if layer.status != "quantized":
            return None
        if name == "max |w| -> split":
            return layer.max_after / layer.max_before if layer.max_before else None
        return _bar(_key(name, layer), self.db) if name in ("SQNR dB", "outputs dB") else None


def _bar(value: float | None, longest: float) -> float | None:
    """Divide by the value of the longest bar, 0 to 1; None where either is not known."""
    return None if value is None or longest <= 0 else max(min(value / longest, 1.0), 0.0)


def _key(name: str, layer: LayerReport) -> float | None:
    """Say by which number a cell is sorted; None: by its text."""
    if name == "size":
        return layer.packed_bytes or layer.float_bytes
    if name == "shape":
        return layer.weights
    if layer.status != "quantized":
        return None
    values = {
        "bits": layer.bits,
        "channels+copies": layer.channels + layer.splits,
        "max |w| -> split": layer.max_before,
        "clipped at": largest_threshold(layer) if layer.clip != "none" else None,
        "SQNR dB": layer.sqnr_db,
        "outputs dB": outputs_db(layer),
        "input": layer.act_bits,
    }
    return values.get(name)


def _cell(name: str, cells: dict[str, str], layer: LayerReport, bars: _Bars) -> str:
    text = cells.get(name, "")
    if name == "layer":
        below = f"<small>{escape(cells['note'])}</small>" if layer.reason else ""
        opens = f"<details><summary>{escape(text)}</summary></details>"
        return f'<td class="name" data-key="{escape(text)}">{opens}{below}</td>'
    return _value(name, text, _key(name, layer), bars.of(name, layer))


def _value(name: str, text: str, key: float | None, bar: float | None) -> str:
    """Write a cell: its text, by what it is sorted, and a bar."""
    drawn = "" if bar is None or not text else f'<span class="bar"><i style="width:{100 * bar:.1f}%"></i></span>'
    known = f' data-key="{max(min(key, 1e9), -1e9):.6g}"' if key is not None and not math.isnan(key) else ""
    extra = ' class="extra"' if name in EXTRA else ""
    return f"<td{extra}{known}>{escape(text)}{drawn}</td>"


# --- One weight -------------------------------------------------------------------------------------------------------


def _details(layer: LayerReport, cells: dict[str, str], columns: Sequence[str]) -> str:
    """Write all that is known of a weight: its cells, histograms and split channels."""
    facts = {name: cells[name] for name in MEANING if name in EXTRA and cells.get(name)}
    narrow = [name for name in facts if name in columns]
    facts |= {"why": layer.reason} if layer.reason else {}
    if layer.status != "quantized":
        return _facts(facts, narrow)
    facts |= {"rounding": layer.rounding, "one step": _step(layer)}
    if layer.sources:
        facts["split channels"] = _channels(layer.sources)
    if layer.act_sources:
        facts["split input channels"] = _channels(layer.act_sources)
    if layer.steps:
        facts["outputs dB, step by step"] = ", then ".join(
            f"{STEPS.get(what, what)} {decibels(db)}" for what, db in layer.steps
        )
    if layer.input_mean:
        facts["its input"] = layer.input_mean
    return f'<div class="parts">{_facts(facts, narrow)}{_histogram(layer)}</div>'


def _step(layer: LayerReport) -> str:
    """Say how far apart the points of the grid are."""
    if isinstance(layer.scale, float):
        return f"{layer.scale:.3g}"
    return (
        f"{min(layer.scale):.3g} to {max(layer.scale):.3g}, for each {layer.granularity} its own" if layer.scale else ""
    )


def _channels(sources: Sequence[int]) -> str:
    """List channels in the order in which they were first split, and how often each was."""
    counts = Counter(sources)
    listed = [f"{channel} ({count} times)" if count > 1 else f"{channel}" for channel, count in counts.items()]
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


def _histogram(layer: LayerReport) -> str:
    if layer.histogram is None:
        return ""
    caption = f"of {counted(layer.histogram.channels, 'output channel')}"
    return f'<div>{histogram_pair(layer)}<p class="soft">{caption}</p></div>'


# --- A comparison -----------------------------------------------------------------------------------------------------


def comparison_piece(comparison: Comparison) -> str:
    """Write a comparison."""
    return _piece(f"<h1>Compared on {counted(comparison.batches, 'batch')}</h1>{_comparison(comparison)}")


def _comparison(comparison: Comparison, before_table: str = "", after_table: str = "") -> str:
    first, tiles = comparison.outputs[0], {}
    tiles["SQNR of the output"] = in_decibels(first.sqnr_db)
    tiles["cosine to the float output"] = f"{first.cosine:.6f}"
    if comparison.top1 is not None:
        tiles["the same top-1"] = fine_percent(comparison.top1)
    if (worst := comparison.worst()) is not None:
        tiles["most is lost at"] = printable(worst.name)
    shown = [*comparison.layers, *comparison.outputs]
    chart = ""
    if comparison.layers:
        curve = decibels_by_layer([printable(each.name) for each in shown], [[each.sqnr_db for each in shown]])
        legend = (
            "SQNR in dB of each layer's output, in running order, with the errors of all before it; last the model's."
        )
        chart = _with_legend(curve, legend)
    return f"{_tiles(tiles)}{chart}{before_table}{_agreements(comparison, shown)}{after_table}"


def _agreements(comparison: Comparison, shown: Sequence[Agreement]) -> str:
    heads = {
        "output of": "the layer", "kind": "the float layer's class",
        "SQNR dB": "power of the float output over that of the difference: 6 dB more are half the error",
        "lost dB": "below the output before it",
        "cosine": "of the angle between both outputs, 1 at best",
    }  # fmt: skip
    top = max(filter(math.isfinite, (each.sqnr_db for each in shown)), default=0.0)
    bodies = []
    for each, lost in zip(shown, losses(comparison), strict=True):
        cells = row_of(each, lost)
        row = f'<td class="name">{escape(cells["output of"])}</td>{_value("kind", cells["kind"], None, None)}'
        row += _value("SQNR dB", cells["SQNR dB"], each.sqnr_db, _bar(each.sqnr_db, top))
        row += _value("lost dB", cells["lost dB"], lost, None)
        row += _value("cosine", cells["cosine"], each.cosine, None)
        bodies.append(f"<tbody><tr>{row}</tr></tbody>")
    return _table("".join(_head(name, meaning) for name, meaning in heads.items()), bodies)


# --- Pieces of HTML ---------------------------------------------------------------------------------------------------


def _with_legend(chart: str, legend: str) -> str:
    """Put a chart below what it shows, to scroll where it is too wide."""
    return f'<p class="soft">{legend}</p><div class="wide" tabindex="0" role="region" aria-label="Chart">{chart}</div>'


def _tiles(numbers: dict[str, Any]) -> str:
    """Show numbers large, what they are below."""
    tiles = [
        f'<div class="tile"><b>{escape(value)}</b><small>{escape(name)}</small></div>'
        for name, value in numbers.items()
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _facts(facts: dict[str, Any], narrow: Sequence[str] = ()) -> str:
    """List facts by name; narrow: those that a table beside it shows where there is room."""
    rows = []
    for name, text in facts.items():
        kind = ' class="narrow"' if name in narrow else ""
        rows.append(f"<dt{kind}>{escape(name)}</dt><dd{kind}>{escape(str(text))}</dd>")
    return f"<dl>{''.join(rows)}</dl>" if rows else ""


def _list(title: str, sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in sentences)
    shown = " open" if len(sentences) <= 8 else ""
    return f"<details{shown}><summary>{title} ({len(sentences)})</summary><ul>{items}</ul></details>"
