"""Recipes: what quantize() does, layer by layer, where its caller leaves an option open."""

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import nn

from ocs.model.input_statistics import HasMean, inputs_have_mean
from ocs.nn.convolution import CONVOLUTIONS
from ocs.plan.layer_plan import LayerPlan
from ocs.plan.options import LayerOptions, Recipe


class RecipeRule:
    """What a recipe makes of the options of a model's layers.

    Args:
        recipe: "paper" changes nothing.
        model: the float model.
        given: names of the options that the caller chose. No recipe changes them, nor what an override names.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, given: Collection[str]) -> None:
        self.recipe, self.given = recipe, frozenset(given)
        self.means = {} if recipe == "paper" else inputs_have_mean(model)

    def apply(self, plan: LayerPlan) -> LayerPlan:
        """Decide the options that are left open, and note what is known of the layer's input."""
        if self.recipe == "paper":
            return plan
        mean = self.means.get(plan.name)
        favoured = _favoured(plan.options, compensates=_compensates(plan.module, mean))
        decided = self.given | (plan.overridden or frozenset())
        changes = {name: value for name, value in favoured.items() if name not in decided}
        return replace(plan, options=replace(plan.options, **changes), input_mean=mean)


def _compensates(layer: nn.Module, mean: HasMean | None) -> bool:
    """Tell whether errors that cancel are worth the larger ones that it takes.

    Those that squant moves are the largest of their filter, and grow least: to cancel n of them takes about an n-th of
    their power more, which is next to nothing for a row of a matrix, but not for a filter of few elements.
    """
    filters = isinstance(layer, CONVOLUTIONS) and math.prod(layer.kernel_size) > 1
    return not filters or (mean is not None and mean.worth)


def _favoured(options: LayerOptions, *, compensates: bool) -> dict[str, Any]:
    """What docs/accuracy.md measured to be best for a layer, without data."""
    rounding = "squant" if compensates and options.split != "naive" else "nearest"
    favoured = {"granularity": "channel", "clip": "auto", "rounding": rounding}
    if options.splits_input:
        favoured["act_select"] = "max"
    if options.abits is not None and options.act_scale != "dynamic":  # which neither clips nor asks for signs
        favoured["act_clip"] = "mse"
        if options.act_split != "oracle":  # which needs no calibration, as long as nothing is known of signs
            favoured["act_signed"] = "auto"
    return favoured
