"""Recipes: what quantize() does, layer by layer, where its caller leaves an option open."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import nn

from ocs.model.input_statistics import inputs_have_mean
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
        favoured = _favoured(plan.options, has_mean=mean is not None and mean.worth)
        decided = self.given | (plan.overridden or frozenset())
        changes = {name: value for name, value in favoured.items() if name not in decided}
        return replace(plan, options=replace(plan.options, **changes), input_mean=mean)


def _favoured(options: LayerOptions, *, has_mean: bool) -> dict[str, Any]:
    """What docs/accuracy.md measured to be best for a layer, without data."""
    compensates = has_mean and options.split != "naive"
    favoured = {"granularity": "channel", "clip": "auto", "rounding": "squant" if compensates else "nearest"}
    if options.splits_input:
        favoured["act_select"] = "max"
    if options.abits is not None and options.act_scale != "dynamic":  # which neither clips nor asks for signs
        favoured["act_clip"] = "mse"
        if options.act_split != "oracle":  # which needs no calibration, as long as nothing is known of signs
            favoured["act_signed"] = "auto"
    return favoured
