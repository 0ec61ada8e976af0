"""What is said of a layer once its integers were learned."""

from dataclasses import replace

from ocs.plan.input_facts import InputFacts
from ocs.plan.quantize_layer import LayerQuantizer, LayerResult, WeightResult, check_range
from ocs.weight.error import signal_and_noise, sqnr_db, weight_error


def after_learning(result: LayerResult, facts: InputFacts, *, note: str) -> LayerResult:
    """Measure the weights of a layer again; note: why its integers are still those that it had, if so."""
    if note:
        rounding = "gptq" if result.options.learned else result.options.rounding
        options, notes = replace(result.options, rounding=rounding), filter(None, (result.rounding_note, note))
        result.replacement.settings = options.shown
        return replace(result, options=options, rounding_note="; ".join(notes))
    options = replace(result.options, rounding="learned")
    result.replacement.settings = options.shown
    check_range(result.replacement)
    learned_note = result.rounding_note.replace("rounded to nearest", "learned from nearest rounding")
    quantizer = LayerQuantizer(result.plan, facts)
    weights = tuple(_measured(result, each, quantizer) for each in result.weights)
    return replace(result, options=options, weights=weights, rounding_note=learned_note)


def _measured(result: LayerResult, of_weight: WeightResult, quantizer: LayerQuantizer) -> WeightResult:
    """Measure what is left of a weight, and of its outputs where that was asked for."""
    name, steps = of_weight.name, of_weight.steps
    w, groups = quantizer.weight(name), quantizer.weights[name].groups
    ints, _, _ = result.replacement.weight_state(name)
    quantized = of_weight.quantization.quantized._replace(ints=ints)
    error = weight_error(w, quantized, groups, result.options.group)
    quantization = of_weight.quantization._replace(quantized=quantized, error=error)
    if steps:
        scheme = quantizer.scheme(name, result.options)
        steps += (("learned", sqnr_db(*signal_and_noise(w, quantized, scheme))),)
    return of_weight._replace(quantization=quantization, steps=steps)
