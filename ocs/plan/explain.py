"""What each option did for the error of a weight: quantized with one after the other switched on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ocs.model.targets import Options
from ocs.weight.error import signal_and_noise, sqnr_db
from ocs.weight.types import Quantization, Scheme

STEPS = {  # in this order
    "OCS": ("r", "select"),
    "channel": ("granularity",),
    "rounding": ("split", "rounding"),
    "clip": ("clip",),
}
Quantize = Callable[[Options], Quantization]


def steps_of(
    w: Tensor, options: Options, how: Scheme, quantize: Quantize, last: Quantization
) -> tuple[tuple[str, float], ...]:
    """(what, dB) for nearest rounding alone, and for each option that was switched on after it.

    dB is how far the outputs' power is above functional.output_error, an estimate without inputs, or where how.hessian
    has the inputs' second moments, above what these say; inf where exact.

    w: float32 [O, C, ...], to be quantized by these options, and how that is; quantize: the weight by other options;
    last: by these.
    """
    chosen, found = Options(wbits=options.wbits), []
    labels = ["nearest", *(name for name, fields in STEPS.items() if _differ(options, fields))]
    for label in labels:
        chosen = replace(chosen, **{field: getattr(options, field) for field in STEPS.get(label, ())})
        step = last if label == labels[-1] else quantize(chosen)
        found.append((_shown(label, options), sqnr_db(*signal_and_noise(w, step.quantized, how))))
    return tuple(found)


def _differ(options: Options, fields: tuple[str, ...]) -> bool:
    return any(getattr(options, field) != getattr(Options, field) for field in fields)


def _shown(label: str, options: Options) -> str:
    rounding = "naive" if options.split == "naive" else options.rounding
    return {"rounding": rounding, "clip": f"clip {options.clip}"}.get(label, label)
