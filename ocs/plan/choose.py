"""First stage of quantize(): which layers, and with which options."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ocs.errors import error_context
from ocs.model.targets import Target, check_model, find_targets
from ocs.nn.registry import is_quantizable
from ocs.plan.layer_plan import LayerPlan
from ocs.plan.options import LayerOptions, Request
from ocs.plan.recipe import RecipeRule
from ocs.plan.selectors import fitting, is_default, reason_to_skip, selected, selectors


def choose(model: nn.Module, request: Request) -> tuple[list[LayerPlan], dict[str, Any]]:
    """Plan every layer of the model, and say what was asked for: the settings of the report.

    Raises:
        ValueError: the model is quantized already or has no layer to quantize, or a name or pattern fits no layer.
        TypeError: the model is none whose layers can be replaced, or skip is no selector.
    """
    check_model(model)
    targets = find_targets(model)
    if not any(is_quantizable(target.module) for target in targets):
        raise ValueError(f"{type(model).__name__} has no convolution, linear, recurrent or attention layer to quantize")
    rule = RecipeRule(request.model.recipe, model, request.given)
    plans = _override([_first_plan(target, request) for target in targets], request)
    plans = _tied(_skip([_lookup(rule.apply(plan), request) for plan in plans], request))
    before_overrides = [rule.apply(LayerPlan(plan.target, request.common)) for plan in plans if plan.quantized]
    shared = _shared([plan.options for plan in before_overrides] or [request.common])
    return plans, shared | request.model.shown


def _first_plan(target: Target, request: Request) -> LayerPlan:
    plan, tied = LayerPlan(target, request.common), target.tied_to and request.model.embeddings
    return plan.left("float", target.reason_float) if target.reason_float and not tied else plan


def _override(plans: Sequence[LayerPlan], request: Request) -> list[LayerPlan]:
    """Apply the overrides; of several that fit a layer, later ones win."""
    by_name = {plan.name: plan for plan in plans}
    for pattern, changes in request.model.overrides.items():
        for target in fitting(pattern, [plan.target for plan in plans], "overrides"):
            plan = by_name[target.name]
            with error_context(target.name, f"overrides[{pattern!r}]"):
                options = replace(plan.options, **changes)
            named = (plan.overridden or frozenset()) | changes.keys()
            by_name[target.name] = replace(plan, options=options, overridden=named)
    return list(by_name.values())


def _lookup(plan: LayerPlan, request: Request) -> LayerPlan:
    """Leave an embedding float unless it is asked for, and then quantize its rows."""
    if not plan.quantized or not plan.kind.opt_in:
        return plan
    if request.model.embeddings or plan.overrides("wbits"):
        return replace(plan, options=plan.options.of_rows)
    return plan.left("float", "an embedding: embeddings=True quantizes it")


def _skip(plans: Sequence[LayerPlan], request: Request) -> list[LayerPlan]:
    """Leave out what the caller names; the first selector that means a layer is the reason."""
    by_name = {plan.name: plan for plan in plans}
    for selector in selectors(request.model.skip):
        reason = reason_to_skip(selector)
        for target in selected(selector, [plan.target for plan in plans]):
            named = by_name[target.name].skipped_by_name or not is_default(selector)
            plan = by_name[target.name] = replace(by_name[target.name], skipped_by_name=named)
            if plan.quantized:
                unused = "" if plan.overridden is None else "; its override was not used"
                by_name[target.name] = plan.left("skipped", reason + unused)
    return list(by_name.values())


def _tied(plans: Sequence[LayerPlan]) -> list[LayerPlan]:
    """Let a linear layer have the integers of the embedding that it is tied to; both stay float where one does."""
    by_name = {plan.name: plan for plan in plans}
    for plan in plans:
        if not plan.quantized or not plan.target.tied_to:
            continue
        other = by_name[plan.target.tied_to]
        if not other.quantized or plan.options.automatic or other.options.automatic:
            by_name[plan.name] = plan.left("float", plan.target.reason_float)
        elif other.kind.opt_in:
            rows = {name: getattr(other.options, name) for name in ("wbits", "clip", "granularity", "rounding", "r")}
            by_name[plan.name] = replace(plan, options=replace(plan.options, **rows))
    return list(by_name.values())


def _shared(options: Iterable[LayerOptions]) -> dict[str, Any]:
    """The options as a report shows them; "by layer" where a recipe chose different ones."""
    first, *others = [each.shown for each in options]
    return {name: value if all(o[name] == value for o in others) else "by layer" for name, value in first.items()}
