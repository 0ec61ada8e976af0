"""What each option did for the error of a weight: quantized with one after the other switched on."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from ocs.plan.options import LayerOptions
from ocs.weight.error import signal_and_noise, sqnr_db
from ocs.weight.types import Quantization, Scheme

STEPS = {  # in this order
    "OCS": ("r", "select"),
    "channel": ("granularity", "group"),
    "split": ("split",),
    "rounding": ("rounding",),
    "clip": ("clip",),
}


Quantize = Callable[[LayerOptions], Quantization]


def explained_steps(
    w: Tensor, options: LayerOptions, scheme: Scheme, quantize: Quantize, last: Quantization
) -> tuple[tuple[str, float], ...]:
    """Measure (what, dB) of nearest rounding alone, and of each option that was switched on after it.

    dB is how far the outputs' power is above functional.output_error, an estimate without inputs, or where the scheme
    has the inputs' second moments, above what these say; inf where exact.

    Args:
        w: float32 [O, C, ...].
        options: by which it is quantized.
        scheme: how that is.
        quantize: quantizes w by other options.
        last: w quantized by these options.
    """
    chosen, found = LayerOptions(wbits=options.wbits), []
    labels = ["nearest", *(label for label, names in STEPS.items() if _differ(options, names))]
    for label in labels:
        chosen = replace(chosen, **{name: getattr(options, name) for name in STEPS.get(label, ())})
        step = last if label == labels[-1] else quantize(chosen)
        found.append((_shown(label, options), sqnr_db(*signal_and_noise(w, step.quantized, scheme))))
    return tuple(found)


def _differ(options: LayerOptions, names: Sequence[str]) -> bool:
    names = [name for name in names if name != "group"]  # which says nothing on its own
    return any(getattr(options, name) != getattr(LayerOptions, name) for name in names)


def _shown(label: str, options: LayerOptions) -> str:
    if label == "rounding" and options.learned:
        return "gptq"
    if label == "channel":
        return options.granularity if options.granularity == "channel" else f"groups of {options.group}"
    if label in ("split", "rounding"):
        return getattr(options, label)
    return f"clip {options.clip}" if label == "clip" else label
