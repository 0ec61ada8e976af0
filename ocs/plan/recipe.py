"""Recipes: what quantize() does, layer by layer, where its caller leaves an option open."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import nn

from ocs.model.input_statistics import inputs_have_mean
from ocs.model.targets import Layer, Options
from ocs.weight.arguments import check_choice

Recipe = Literal["paper", "best"]


def check_recipe(recipe: Any) -> None:
    """One that there is."""
    check_choice("recipe", recipe, get_args(Recipe))


def by_recipe(recipe: Recipe, model: nn.Module, given: Collection[str]) -> Callable[[Layer, Options], Options]:
    """What makes of a layer's options those of the recipe.

    given: names of options that the caller chose. No recipe changes them, nor what an override of the layer names.
    """
    if recipe == "paper":
        return lambda layer, options: options
    means = inputs_have_mean(model)

    def favour(layer: Layer, options: Options) -> Options:
        mean = means.get(layer.name)
        if mean is not None:
            layer.input_mean, layer.input_known = mean.reason, mean.known
        favoured = _favoured(options, has_mean=mean is not None and mean.worth)
        left_open = favoured.keys() - set(given) - layer.asked_for
        return replace(options, **{name: favoured[name] for name in left_open})

    return favour


def _favoured(options: Options, *, has_mean: bool) -> dict[str, Any]:
    """What docs/accuracy.md measured to be best for a layer, without data."""
    compensates = has_mean and options.split == "qa"
    favoured = {"granularity": "channel", "clip": "auto", "rounding": "squant" if compensates else "nearest"}
    if options.abits is not None:
        favoured["act_clip"] = "mse"
        if options.act_split != "oracle":  # which needs no calibration, as long as nothing is known of signs
            favoured["act_signed"] = "auto"
    return favoured
