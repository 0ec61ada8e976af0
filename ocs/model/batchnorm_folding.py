"""Which BatchNorms the convolution before them can take in, and the convolutions that have done so.

In eval mode a BatchNorm is one scale and one shift per channel, s = gamma / sqrt(var + eps) and beta - mean s, and the
convolution before it may as well apply them: weight' = weight s per output channel, bias' = (bias - mean) s + beta.
A pair is folded only where a symbolic trace of the model shows that nothing else sees what lies between the two. Of a
BatchNorm that also runs children after normalizing, an activation say, these stay, where its own trace shows them.
"""

import copy
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ocs.model.exclusive import only_call, problem_of, shared_parts
from ocs.model.graph import Trace, asks_for_shape, first_line, own_graph, traces
from ocs.model.wrappers import named_modules
from ocs.nn.convolution import CONVOLUTIONS
from ocs.nn.registry import replacement_of
from ocs.nn.weights import input_weight

_NORMS = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}  # spatial dimensions of the convolutions they fit


class FoldedBatchNorm(nn.Sequential):
    """Stands where a BatchNorm was whose scale and shift the layer before it now holds, with what that ran afterwards.

    That is nothing but in subclasses: timm's BatchNormAct2d has a drop layer and an activation.
    """

    def __init__(self, after: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._modules.update(after)
        self.training = False  # these keep their modes


class Folding(NamedTuple):
    """What to exchange in a model, all of it at once."""

    layers: dict[int, nn.Module]  # by id of the old layer: a copy of it with the folded weight and bias
    norms: dict[int, FoldedBatchNorm]  # by id of the old BatchNorm
    left: dict[str, str]  # the first name of every BatchNorm that stays, and why

    def by_name(self, model: nn.Module) -> dict[str, str]:
        """Say of each BatchNorm of the model, by its first name, why it stays, or "" where it is folded."""
        return {name: "" for name, module in named_modules(model) if id(module) in self.norms} | self.left


def plan_folding(model: nn.Module) -> Folding:
    """Fold every BatchNorm that can be into the convolution before it; the model itself is not changed.

    It holds for the mode (train or eval) that the model and each of its parts are in, and for calls of the model itself
    with any of its optional arguments. Inputs of a Conv1d are taken to be batched: without a batch dimension, a
    BatchNorm1d would normalize another axis. Linear layers are left alone, as their rank is not known: for
    [N, L, C] a BatchNorm1d normalizes L.
    """
    folding = Folding({}, {}, {})
    norms = {name: module for name, module in named_modules(model) if isinstance(module, _BatchNorm)}
    if not norms:
        return folding
    try:
        found = traces(model)
    except Exception as error:  # noqa: BLE001 - the model's own code runs here, on what are no tensors
        folding.left.update(dict.fromkeys(norms, f"the model cannot be traced: {first_line(error)}"))
        return folding
    modules, shared = dict(named_modules(model)), shared_parts(model)
    for name, norm in norms.items():
        before, reason = _layer_before(name, modules, found, shared)
        layer = None if reason else folded_layer(modules[before], norm)
        if layer is None:
            folding.left[name] = reason or "the folded weight or bias would not be finite"
        else:
            folding.layers[id(modules[before])], folding.norms[id(norm)] = layer, FoldedBatchNorm(run_afterwards(norm))
    return folding


# --- What a norm does -------------------------------------------------------------------------------------------------


def run_afterwards(norm: _BatchNorm) -> dict[str, nn.Module] | None:
    """Name the children that a BatchNorm's forward runs after it has normalized its input, in eval mode, in order.

    None where its trace does not show that this is all that it does.
    """
    kind = next((kind for kind in _NORMS if isinstance(norm, kind)), None)
    if kind is None or type(norm).forward is kind.forward:
        return {}
    changes: dict[str, Any] = {"training": False}
    if type(norm)._check_input_dim is kind._check_input_dim:  # which asks what is no tensor for its rank
        changes["_check_input_dim"] = lambda x: None
    try:
        return _chain(norm, own_graph(norm, **changes))
    except Exception:  # noqa: BLE001 - the norm's own code runs here, on what is no tensor
        return None


def _chain(norm: _BatchNorm, graph: fx.Graph) -> dict[str, nn.Module] | None:
    """Follow a graph that normalizes its one input and then calls one child after the other."""
    (x,) = (node for node in graph.nodes if node.op == "placeholder")
    (node,) = (node for node in graph.nodes if node.target is F.batch_norm)
    if _given(node) != _expected(norm, x):
        return None
    chain, after = [x, node], {}
    while (user := _only(node.users)).op == "call_module":
        if (user.args, user.kwargs) != ((node,), {}) or user.target in after:
            return None
        after[user.target] = norm._modules[user.target]
        chain.append(node := user)
    checks = set()
    for other in graph.nodes:
        of_shape = asks_for_shape(other) or (other.op == "call_function" and {*other.all_input_nodes} <= checks)
        checks |= {other} if of_shape else set()
        if not (of_shape or other.op == "get_attr" or other in chain or other is user):
            return None
    return after if user.op == "output" and user.args == (node,) else None


def _only(users: Mapping[fx.Node, None]) -> fx.Node:
    (user,) = users
    return user


def _given(node: fx.Node) -> dict[str, Any]:
    """Name what F.batch_norm is given, tensors of the module by their names, but for momentum."""
    given = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
    given.apply_defaults()
    names = {k: v.target if isinstance(v, fx.Node) and v.op == "get_attr" else v for k, v in given.arguments.items()}
    return {k: v for k, v in names.items() if k != "momentum"}


def _expected(norm: _BatchNorm, x: fx.Node) -> dict[str, Any]:
    """Name what F.batch_norm is given where it does what torch's BatchNorm does in eval mode."""
    names = ("running_mean", "running_var", "weight", "bias")
    tensors = {name: None if getattr(norm, name) is None else name for name in names}
    return {"input": x, **tensors, "training": False, "eps": norm.eps}


# --- The arithmetic ---------------------------------------------------------------------------------------------------


def folded_layer(layer: nn.Module, norm: _BatchNorm) -> nn.Module | None:
    """Copy a convolution with weight and bias folded; None where one of these would not be finite.

    It shares neither its parameters nor the tables of an nn.Module with the old one.
    """
    with torch.inference_mode(False), torch.no_grad():  # what is made here may take part in training
        weight, bias = _folded_parameters(layer, norm)
        if not (weight.isfinite().all() and bias.isfinite().all()):
            return None
        trained = layer.weight.requires_grad
        return with_parameters(layer, weight=nn.Parameter(weight, trained), bias=nn.Parameter(bias, trained))


def with_parameters(layer: nn.Module, **parameters: nn.Parameter) -> nn.Module:
    """Copy a layer with other parameters; the copy shares none of the tables of an nn.Module with it."""
    copied = type(layer).__new__(type(layer))
    vars(copied).update({k: copy.copy(v) if isinstance(v, dict | set) else v for k, v in vars(layer).items()})
    copied._parameters.update(parameters)
    return copied


def _folded_parameters(layer: nn.Module, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Fold weight and bias [O], in the layer's dtype, device and memory format; in float64, rounded once."""
    mean, variance = _float64(norm.running_mean), _float64(norm.running_var)
    gamma = 1.0 if norm.weight is None else _float64(norm.weight)
    beta = 0.0 if norm.bias is None else _float64(norm.bias)
    bias = 0.0 if layer.bias is None else _float64(layer.bias)
    scale = gamma / torch.sqrt(variance + norm.eps)
    old = input_weight(layer)
    folded = _float64(old.tensor) * scale.view(-1, *[1] * (old.tensor.dim() - 1))
    weight = torch.empty_like(layer.weight).copy_(replacement_of(layer).layout(folded, old.groups))
    return weight, ((bias - mean) * scale + beta).to(layer.weight)


def _float64(x: Tensor) -> Tensor:
    """Cast to float64, on the CPU: some devices have none."""
    return x.detach().to("cpu", torch.float64)


# --- The pairs --------------------------------------------------------------------------------------------------------


def _layer_before(
    name: str, modules: dict[str, nn.Module], traces: list[Trace], shared: dict[int, str]
) -> tuple[str, str]:
    """Name the convolution that can take in this norm, and "", or say why there is none."""
    norm = modules[name]
    kind = next((kind for kind in _NORMS if isinstance(norm, kind)), None)
    reason = _problem(norm, kind, shared) if kind else f"is a {type(norm).__name__}"
    if reason:
        return "", f"it {reason}"
    found = sorted({_traced_before(name, modules, trace) for trace in traces})
    before, reason = next((each for each in found if each[1]), found[0])
    if reason or len(found) > 1:
        return "", reason or "what comes before it depends on the model's arguments"
    layer = modules[before]
    reason = _problem(layer, replacement_of(layer).float_kind, shared)
    if not reason and (len(layer.kernel_size), layer.out_channels) != (_NORMS[kind], norm.num_features):
        reason = f"does not fit a {type(norm).__name__} of {norm.num_features} channels"
    return before, f"the {type(layer).__name__} before it {reason}" if reason else ""


def _traced_before(name: str, modules: dict[str, nn.Module], trace: Trace) -> tuple[str, str]:
    """Name the convolution whose output goes into this norm and nowhere else, and "", or say why there is none."""
    call, reason = only_call(name, trace)
    if call is None:
        return "", f"it {reason}"
    node = next(iter(call.all_input_nodes), call)
    layer = modules[node.target] if node.op == "call_module" else None
    if isinstance(layer, nn.Linear):
        return "", "it follows a Linear, which may put its channels on another axis than it"
    if not isinstance(layer, CONVOLUTIONS):
        what = type(layer).__name__ if layer is not None else getattr(node.target, "__name__", node.target)
        return "", f"it follows {what}, not a convolution"
    _, reason = only_call(node.target, trace)
    if not reason and len(node.users) > 1:
        reason = f"has an output that is used {len(node.users)} times"
    return node.target, f"the {type(layer).__name__} before it {reason}" if reason else ""


def _problem(module: nn.Module, kind: type[nn.Module], shared: dict[int, str]) -> str:
    """Say why a norm or layer cannot be folded, whatever the model does with it, or ""."""
    buffers, proven = module._buffers, kind in _NORMS and run_afterwards(module) is not None
    problem = problem_of(module, type(module) if proven else kind, shared)
    if problem:
        return problem
    if kind not in _NORMS:
        weight = module._parameters["weight"]
        return "has no weight of floats" if weight is None or not weight.is_floating_point() else ""
    if module.training:
        return "is in training mode"
    lacks = any(buffers.get(each) is None for each in ("running_mean", "running_var"))
    return "has no running statistics" if lacks else ""
