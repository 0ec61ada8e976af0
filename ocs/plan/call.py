"""The call of quantize(): what was meant by options that it does not have."""

import difflib
from collections.abc import Callable, Collection
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeVar

from ocs.plan.options import LayerOptions, ModelOptions, TrainingOptions, definitions

P, R = ParamSpec("P"), TypeVar("R")

_ELSEWHERE = {  # what other tools call it
    "wbits": "bits nbits n_bits num_bits weight_bits w_bits bitwidth qtype weights dtype weight_dtype",
    "abits": "act_bits a_bits activation_bits activations input_bits",
    "granularity": "per_channel axis ch_axis",
    "group": "group_size groupsize block_size q_group_size",
    "r": "ratio expand_ratio split_ratio ocs_ratio",
    "rounding": "method algorithm quant_method gptq squant adaround brecq",
    "calibration": "data dataset dataloader loader batches calib calib_data calibration_data example_inputs",
    "equalize": "equalization cle cross_layer_equalization smoothquant smooth_quant",
    "skip": "exclude excluded ignore ignored_layers skip_modules modules_to_not_convert",
    "overrides": "config qconfig quantization_config layers",
    "act_signed": "sym symmetric",
    "act_scale": "dynamic per_token token_scale act_granularity activation_scheme",
}
_MEANT = {name: option for option, names in _ELSEWHERE.items() for name in names.split()}


def meant(name: str, among: Collection[str]) -> str:
    """Say which of these options an unknown one may stand for, as the end of an error."""
    known = definitions(LayerOptions) | definitions(ModelOptions) | definitions(TrainingOptions)
    near = [_MEANT[name]] if name in _MEANT else difflib.get_close_matches(name, among, 1)
    if not near or near[0] not in among:
        return f"use {', '.join(among)}"
    return f"the nearest is {near[0]}: {known[near[0]].help}"


def explained_call(function: Callable[P, R]) -> Callable[P, R]:
    """Let the TypeErrors of a wrong call say what was meant; the signature stays."""
    own = signature(function)
    names = [name for name in own.parameters if name != "model"]

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if len(args) > 1:
            example = f"wbits={args[1]!r}" if isinstance(args[1], int) else "wbits=..., ..."
            home = "ocs.training" if function.__module__ == "ocs.training" else "ocs"
            raise TypeError(
                f"{function.__name__} takes its options by name: {home}.{function.__name__}(model, {example})"
            )
        unknown = next((name for name in kwargs if name not in own.parameters), None)
        if unknown is not None:
            raise TypeError(f"{function.__name__} has no option {unknown!r}: {meant(unknown, names)}")
        return function(*args, **kwargs)

    return call
