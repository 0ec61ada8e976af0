"""How much of a model will be quantized: nothing is an error, less than half of its matmul weights a warning."""

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from ocs.nn.registry import is_quantizable, replacement_of
from ocs.plan.layer_plan import LayerPlan

ENOUGH = 0.5  # of the matmul weights: less is worth a warning
_NO_MATMUL = re.compile("bias|pos|embed|table|token|log")  # in the names of parameters that are looked up or added


def matmul_weights(module: nn.Module) -> int:
    """Count the weights that a module itself multiplies its input by, those of embeddings and lazy layers left out.

    Of modules of an unknown kind these are all parameters with two or more dimensions larger than one, but for those
    whose name says that they are added or such (biases, positions, tokens).
    """
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return 0
    if is_quantizable(module):
        found = [getattr(module, name, None) for name in replacement_of(module).weight_names(module)]
    else:
        found = [parameter for name, parameter in module._parameters.items() if not _NO_MATMUL.search(name)]
    shapes = [tuple(w.shape) for w in found if w is not None and not nn.parameter.is_lazy(w)]
    return sum(math.prod(shape) for shape in shapes if is_quantizable(module) or _is_matrix(shape))


def _is_matrix(shape: Sequence[int]) -> bool:
    return len(shape) >= 2 and shape[0] > 1 and sum(size > 1 for size in shape) >= 2


def check_coverage(plans: Sequence[LayerPlan]) -> None:
    """Refuse plans that quantize nothing with a ValueError, and warn of those that quantize less than half.

    Both name the largest cause, by weights; what `skip` names is no cause for a warning.
    """
    counts = {plan.name: matmul_weights(plan.target.module) for plan in plans}
    if not any(plan.quantized for plan in plans):
        raise ValueError(f"no layer would be quantized: {_largest_cause(plans, counts)}")
    considered = [plan for plan in plans if not plan.skipped_by_name]
    total = sum(counts[plan.name] for plan in considered)
    share = sum(counts[plan.name] for plan in considered if plan.quantized) / total if total else 1.0
    if share < ENOUGH:
        left = [plan for plan in considered if not plan.quantized]
        text = f"only {share:.0%} of the matmul weights are quantized: {_largest_cause(left, counts)}"
        warnings.warn(text, UserWarning, stacklevel=7)  # above quantize, its parts and decorators


def _largest_cause(plans: Sequence[LayerPlan], counts: dict[str, int]) -> str:
    """Say which reason leaves most weights float, how many, and what can be done about it."""
    causes = defaultdict(list)
    for plan in plans:
        causes[plan.status, plan.reason].append(plan)
    (status, reason), largest = max(causes.items(), key=lambda cause: sum(counts[plan.name] for plan in cause[1]))
    weights, of = sum(counts[plan.name] for plan in largest), sum(counts[plan.name] for plan in plans)
    names = ", ".join(plan.name or "(model)" for plan in largest[:3]) + (" ..." if len(largest) > 3 else "")
    text = f"{status}: {reason} ({names}; {weights} of the {of} weights left float)"
    return f"{text}; skip=None skips nothing" if status == "skipped" else text
