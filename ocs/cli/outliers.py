"""Where the outliers of a model's weights are, and what splitting them would bring."""

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ocs.model.wrappers import named_modules
from ocs.nn.weights import float_weight
from ocs.quantization import quantize
from ocs.report.data import LayerReport, plain
from ocs.report.text import table
from ocs.report.words import plural


@dataclass(frozen=True)
class Outlier:
    """One weight.

    largest: max|w|. sigma: its standard deviation. once_split: max|w| with `splits` channels split. outputs_db: of its
    outputs' power over what rounding to nearest changes, an estimate without data; gain_db: what splitting adds.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    largest: float
    sigma: float
    splits: int
    once_split: float
    outputs_db: float
    gain_db: float

    @property
    def ratio(self) -> float:
        """How many standard deviations its largest value is from zero."""
        return self.largest / self.sigma if self.sigma > 0 else 0.0


@dataclass(frozen=True)
class Outliers:
    """The weights of a model, that with the largest ratio first, at so many bits and with this expand ratio."""

    wbits: int
    r: float
    weights: tuple[Outlier, ...]
    left: tuple[tuple[str, str], ...]  # layers that would stay float, with the reason

    def to_dict(self) -> dict[str, Any]:
        """Give all of it as plain values."""
        weights = [asdict(each) | {"ratio": each.ratio} for each in self.weights]
        left = [{"name": name, "reason": reason} for name, reason in self.left]
        return plain({"wbits": self.wbits, "r": self.r, "weights": weights, "left_float": left})


def outliers_of(model: nn.Module, wbits: int, r: float) -> Outliers:
    """Look at every weight of a float model, which is quantized on the way."""
    modules = dict(named_modules(model))
    report = quantize(model, wbits=wbits, r=r, skip=None, explain=True, expand=False)
    found = [_outlier(line, modules) for line in report.quantized]
    left = [(line.label, line.reason) for line in report.layers if line.status != "quantized"]
    return Outliers(wbits, r, tuple(sorted(found, key=lambda each: -each.ratio)), tuple(left))


def _outlier(line: LayerReport, modules: dict[str, nn.Module]) -> Outlier:
    w = float_weight(modules[line.name], line.weight).detach().float()
    sigma = float(w.std(correction=0)) if w.numel() else 0.0
    gains = line.gains
    return Outlier(
        line.label, line.kind, line.shape, line.max_before, sigma, line.splits, line.max_after,
        gains.get("nearest", math.inf), gains.get("OCS", 0.0),
    )  # fmt: skip


_COLUMNS = ("max|w|", "sigma", "max/sigma", "split to", "dB", "gain")


def outliers_text(found: Outliers, top: int) -> str:
    """Write a summary, and the weights with the largest outliers below it."""
    weights = found.weights
    ratios = [each.ratio for each in weights]
    far = sum(ratio > 10 for ratio in ratios)
    numbers = sum(math.prod(each.shape) for each in weights)
    lines = [
        f"{len(weights)} {plural(len(weights), 'weight')} in {numbers:,} numbers,"
        f" {len(found.left)} {plural(len(found.left), 'layer')} would stay float",
        f"largest |w| in standard deviations: median {statistics.median(ratios):.1f}, most {max(ratios):.1f},"
        f" beyond 10 in {far}",
        _gains(found),
        "",
    ]
    rows = [["layer", "shape", *_COLUMNS], *(_row(each) for each in weights[:top])]
    lines += table(rows, _COLUMNS)
    if len(weights) > top:
        lines.append(f"... and {len(weights) - top} more: --top {len(weights)}")
    lines.append(
        "split to: max|w| once channels are split; dB: outputs over error, estimated without data; gain: of splits"
    )
    return "\n".join(lines)


def _gains(found: Outliers) -> str:
    finite = [each for each in found.weights if math.isfinite(each.outputs_db) and math.isfinite(each.gain_db)]
    if not finite:
        return f"at {found.wbits} bits nothing is lost"
    mean = statistics.fmean(each.outputs_db for each in finite)
    gain = statistics.fmean(each.gain_db for each in finite)
    best = max(finite, key=lambda each: each.gain_db)
    return (
        f"at {found.wbits} bits, one scale per tensor, outputs are {mean:.1f} dB above their error on average;"
        f" r={found.r:g} adds {gain:+.1f}, at most {best.gain_db:+.1f} in {best.name}"
    )


def _row(each: Outlier) -> list[str]:
    shape = "x".join(map(str, each.shape))
    numbers = [f"{each.largest:.3g}", f"{each.sigma:.3g}", f"{each.ratio:.1f}", f"{each.once_split:.3g}"]
    return [each.name, shape, *numbers, f"{each.outputs_db:.1f}", f"{each.gain_db:+.1f}"]
