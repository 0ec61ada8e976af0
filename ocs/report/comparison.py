"""What a quantized model's outputs keep of the float one's, in all and layer by layer."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from ocs.report.data import plain
from ocs.report.text import table


@dataclass(frozen=True)
class Agreement:
    """How far one tensor is from another, over all batches.

    sqnr_db: ratio of the float tensor's power to that of the difference, in dB; inf where there is none. cosine: of the
    angle between the two, 1 at best.
    """

    name: str
    sqnr_db: float
    cosine: float
    kind: str = ""


@dataclass(frozen=True)
class Comparison:
    """A quantized model against the float one, on the same batches; see ocs.compare.

    outputs: of the model, one for each tensor that it returns. top1: share of the positions of the first output at
    which both have the largest value in the same place of the last dimension; None where that has one value. layers: of
    the quantized layers, in running order, with all errors of the layers before them.
    """

    batches: int
    outputs: tuple[Agreement, ...]
    top1: float | None
    layers: tuple[Agreement, ...] = ()

    def worst(self) -> Agreement | None:
        """Find the layer at which most is lost: whose output is furthest below that of the one before it, in dB."""
        before, found, most = math.inf, None, -math.inf
        for layer in self.layers:
            lost = min(before, 1e3) - layer.sqnr_db if before < math.inf else -layer.sqnr_db
            if lost > most:
                found, most = layer, lost
            before = layer.sqnr_db
        return found

    def __str__(self) -> str:
        """Lay it out as a table, the outputs last."""
        rows = [_row(each) for each in (*self.layers, *self.outputs)]
        return "\n".join(
            [*table([["output of", "kind", "SQNR dB", "cosine"], *rows], ("SQNR dB", "cosine")), self.summary()]
        )

    def summary(self) -> str:
        """Sum it up in a sentence."""
        first = self.outputs[0]
        text = f"{self.batches} batches: SQNR {first.sqnr_db:.1f} dB, cosine {first.cosine:.6f}"
        text = text if self.top1 is None else f"{text}, the same top-1 in {_percent(self.top1)}"
        worst = self.worst()
        return text if worst is None else f"{text}; most is lost at {worst.name}"

    def to_dict(self) -> dict[str, Any]:
        """Give all of it as plain values."""
        return plain(asdict(self))

    def to_json(self) -> str:
        """Give all of it as JSON; infinite ratios are null."""
        return json.dumps(self.to_dict(), indent=1)

    def plot(self) -> Any:
        """Draw the SQNR of each layer's output, in running order; a matplotlib Figure (the extra `plot`)."""
        from ocs.report.plot import layer_agreement

        return layer_agreement(self)


def _row(each: Agreement) -> list[str]:
    return [each.name, each.kind, f"{each.sqnr_db:.1f}", f"{each.cosine:.6f}"]


def _percent(share: float) -> str:
    """Write a share in percent, rounded down: 100 % is all."""
    return f"{math.floor(1e4 * share) / 100:g} %"
