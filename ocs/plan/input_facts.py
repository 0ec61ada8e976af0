"""Second stage of quantize(): what is known of the inputs of layers, by calibration or from the graph."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ocs.calibration.additions import Range, Term
from ocs.calibration.calibrate import Calibration, collect, watch_input, watch_moments
from ocs.calibration.gram import LayerMoments
from ocs.calibration.run import Data, Watch, kept, with_sample
from ocs.calibration.statistics import Statistics
from ocs.errors import error_context
from ocs.model.input_statistics import estimate_inputs
from ocs.nn.weights import check_values, input_weight
from ocs.plan.bias_correction import InputMean, means_of_graph, measured_means
from ocs.plan.layer_plan import LayerPlan
from ocs.plan.options import LayerOptions, ModelOptions
from ocs.weight.types import GAIN

Plans = Sequence[LayerPlan]


class Watches(NamedTuple):
    """What looks at a model while batches run through it."""

    inputs: list[Watch]  # have Statistics
    moments: list[Watch]  # have LayerMoments


Run = Callable[[nn.Module, Watches, Data, bool | None], Calibration]  # of the model, the data, a bar

_TAKES_GAIN = re.compile("(Layer|RMS|Group|Instance)Norm")  # in the names of classes, torch's and others'


@dataclass(frozen=True)
class InputFacts:
    """What is known of a layer besides its weights."""

    statistics: Statistics | None = None  # of its input, where that is to have one scale, or to be split
    mean: InputMean | None = None  # of its input, where the bias is to be corrected
    second_moments: LayerMoments | None = None  # of what each weight meets, where these are rounded by them
    gain: float = GAIN  # see output_error
    output_range: Range | None = None  # of its output, where that is added to another tensor
    normed_range: Range | None = None  # of what the BatchNorm makes of its output that directly follows it, likewise


class Learned(NamedTuple):
    """What calibration and graph said."""

    plans: list[LayerPlan]  # those whose input calibration never saw stay float
    facts: dict[str, InputFacts]  # by the layer's name
    sample: Data | None  # one batch, where errors of the model's outputs shall be measured
    inputs: Data | None  # all batches, where integers shall be learned on them


def run_whole(model: nn.Module, watches: Watches, data: Data, progress: bool | None) -> Calibration:
    """Run the batches through a model that holds its weights."""
    for watch in [*watches.inputs, *watches.moments]:
        with error_context(watch.name):
            check_values(input_weight(watch.module).tensor)
    return collect(model, data, *watches, progress, "calibration")


def learn(model: nn.Module, plans: Plans, options: ModelOptions, run: Run = run_whole) -> Learned:
    """Run calibration where it was given, and find out what the plans need to know of each layer's input.

    run: lets the watches see the batches.

    Raises:
        ValueError: calibration is missing, empty, of another model, or has no effect on these plans.
    """
    inputs = _inputs(plans, options.calibration)
    sample, calibration = _with_sample(options.calibration if inputs is None else inputs, options)
    equalized = options.equalize and any(plan.quantizes_input for plan in plans)
    seen = _calibrated(model, plans, calibration, options.progress, run, has_use=sample is not None or equalized)
    plans = [_left_where_unreached(plan, seen) for plan in plans]
    means = _means(model, plans, seen)
    gain = _gain(model, plans)
    facts = {
        plan.name: InputFacts(
            seen.get(plan.name),
            means.get(plan.name),
            seen.moments.get(plan.name),
            gain,
            *(seen.terms.get(Term(plan.name, normed)) for normed in (False, True)),
        )
        for plan in plans
    }
    return Learned(plans, facts, sample, inputs)


def _inputs(plans: Plans, calibration: Data | Calibration | None) -> Data | None:
    """The batches that calibrate, to be run again and again; None where nothing is learned on them."""
    plan = next((plan for plan in plans if plan.quantized and plan.options.learned), None)
    if plan is None or calibration is None:
        return None
    if isinstance(calibration, Calibration):
        raise ValueError(
            f"{plan.name}: rounding='learned' learns on the inputs themselves: give batches, no ocs.Calibration"
        )
    return kept(calibration)


def _with_sample(
    calibration: Data | Calibration | None, options: ModelOptions
) -> tuple[Data | None, Data | Calibration | None]:
    """One batch, where the model's outputs are to be compared on it, and calibration that still has all batches."""
    by_error = options.budget is not None or options.allocate == "error"
    if by_error and calibration is not None and not isinstance(calibration, Calibration):
        return with_sample(calibration)
    return None, calibration


def _left_where_unreached(plan: LayerPlan, seen: Calibration) -> LayerPlan:
    if plan.needs_statistics and plan.name not in seen:
        return plan.left("float", "calibration never reached it")
    return plan


def _means(model: nn.Module, plans: Plans, seen: Calibration) -> dict[str, InputMean]:
    """The mean inputs of the layers whose bias is to be corrected: measured, else by the graph."""
    wanted = {plan.name for plan in plans if plan.needs_mean}
    means = measured_means(seen)
    if wanted - means.keys():
        means = means_of_graph(estimate_inputs(model)) | means
    return {name: mean for name, mean in means.items() if name in wanted}


def _gain(model: nn.Module, plans: Plans) -> float:
    """Through how many layers an error of an output's gain passes on the mean, see output_error.

    That is, until a norm takes it away; a BatchNorm, which divides by what it has seen in training, does not.
    """
    depth = sum(getattr(plan.module, "num_layers", 1) for plan in plans if plan.quantized)
    leaves = (type(module).__name__ for module in model.modules() if not module._modules)
    norms = sum(_TAKES_GAIN.search(name) is not None for name in leaves)
    return max(depth / (norms + 1), 1.0)


# --- Calibration ------------------------------------------------------------------------------------------------------


def _calibrated(
    model: nn.Module,
    plans: Plans,
    calibration: Data | Calibration | None,
    progress: bool | None,
    run: Run,
    *,
    has_use: bool,
) -> Calibration:
    """What calibration says of the layers that need it; has_use: it is used for something else, too."""
    _check_options_of_inputs(plans)
    if calibration is None:
        _check_needs_none(plans)
        return Calibration()
    if not has_use:
        _check_has_effect(plans)
    watched = [plan for plan in plans if plan.needs_statistics or plan.needs_mean]
    compensated = [plan for plan in plans if plan.needs_second_moments]
    if not watched and not compensated:
        return Calibration()
    if not isinstance(calibration, Calibration):
        statistics = [watch_input(plan.target, channels=plan.options.splits_input) for plan in watched]
        moments = watch_moments(model, [plan.target for plan in compensated])
        return run(model, Watches(statistics, moments), calibration, progress)
    _check_fits(calibration, watched, compensated)
    return calibration


# --- What does not go together ----------------------------------------------------------------------------------------


def _check_options_of_inputs(plans: Plans) -> None:
    for plan in plans:
        if plan.options.abits is None and plan.options.of_input and not plan.overrides("abits"):
            raise ValueError(f"{plan.name}: an act_ option without abits has no effect: set abits, too")
        if plan.rounds_rows:
            with error_context(plan.name):
                _check_rows(plan)

    _check_input_selection([plan.options for plan in plans if plan.quantized])


def _check_input_selection(options: Sequence[LayerOptions]) -> None:
    """Refuse a rule for splits of inputs where there are none that calibration chooses."""
    chosen = next((each.act_select for each in options if each.act_select != LayerOptions.act_select), None)
    if chosen is not None and not any(each.splits_input for each in options):
        raise ValueError(f"act_select={chosen!r} has no effect: it is for act_r with act_split='static'")


def _check_rows(plan: LayerPlan) -> None:
    """Refuse a scale for each row of an input whose channels are not on the last axis."""
    if input_weight(plan.module).input_axis != -1:
        raise ValueError(
            "act_scale='dynamic' is for inputs whose channels are the last axis, which those of a"
            f" {type(plan.module).__name__} are not: use overrides={{{plan.name!r}: dict(act_scale='static')}} with"
            f" calibration=, or skip={plan.name!r}"
        )


def _check_needs_none(plans: Plans) -> None:
    needs = [(plan, _need(plan.options)) for plan in plans if plan.needs_statistics]
    rounded = [plan for plan in plans if plan.needs_second_moments or (plan.quantized and plan.options.learned)]
    needs += [(plan, f"rounding={plan.options.rounding!r}") for plan in rounded]
    if needs:
        plan, need = needs[0]
        raise ValueError(f"{plan.name}: {need} needs calibration=: batches of inputs, say")


def _need(options: LayerOptions) -> str:
    """Say which option of inputs it is that asks for calibration."""
    return f"act_r={options.act_r}" if options.act_scale == "dynamic" else f"abits={options.abits}"


def _check_has_effect(plans: Plans) -> None:
    options = [plan.options for plan in plans]
    seen = any(each.abits is not None and (each.act_scale == "static" or each.act_r) for each in options)
    if not seen and not any(each.correct_bias or each.compensated for each in options):
        raise ValueError(
            "calibration= has no effect on these options: add rounding='gptq', correct_bias=True or abits= with"
            " act_scale='static' or act_r= to use it; batches (no ocs.Calibration) serve allocate='error' and"
            " wbits='auto', too"
        )


def _check_fits(calibration: Calibration, watched: Plans, compensated: Plans) -> None:
    if not any(plan.name in calibration for plan in [*watched, *compensated]):
        raise ValueError(f"calibration is of another model: it has {', '.join([*calibration][:3])} ...")
    if compensated and not calibration.moments:
        raise ValueError("rounding='gptq': calibration has no second moments; use ocs.calibrate(..., moments=True)")
    for plan in compensated:
        if plan.name in calibration.moments:
            with error_context(plan.name):
                calibration.moments[plan.name].check(plan.module)
