"""What a model does with a module, and whether another one may stand in its place that computes something else."""

from collections import Counter
from collections.abc import Collection

from torch import fx, nn

from ocs.model.graph import Trace, has_hooks
from ocs.model.references import held_elsewhere
from ocs.model.wrappers import named_modules

_METHODS = ("forward", "_conv_forward", "_check_input_dim", "__call__")


def only_call(name: str, trace: Trace) -> tuple[fx.Node | None, str]:
    """Find the one node that calls a module, and "", or say what else the model does with it or around it."""
    nodes = [node for node in trace.graph.nodes if node.op in ("call_module", "get_attr")]
    uses = [node for node in nodes if f"{node.target}.".startswith(f"{name}.") or name.startswith(f"{node.target}.")]
    if name in trace.read:
        return None, "has tensors that the model reads itself"
    if len(uses) == 1 and uses[0].op == "call_module" and uses[0].target == name:
        return uses[0], ""
    return None, f"is used {len(uses)} times" if len(uses) > 1 else "is not called where the trace sees it"


def problem_of(
    module: nn.Module,
    kind: type[nn.Module],
    shared: dict[int, str],
    parameters: Collection[str] = ("weight", "bias"),
) -> str:
    """Say why none that computes something else can take the module's place, whatever the model does with it, or "".

    kind: the class of torch's whose forward it must have. parameters: those of that class. shared: of shared_parts().
    """
    own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    problems = {
        f"has a forward of its own ({type(module).__name__})": any(
            getattr(type(module), m, None) is not getattr(kind, m, None) or m in vars(module) for m in _METHODS
        ),
        "is re-parametrized (weight_norm, pruning or parametrize)": not {*parameters} <= module._parameters.keys(),
        "holds no values yet": any(nn.parameter.is_lazy(t) or t.is_meta for t in own),
        "has hooks": has_hooks(module),
        shared.get(id(module), ""): id(module) in shared,
        "shares its parameters": any(id(t) in shared for t in own),
    }
    return next((problem for problem, is_so in problems.items() if is_so), "")


def shared_parts(model: nn.Module) -> dict[int, str]:
    """Find by id the modules that stand in several places or where they cannot be exchanged, and shared parameters."""
    modules = Counter(id(module) for _, module in named_modules(model, every_name=True))
    held = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    several = {key: "stands in several places" for key, count in [*modules.items(), *held.items()] if count > 1}
    return held_elsewhere(model) | several
