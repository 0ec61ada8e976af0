"""What quantize() did to each layer, as values, as plain dicts and as JSON; text.py and html.py show it to people."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ocs.errors import check_path
from ocs.replace_file import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ocs.report.comparison import Comparison

Status = Literal["quantized", "skipped", "float"]


@dataclass(frozen=True)
class Histogram:
    """A weight before and after, counted in steps of its grid: w / scale, and the integers of the expanded weight.

    Of a large weight every so-many-th output channel is counted, so that counting takes little time; `max_before` and
    `max_after` are of all.
    """

    channels: int  # output channels that were counted
    reach: float  # the bins of `before` are equal parts of -reach .. reach
    before: tuple[int, ...]
    after: tuple[int, ...]  # bins are equal parts of -qmax - 1/2 .. qmax + 1/2, a whole number of integers in each


@dataclass(frozen=True)
class LayerReport:
    """One weight of a layer, or a layer that has none of its own and was left as it is.

    `skipped` layers were left out on request, `float` ones could not be quantized; `reason` says why. Everything from
    `bits` on is None or empty unless the layer was quantized.
    """

    name: str  # of the layer
    kind: str  # the float layer's class
    weight: str  # the weight's name in the layer, "" where it has none
    shape: tuple[int, ...]  # of the float weight, () where there is none, or none yet (lazy layers)
    status: Status
    reason: str = ""
    float_bytes: int = 0  # of the float weight
    bits: int | None = None
    granularity: str | None = None
    rounding: str | None = None
    input_mean: str = ""  # what is known of the mean of its input, where recipe="best" chose the rounding by it
    input_known: bool | None = None  # whether anything is, where recipe="best" asked
    clip: str | float | None = None  # what gave the threshold; of "auto" what it chose, or "auto" where channels differ
    channels: int | None = None  # C over all groups
    splits: int | None = None  # n over all groups
    sources: tuple[int, ...] = ()  # the channel that each copy came from, in the order of splitting
    threshold: float | tuple[float, ...] | None = None  # per output channel where the granularity is "channel"; of each
    # its groups where it is "group"

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
    act_dynamic: bool | None = None  # whether each row of it has a scale of its own, measured as it arrives
    act_splits: int = 0  # over all groups
    act_sources: tuple[int, ...] = ()  # the channel that each copy came from
    act_threshold: float | None = None
    act_scale: float | None = None

    histogram: Histogram | None = None  # None where the weight is empty

    @property
    def weights(self) -> int:
        """Count the elements of the float weight."""
        return math.prod(self.shape)

    @property
    def expanded_weights(self) -> int:
        """Count the elements of the expanded weight."""
        return math.prod(self.expanded_shape)

    @property
    def gains(self) -> dict[str, float]:
        """Give the dB of nearest rounding alone, and what each option added to it, where `steps` are known."""
        before = [0.0, *(db for _, db in self.steps)]
        return {what: db - before[i] if db != before[i] else 0.0 for i, (what, db) in enumerate(self.steps)}

    @property
    def label(self) -> str:
        """Give the weight's full name, or the layer's where it has but one called `weight`."""
        alone = self.weight in ("", "weight")
        return self.name or "(model)" if alone else f"{self.name}.{self.weight}".removeprefix(".")


@dataclass(frozen=True)
class Report:
    """What quantize() did, layer by layer in the model's order, with which settings and in how many seconds.

    str() fits the terminal: what it sums up to, then the worst layers and groups of the rest; to_text(all=True) has all
    layers, repr() a sentence. In a notebook it shows itself as the page that save("report.html") writes.
    """

    layers: tuple[LayerReport, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    batch_norms: dict[str, str] = field(default_factory=dict)  # where fold_bn: "" if folded, else why not
    equalized: dict[str, str] = field(default_factory=dict)  # where equalize: "" if its scales were moved, else why not

    # Bytes, each tensor once; 0 where nobody counted
    model_bytes: int = 0  # parameters and buffers of the float model
    weight_bytes: int = 0  # of these the weights, that is parameters of two or more dimensions
    float_weight_bytes: int = 0  # the weights that stay float
    file_bytes: int = 0  # what the model takes in a file: packed integers, and all that stays as it is

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """Select the lines of weights that were quantized."""
        return tuple(layer for layer in self.layers if layer.status == "quantized")

    @property
    def relative_size(self) -> float:
        """Divide the weights that run expanded by those without copies: the paper's Table 5, and recurrent layers.

        In these a split hidden unit also brings its gate rows: two layers of 650 units at r = 0.02 give 1.04. What is
        stored has the copies alone, see packed_bytes.
        """
        before = sum(layer.weights for layer in self.quantized)
        return sum(layer.expanded_weights for layer in self.quantized) / before if before else 1.0

    @property
    def quantized_share(self) -> float:
        """Divide the bytes of the weights that were quantized by those of all weights of the model."""
        return 1 - self.float_weight_bytes / self.weight_bytes if self.weight_bytes else 0.0

    @property
    def float_bytes(self) -> int:
        """Sum the bytes of the quantized layers' float weights."""
        return sum(layer.float_bytes for layer in self.quantized)

    @property
    def packed_bytes(self) -> int:
        """Sum the bytes of the quantized layers' weights as packed integers."""
        return sum(layer.packed_bytes for layer in self.quantized)

    @property
    def mean_sqnr_db(self) -> float:
        """Average the signal-to-noise ratio in dB over the quantized weights, exact ones left out."""
        values = [layer.sqnr_db for layer in self.quantized if math.isfinite(layer.sqnr_db)]
        return sum(values) / len(values) if values else math.inf

    @property
    def mean_steps(self) -> dict[str, float]:
        """Average the dB of nearest rounding alone, and what each option added to it, where that was asked for."""
        explained = [layer.gains for layer in self.quantized if layer.steps]
        explained = [gains for gains in explained if all(map(math.isfinite, gains.values()))]
        whats = dict.fromkeys(what for gains in sorted(explained, key=len, reverse=True) for what in gains)
        return {what: sum(gains.get(what, 0.0) for gains in explained) / len(explained) for what in whats}

    def to_dict(self) -> dict[str, Any]:
        """Make plain numbers, strings, lists and dicts of it; inf appears as None."""
        totals = {
            "quantized_layers": len({layer.name for layer in self.quantized}),
            "quantized_weights": len(self.quantized),
            "relative_size": self.relative_size,
            "float_bytes": self.float_bytes,
            "packed_bytes": self.packed_bytes,
            "weight_bytes": self.weight_bytes,
            "quantized_share": self.quantized_share,
            "model_bytes": self.model_bytes,
            "file_bytes": self.file_bytes,
            "mean_sqnr_db": self.mean_sqnr_db,
            "seconds": self.seconds,
        }
        content = {"settings": self.settings, "totals": totals, "layers": [asdict(layer) for layer in self.layers]}
        if means := self.mean_steps:
            content["totals"]["mean_steps_db"] = means
        beside = {"batch_norms": self.batch_norms, "equalized": self.equalized}
        return plain(content | {name: each for name, each in beside.items() if each})

    def to_json(self) -> str:
        """Write to_dict() as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def save(self, path: str | Path, *, comparison: "Comparison | None" = None) -> None:
        """Write the report: JSON where the path ends in .json, a page where it ends in .html (see to_html)."""
        if comparison is not None and str(path).endswith(".json"):
            raise ValueError(f"path={str(path)!r}, comparison=...: the page alone shows both; save the comparison, too")
        write(path, {".json": self.to_json, ".html": lambda: self.to_html(comparison=comparison)})

    def to_html(self, *, comparison: "Comparison | None" = None) -> str:
        """Make a page of its own, which needs nothing else: what it sums up to, charts, and a table to sort and open.

        comparison: from ocs.compare; then the page also shows the error of each layer's output, in running order.
        """
        from ocs.report.html import page, report_piece

        return page("ocs report", report_piece(self, comparison))

    def plot(self) -> "Figure":
        """Draw the error of each weight and how far its range was narrowed; a matplotlib Figure (the extra `plot`)."""
        from ocs.report.overview import report_overview

        return report_overview(self)

    def to_text(self, *, all: bool = False, width: int | None = None) -> str:
        """Write it for people: what it sums up to, then the ten worst weights and a line for the others of each kind.

        Args:
            all: every layer in the model's order, with every column, however wide.
            width: columns of text to fit into otherwise; by default the terminal's, or 80 where none looks on.
        """
        from ocs.report.text import report_text

        return report_text(self, every=all, width=width)

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        from ocs.report.summary import summary_of

        return f"<Report: {summary_of(self)}>"

    def _repr_html_(self) -> str:
        from ocs.report.html import report_piece

        return report_piece(self)


def write(path: str | Path, writers: Mapping[str, Callable[[], str]]) -> None:
    """Write a file by its ending, as a whole or not at all."""
    check_path("path", path)
    suffix = Path(path).suffix
    if suffix not in writers:
        raise ValueError(f"path={str(path)!r}: end it in {' or '.join(writers)}")
    text = writers[suffix]()
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def plain(value: Any) -> Any:
    """Make of a value what JSON has: lists of tuples, floats of numbers, None of inf and NaN."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Real) and not isinstance(value, int):
        return float(value) if math.isfinite(value) else None
    return value
