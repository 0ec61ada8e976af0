"""Recipes: what quantize() does, layer by layer, where its caller leaves an option open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import nn

from ocs import functional
from ocs.find import Layer, Options
from ocs.moments import inputs_have_mean

Recipe = Literal["paper", "best"]


def check_recipe(recipe: Any) -> None:
    """One that there is."""
    functional.check_choice("recipe", recipe, get_args(Recipe))


def by_recipe(recipe: Recipe, model: nn.Module, layers: list[Layer], given: Mapping[str, Any]) -> dict[str, Options]:
    """The options of each layer by name.

    given: what the caller said, which no recipe changes.
    """
    common = Options(**given)
    if recipe == "paper":
        return {layer.name: common for layer in layers}
    means, chosen = inputs_have_mean(model), {}
    for layer in layers:
        mean = means.get(layer.name)
        layer.input_mean = "" if mean is None else mean.reason
        favoured = _favoured(common, has_mean=mean is not None and mean.worth)
        chosen[layer.name] = replace(common, **{name: favoured[name] for name in favoured.keys() - given.keys()})
    return chosen


def _favoured(common: Options, *, has_mean: bool) -> dict[str, Any]:
    """What docs/accuracy.md measured to be best for a layer, without data."""
    compensates = has_mean and common.split == "qa"
    favoured = {"granularity": "channel", "clip": "auto", "rounding": "squant" if compensates else "nearest"}
    if common.abits is not None:
        favoured |= {"act_clip": "mse", "act_signed": "auto"}
    return favoured
