"""Recipes: what quantize() does, layer by layer, where its caller leaves an option open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import nn

from ocs import functional
from ocs.find import Layer, Options
from ocs.moments import InputMean, inputs_have_mean

Recipe = Literal["paper", "best"]


def check_recipe(recipe: Any) -> None:
    """One that there is."""
    functional.check_choice("recipe", recipe, get_args(Recipe))


def by_recipe(
    recipe: Recipe, model: nn.Module, layers: list[Layer], given: Mapping[str, Any]
) -> tuple[dict[str, Options], dict[str, InputMean]]:
    """The options of each layer by name, and what is known of its input's mean where the recipe asked for that.

    given: what the caller said; None leaves an option to the recipe.
    """
    given = {name: value for name, value in given.items() if value is not None}
    common = Options(**given)
    if recipe == "paper":
        return dict.fromkeys((layer.name for layer in layers), common), {}
    means = inputs_have_mean(model)
    chosen = {}
    for layer in layers:
        favoured = _favoured(common, means.get(layer.name))
        chosen[layer.name] = replace(common, **{name: favoured[name] for name in favoured.keys() - given.keys()})
    return chosen, means


def _favoured(common: Options, mean: InputMean | None) -> dict[str, Any]:
    """What docs/accuracy.md measured to be best for a layer, without data."""
    compensates = common.split == "qa" and mean is not None and mean.worth
    favoured = {"granularity": "channel", "clip": "auto", "rounding": "squant" if compensates else "nearest"}
    if common.abits is not None:
        favoured |= {"act_clip": "mse", "act_signed": "auto"}
    return favoured
