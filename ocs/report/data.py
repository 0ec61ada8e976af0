"""What quantize() did to each layer: a table to print, HTML for notebooks, a dict and JSON for programs."""

from __future__ import annotations

import html
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from ocs.model.input_statistics import UNKNOWN_INPUT

Status = Literal["quantized", "skipped", "float"]


@dataclass(frozen=True)
class LayerReport:
    """One weight of a layer, or a layer that was left as it is.

    `skipped` layers were left out on request, `float` ones could not be quantized; `reason` says why. Everything from
    `bits` on is None or empty unless the layer was quantized.
    """

    name: str  # of the layer
    kind: str  # the float layer's class
    weight: str  # the weight's name in the layer, "" where a layer left alone has several or none
    shape: tuple[int, ...]  # of the float weight, () likewise
    status: Status
    reason: str = ""
    float_bytes: int = 0  # of the float weight
    bits: int | None = None
    granularity: str | None = None
    rounding: str | None = None
    input_mean: str = ""  # what is known of the mean of its input, where recipe="best" chose the rounding by it
    clip: str | float | None = None  # what gave the threshold; of "auto" what it chose, or "auto" where channels differ
    channels: int | None = None  # C over all groups
    splits: int | None = None  # n over all groups
    sources: tuple[int, ...] = ()  # the channel that each copy came from, in the order of splitting
    threshold: float | tuple[float, ...] | None = None  # per output channel where the granularity is "channel"
    scale: float | tuple[float, ...] | None = None
    max_before: float | None = None  # max|w|
    max_after: float | None = None  # max|w| of the split weight
    sqnr_db: float | None = None  # 10 log10(sum w^2 / sum (w - w_hat)^2); inf where exact
    steps: tuple[tuple[str, float], ...] = ()  # what each option did, where asked for: (what, dB) one after the other,
    # by functional.output_error, of gptq by the second moments: the power of the outputs over what they are off by
    packed_bytes: int | None = None  # k-bit integers of the expanded weight, scales, and sources of the copies; of an
    # input's copies the sources alone, as their weights are there already

    expanded_shape: tuple[int, ...] = ()  # of the weight that runs expanded: C + n channels, those of split inputs too,
    # and in recurrent layers the gate rows of split units

    bias_from: str = ""  # where the mean input came from that corrected its bias: "calibration" or "norms"

    # Of the layer's input; None and 0 where it stays float
    act_bits: int | None = None
    act_signed: bool | None = None
    act_clip: str | float | None = None  # the method that gave the threshold
    act_split: str | None = None  # "static", or "oracle": scale and splits are made anew for each batch
    act_splits: int = 0  # over all groups
    act_sources: tuple[int, ...] = ()  # the channel that each copy came from
    act_threshold: float | None = None
    act_scale: float | None = None

    @property
    def weights(self) -> int:
        """Elements of the float weight."""
        return math.prod(self.shape)

    @property
    def expanded_weights(self) -> int:
        """Elements of the expanded weight."""
        return math.prod(self.expanded_shape)

    @property
    def gains(self) -> dict[str, float]:
        """dB of nearest rounding alone, and what each option added to it, where `steps` are known."""
        before = [0.0, *(db for _, db in self.steps)]
        return {what: db - before[i] if db != before[i] else 0.0 for i, (what, db) in enumerate(self.steps)}

    @property
    def label(self) -> str:
        """The weight's full name, or the layer's where it has but one called `weight`."""
        several = self.status == "quantized" and self.weight != "weight"
        return f"{self.name}.{self.weight}" if several else self.name or "(model)"


@dataclass(frozen=True)
class Report:
    """Layer by layer in the model's order, with the settings that were used and the seconds that it took."""

    layers: tuple[LayerReport, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    batch_norms: dict[str, str] = field(default_factory=dict)  # where fold_bn: "" if folded, else why not

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """A line for each weight that was quantized."""
        return tuple(layer for layer in self.layers if layer.status == "quantized")

    @property
    def relative_size(self) -> float:
        """Weights that run expanded over those without copies: the paper's Table 5, extended to recurrent layers.

        There a split hidden unit also brings its gate rows: two layers of 650 units at r = 0.02 give 1.04. What is
        stored has the copies alone, see packed_bytes.
        """
        before = sum(layer.weights for layer in self.quantized)
        return sum(layer.expanded_weights for layer in self.quantized) / before if before else 1.0

    @property
    def float_bytes(self) -> int:
        """Bytes of the quantized layers' float weights."""
        return sum(layer.float_bytes for layer in self.quantized)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the same weights as packed integers."""
        return sum(layer.packed_bytes for layer in self.quantized)

    @property
    def mean_sqnr_db(self) -> float:
        """Mean over the quantized layers of the weights' signal-to-noise ratio in dB, exact layers left out."""
        values = [layer.sqnr_db for layer in self.quantized if math.isfinite(layer.sqnr_db)]
        return sum(values) / len(values) if values else math.inf

    @property
    def mean_steps(self) -> dict[str, float]:
        """Where it was asked for: mean dB of nearest rounding alone, and what each option added to it on the mean."""
        explained = [layer.gains for layer in self.quantized if layer.steps]
        explained = [gains for gains in explained if all(map(math.isfinite, gains.values()))]
        whats = dict.fromkeys(what for gains in sorted(explained, key=len, reverse=True) for what in gains)
        return {what: sum(gains.get(what, 0.0) for gains in explained) / len(explained) for what in whats}

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts; inf appears as None."""
        totals = {
            "quantized_layers": len({layer.name for layer in self.quantized}),
            "quantized_weights": len(self.quantized),
            "relative_size": self.relative_size,
            "float_bytes": self.float_bytes,
            "packed_bytes": self.packed_bytes,
            "mean_sqnr_db": self.mean_sqnr_db,
            "seconds": self.seconds,
        }
        content = {"settings": self.settings, "totals": totals, "layers": [asdict(layer) for layer in self.layers]}
        if self.mean_steps:
            content["totals"]["mean_steps_db"] = self.mean_steps
        return _plain(content | ({"batch_norms": self.batch_norms} if self.batch_norms else {}))

    def to_json(self) -> str:
        """to_dict() as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def save(self, path: str | Path) -> None:
        """Write the report: JSON where the path ends in .json, a page where it ends in .html."""
        writers = {".json": self.to_json, ".html": self.to_html}
        suffix = Path(path).suffix
        if suffix not in writers:
            raise ValueError(f"path={str(path)!r}: end it in .json or .html")
        Path(path).write_text(writers[suffix](), encoding="utf-8")

    def to_html(self) -> str:
        """A page of its own."""
        head = '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>ocs report</title></head>'
        return f'{head}<body style="font-family:sans-serif">{self._repr_html_()}</body></html>\n'

    def __str__(self) -> str:
        rows = [HEADER, *(_cells(layer) for layer in self.layers)]
        kept = self._columns()
        widths = [max(len(row[i]) for row in rows) if i in kept else 0 for i in range(len(HEADER))]
        lines = ["  ".join(_pad(row[i], widths[i], i) for i in kept) for row in rows]
        return "\n".join([*(line.rstrip() for line in lines), self._summary()])

    def _repr_html_(self) -> str:
        kept = self._columns()
        head = "".join(f"<th>{html.escape(HEADER[i])}</th>" for i in kept)
        body = "".join(_html_row(layer, kept) for layer in self.layers)
        return (
            f'<table style="border-collapse:collapse" border="1" cellpadding="4"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table><p>{html.escape(self._summary())}</p>"
        )

    def _columns(self) -> list[int]:
        """All, but that of inputs only where one is quantized, that of steps only where they are known."""
        shown = {_INPUT_COLUMN: any(layer.act_bits is not None for layer in self.layers),
                 _STEPS_COLUMN: any(layer.steps for layer in self.layers)}  # fmt: skip
        return [i for i in range(len(HEADER)) if shown.get(i, True)]

    def _summary(self) -> str:
        layers, left = len({layer.name for layer in self.quantized}), len(self.layers) - len(self.quantized)
        weights = f" ({len(self.quantized)} weights)" if len(self.quantized) > layers else ""
        text = f"{layers} layer{'s' * (layers != 1)} quantized{weights}, {left} left float, in {self.seconds:.2f} s"
        if self.batch_norms:
            folded = sum(not reason for reason in self.batch_norms.values())
            text = f"{text}, {folded} of {len(self.batch_norms)} batch norms folded"
        if not self.quantized:
            return text
        text += self._roundings()
        if self.mean_steps:
            text = f"{text}; outputs, mean dB: {_steps(self.mean_steps)}"
        saving = self.float_bytes / self.packed_bytes if self.packed_bytes else math.inf
        return (
            f"{text}: weights x{self.relative_size:.3f} with their copies, {_size(self.float_bytes)} -> "
            f"{_size(self.packed_bytes)} packed ({saving:.1f}x smaller), mean SQNR {self.mean_sqnr_db:.1f} dB"
        )

    def _roundings(self) -> str:
        """How many weights were rounded how, where a recipe chose it, and what it knew."""
        if not any(layer.input_mean for layer in self.quantized):
            return ""
        counts = Counter(layer.rounding for layer in self.quantized)
        text = "; rounding: " + ", ".join(f"{count} {rounding}" for rounding, count in counts.most_common())
        unknown = sum(layer.input_mean == UNKNOWN_INPUT for layer in self.quantized)
        return f"{text} ({unknown} of them without knowing their inputs)" if unknown else text


HEADER = (
    "layer",
    "kind",
    "weight",
    "bits",
    "splits",
    "max |w|",
    "once split",
    "clip at",
    "SQNR dB",
    "outputs dB",
    "packed",
    "input",
    "",
)
_INPUT_COLUMN = HEADER.index("input")
_STEPS_COLUMN = HEADER.index("outputs dB")
_TEXT_COLUMNS = (0, 1, 2, _STEPS_COLUMN, _INPUT_COLUMN, len(HEADER) - 1)


def _cells(layer: LayerReport) -> tuple[str, ...]:
    shape = "x".join(map(str, layer.shape))
    if layer.status != "quantized":
        return (layer.label, layer.kind, shape, *[""] * (len(HEADER) - 4), f"{layer.status}: {layer.reason}")
    clip = layer.threshold if isinstance(layer.threshold, float) else max(layer.threshold, default=0.0)
    return (
        layer.label,
        layer.kind,
        shape,
        str(layer.bits),
        f"+{layer.splits}",
        f"{layer.max_before:.3g}",
        f"{layer.max_after:.3g}",
        f"{clip:.3g}" + ("" if isinstance(layer.threshold, float) else " max") + _method(layer.clip),
        f"{layer.sqnr_db:.1f}",
        _steps(layer.gains),
        _size(layer.packed_bytes),
        _input(layer),
        layer.reason,
    )


def _method(clip: str | float) -> str:
    """Which clip method, where there is one."""
    return "" if clip == "none" else f" {clip}" if isinstance(clip, str) else f" x{clip:g}"


def _steps(gains: dict[str, float]) -> str:
    """What nearest rounding leaves, and what each option adds."""
    first, *more = [*gains.items()] or [("", 0.0)]
    return " ".join([f"{first[1]:.1f}" * bool(gains), *(f"{gain:+.1f} {what}" for what, gain in more)])


def _input(layer: LayerReport) -> str:
    """How the input is quantized."""
    if layer.act_bits is None:
        return ""
    splits = f" +{layer.act_splits}" if layer.act_splits else ""
    if layer.act_split == "oracle":
        return f"{layer.act_bits} bits{splits} oracle"
    reach = f"{'+-' if layer.act_signed else '0 .. '}{layer.act_threshold:.3g}{_method(layer.act_clip)}"
    return f"{layer.act_bits} bits{splits}, {reach}"


def _pad(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column in _TEXT_COLUMNS else cell.rjust(width)


def _html_row(layer: LayerReport, kept: list[int]) -> str:
    style = "" if layer.status == "quantized" else ' style="color:#777"'
    row = _cells(layer)
    cells = (("" if i in _TEXT_COLUMNS else ' style="text-align:right"', row[i]) for i in kept)
    return f"<tr{style}>" + "".join(f"<td{align}>{html.escape(cell)}</td>" for align, cell in cells) + "</tr>"


def _size(count: int) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Real) and not isinstance(value, int):
        return float(value) if math.isfinite(value) else None
    return value
