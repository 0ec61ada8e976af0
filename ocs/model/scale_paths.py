"""From which norm or layer to which others the scale of each channel can be moved, as the graph proves.

Dividing an output channel by s > 0 and multiplying the weights that it meets by s changes nothing where all that lies
between is positively homogeneous, f(x / s) = f(x) / s in each channel: ReLU, pooling, dropout, flattening (Nagel et
al. 2019, arXiv 1906.04721, section 4.1; for the outputs of LayerNorms Xiao et al. 2023, arXiv 2211.10438).
"""

import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from ocs.model.exclusive import only_call, problem_of, shared_parts
from ocs.model.graph import Trace, asks_for_shape, first_line, has_hooks, traces
from ocs.model.wrappers import named_modules
from ocs.nn.convolution import CONVOLUTIONS
from ocs.nn.registry import is_quantizable, replacement_of
from ocs.nn.weights import input_weight

_BATCH_NORMS = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}  # spatial dimensions
_NORMS = (*_BATCH_NORMS, nn.LayerNorm, nn.RMSNorm)
_LAYERS = (nn.Linear, *CONVOLUTIONS)
_UNTRACED = "the model cannot be traced"


class Consumer(NamedTuple):
    """A layer that a path ends in."""

    name: str
    repeat: int = 1  # neighbouring inputs that come from one channel, where the path flattens


class ScalePath(NamedTuple):
    """From what divides a channel to all that it goes into, and nothing else sees it."""

    carrier: str  # the norm or layer whose weight and bias are divided
    convolution: str  # the one before a BatchNorm, where its output goes into that; "" for other carriers
    consumers: tuple[Consumer, ...]  # sorted


class Paths(NamedTuple):
    """What the graph says of each norm and layer."""

    found: dict[str, ScalePath]  # by the carrier's first name
    left: dict[str, str]  # of every other one, why its scales cannot be moved


class _Obstacle(Exception):  # noqa: N818 - no error, but a reason
    """Why scales cannot be moved."""


def find_paths(model: nn.Module) -> Paths:
    """Find where scales can be moved; the model itself is not changed.

    It holds for the mode (train or eval) that the model and each of its parts are in, and for calls of the model itself
    with any of its optional arguments. Inputs of convolutions are taken to be batched.
    """
    modules, shared = dict(named_modules(model)), shared_parts(model)
    names = [name for name, module in modules.items() if isinstance(module, (_BatchNorm, *_NORMS, *_LAYERS))]
    if not names:
        return Paths({}, {})
    try:
        found = traces(model)
    except Exception as error:  # noqa: BLE001 - the model's own code runs here, on what are no tensors
        return Paths({}, dict.fromkeys(names, f"{_UNTRACED}: {first_line(error)}"))
    known = dict(_paths_of_blocks(modules, found))
    paths = Paths({}, {})
    for name in names:
        try:
            path = known[name] if name in known else _agreed_path(name, modules, found)
            if path is not None:
                _check_path(path, modules, shared)
                paths.found[name] = path
        except _Obstacle as obstacle:
            paths.left[name] = str(obstacle)
    return paths


def channels_of(carrier: nn.Module) -> int:
    """Count the channels of what a norm or layer gives."""
    if isinstance(carrier, _BatchNorm):
        return carrier.num_features
    if isinstance(carrier, nn.Linear):
        return carrier.out_features
    return carrier.out_channels if isinstance(carrier, CONVOLUTIONS) else carrier.normalized_shape[0]


# --- What may be scaled -----------------------------------------------------------------------------------------------


def _check_path(path: ScalePath, modules: Mapping[str, nn.Module], shared: dict[int, str]) -> None:
    """Refuse a path one of whose ends cannot be exchanged."""
    problem = _problem(modules[path.carrier], shared)
    if problem:
        raise _Obstacle(f"it {problem}")
    for consumer in path.consumers:
        module = modules[consumer.name]
        problem = _problem(module, shared)
        if not problem and channels_of(modules[path.carrier]) * consumer.repeat != input_weight(module).in_channels:
            problem = "has another number of input channels"
        if problem:
            raise _Obstacle(f"it goes into {consumer.name}, which {problem}")


def _problem(module: nn.Module, shared: dict[int, str]) -> str:
    """Say why a norm's or layer's parameters cannot be exchanged, or ""."""
    if isinstance(module, nn.MultiheadAttention):
        kind, weight, names = nn.MultiheadAttention, "in_proj_weight", ("in_proj_weight", "in_proj_bias")
    else:
        kind = next(kind for kind in (*_NORMS, *_LAYERS) if isinstance(module, kind))
        weight, names = "weight", ("weight",) if kind is nn.RMSNorm else ("weight", "bias")
    problem = problem_of(module, kind, shared, names)
    tensor = module._parameters.get(weight)
    if problem or tensor is None:
        return problem or f"has no {weight}"
    plain = tensor.layout == torch.strided and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    return "" if plain and tensor.is_floating_point() else f"has a {weight} that is no plain tensor of floats"


# --- One trace --------------------------------------------------------------------------------------------------------


class _Channels(NamedTuple):
    """Where a tensor has the channels: on which axis from the end, in how many dimensions (0: any)."""

    axis: int
    rank: int
    flattened: bool = False  # the last axis has several neighbours of each channel


def _agreed_path(name: str, modules: Mapping[str, nn.Module], found: Sequence[Trace]) -> ScalePath | None:
    """Find the path from a norm or layer that all traces agree on; None where a BatchNorm follows, with its own."""
    paths = {_traced_path(name, modules, trace) for trace in found}
    if len(paths) > 1:
        raise _Obstacle("where it goes depends on the model's arguments")
    return paths.pop()


def _traced_path(name: str, modules: Mapping[str, nn.Module], trace: Trace) -> ScalePath | None:
    call, reason = only_call(name, trace)
    if call is None:
        raise _Obstacle(f"it {reason}")
    if not isinstance(modules[name], _BatchNorm) and any(_is_batch_norm(user, modules) for user in call.users):
        return None
    before = next(iter(call.all_input_nodes), call)
    layer = modules.get(str(before.target)) if before.op == "call_module" else None
    only_user = isinstance(layer, CONVOLUTIONS) and len(before.users) == 1
    convolution = str(before.target) if only_user and isinstance(modules[name], _BatchNorm) else ""
    consumers = set(_consumers(call, _given_by(modules[name], layer), modules, trace, channels_of(modules[name])))
    if not consumers:
        raise _Obstacle("it goes into nothing")
    return ScalePath(name, convolution, tuple(sorted(consumers)))


def _is_batch_norm(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(modules.get(str(node.target)), _BatchNorm)


def _given_by(carrier: nn.Module, before: nn.Module | None) -> _Channels:
    """Say where the output of a norm or layer has its channels."""
    if isinstance(carrier, nn.LayerNorm | nn.RMSNorm) and len(carrier.normalized_shape) != 1:
        raise _Obstacle("it normalizes several axes")
    if not isinstance(carrier, (_BatchNorm, *CONVOLUTIONS)):
        return _Channels(-1, 0)
    if isinstance(carrier, nn.BatchNorm1d) and not isinstance(before, nn.Conv1d | nn.ConvTranspose1d):
        raise _Obstacle("it follows no Conv1d, so that its channels may be on either axis")
    of_norm = next((dims for kind, dims in _BATCH_NORMS.items() if isinstance(carrier, kind)), None)
    if of_norm is None and isinstance(carrier, _BatchNorm):
        raise _Obstacle(f"it is a {type(carrier).__name__}")
    dims = len(carrier.kernel_size) if of_norm is None else of_norm
    return _Channels(-1 - dims, 2 + dims)


def _consumers(
    start: fx.Node, given: _Channels, modules: Mapping[str, nn.Module], trace: Trace, count: int
) -> Iterator[Consumer]:
    """Follow a tensor of so many channels to all layers that it goes into."""
    todo, places = deque([start]), {start: given}
    while todo:
        node = todo.popleft()
        for user in node.users:
            if asks_for_shape(user):
                continue
            module = modules.get(str(user.target)) if user.op == "call_module" else None
            if module is not None and is_quantizable(module):
                yield _consumer(user, node, module, places[node], trace, count)
                continue
            passed = _passed(user, node, module, places)
            if passed is None:
                raise _Obstacle(f"it goes into {_name(user, module)}")
            places[user] = passed
            todo.append(user)


def _consumer(user: fx.Node, node: fx.Node, module: nn.Module, given: _Channels, trace: Trace, count: int) -> Consumer:
    """Check that a layer gets these channels as its input and nothing else of them."""
    name = str(user.target)
    if not isinstance(module, (*_LAYERS, nn.MultiheadAttention)):
        raise _Obstacle(f"it goes into a {type(module).__name__}")
    _, reason = only_call(name, trace)
    if reason:
        raise _Obstacle(f"it goes into {name}, which {reason}")
    names = replacement_of(module).input_names
    inputs = [dict(zip(names, user.args, strict=False), **user.kwargs).get(each) for each in names]
    others = [*user.args[len(names) :], *(value for key, value in user.kwargs.items() if key not in names)]
    if any(each is not node for each in inputs) or any(each is node for each in others):
        raise _Obstacle(f"it goes into {name} with other inputs")
    if given.axis != (-1 - len(module.kernel_size) if isinstance(module, CONVOLUTIONS) else -1):
        raise _Obstacle(f"it goes into {name}, which may have its channels on another axis")
    features = module.in_features if isinstance(module, nn.Linear) else count
    return Consumer(name, features // max(count, 1) if given.flattened else 1)


def _name(node: fx.Node, module: nn.Module | None) -> str:
    if node.op == "output":
        return "the model's output"
    return type(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))


# --- What passes on a channel's scale ---------------------------------------------------------------------------------

_SAME_FUNCTIONS = {F.relu, torch.relu, torch.relu_, F.relu_, F.leaky_relu, F.dropout, torch.dropout}
_SAME_METHODS = {"relu", "relu_", "contiguous", "clone"}
_SAME_MODULES = (nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_POOLS: dict[Callable[..., Any], int] = {
    getattr(F, f"{kind}_pool{dims}d"): dims
    for kind in ("max", "avg", "adaptive_max", "adaptive_avg")
    for dims in (1, 2, 3)
}
_POOL_MODULES = (_AvgPoolNd, _AdaptiveAvgPoolNd, _MaxPoolNd, _AdaptiveMaxPoolNd)


def _passed(
    user: fx.Node, node: fx.Node, module: nn.Module | None, places: Mapping[fx.Node, _Channels]
) -> _Channels | None:
    """Say where what is made of a tensor has its channels, each scaled as it was; None where that is not so."""
    given, (first, *others) = places[node], user.args or (None,)
    name = user.target if user.op == "call_method" else {torch.flatten: "flatten", torch.mean: "mean"}.get(user.target)
    if name in ("view", "reshape"):
        return _flattened(given) if first is node and _keeps_first(user, places) else None
    if first is not node or user.all_input_nodes != [node]:
        return None
    if module is not None:
        return _passed_by_module(module, given)
    if name == "flatten":
        return _flattened(given) if _flattens_from_channels(*others, **user.kwargs) else None
    if name == "mean":
        return _averaged(given, *others, **user.kwargs)
    same = name in _SAME_METHODS or user.target in _SAME_FUNCTIONS or _pools(given, _POOLS.get(user.target))
    return given if same else None


def _passed_by_module(module: nn.Module, given: _Channels) -> _Channels | None:
    if not type(module).forward.__module__.startswith("torch.nn.") or "forward" in vars(module) or has_hooks(module):
        return None
    if isinstance(module, nn.Flatten):
        return _flattened(given) if _flattens_from_channels(module.start_dim, module.end_dim) else None
    dims = next((dims for dims in (1, 2, 3) if type(module).__name__.endswith(f"{dims}d")), None)
    same = isinstance(module, _SAME_MODULES) or (isinstance(module, _POOL_MODULES) and _pools(given, dims))
    return given if same else None


def _pools(given: _Channels, dims: int | None) -> bool:
    """Tell whether pooling over so many axes leaves the channels apart."""
    return dims is not None and given.axis == -1 - dims and not given.flattened


def _flattens_from_channels(start_dim: int = 0, end_dim: int = -1) -> bool:
    return (start_dim, end_dim) == (1, -1)


def _keeps_first(node: fx.Node, places: Mapping[fx.Node, _Channels]) -> bool:
    """Tell whether this is x.view(x.size(0), -1), of any tensor on the path."""
    if len(node.args) != 3 or node.args[2] != -1 or node.kwargs:
        return False
    first = node.args[1]
    if not isinstance(first, fx.Node) or first.all_input_nodes[:1] == []:
        return False
    if first.op == "call_method":
        return first.target == "size" and first.args[0] in places and first.args[1:] == (0,)
    shape = first.args[0]
    is_item = first.target is operator.getitem and first.args[1] == 0 and isinstance(shape, fx.Node)
    return is_item and asks_for_shape(shape) and shape.args[0] in places and shape.args[1:] in ((), ("shape",))


def _flattened(given: _Channels) -> _Channels | None:
    """Keep the first axis and put all others in one; what a layer gives in any number of dimensions is not known."""
    if given.rank < 2:
        return None
    return given if given.rank == 2 else _Channels(-1, 2, flattened=True)


def _averaged(given: _Channels, dim: Any = None, keepdim: bool = False, **others: Any) -> _Channels | None:
    """Average over axes behind the channels."""
    dims = [dim] if isinstance(dim, int) else dim
    if others or not isinstance(dims, tuple | list) or not all(isinstance(each, int) for each in dims):
        return None
    behind = [each if each < 0 else each - given.rank for each in dims]
    if not given.rank or not all(given.axis < each < 0 for each in behind):
        return None
    return given if keepdim else _Channels(given.axis + len(dims), given.rank - len(dims))


# --- Blocks of torch's own, whose forward is known --------------------------------------------------------------------

_BLOCKS = {
    nn.TransformerEncoderLayer: {"_sa_block", "_ff_block"},
    nn.TransformerDecoderLayer: {"_sa_block", "_mha_block", "_ff_block"},
}
_AROUND = (nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer)


def _paths_of_blocks(modules: Mapping[str, nn.Module], found: Sequence[Trace]) -> Iterator[tuple[str, ScalePath]]:
    """Find the paths in torch's transformer layers, which torch.fx cannot look into."""
    for name, block in modules.items():
        methods = _BLOCKS.get(type(block))
        if (
            methods
            and not methods & vars(block).keys()
            and all(_runs_as_written(name, modules, each) for each in found)
        ):
            for carrier, consumer in _paths_in(block):
                path = ScalePath(f"{name}.{carrier}".removeprefix("."), "", (_in_block(name, consumer),))
                yield path.carrier, path


def _in_block(block: str, name: str) -> Consumer:
    return Consumer(f"{block}.{name}".removeprefix("."))


def _paths_in(block: nn.Module) -> Iterator[tuple[str, str]]:
    """List norms and layers with what alone they go into; after an addition, a norm's output goes on beside that."""
    last = "norm2" if isinstance(block, nn.TransformerEncoderLayer) else "norm3"
    if block.norm_first:
        yield "norm1", "self_attn"
        yield last, "linear1"
    if block.activation is F.relu or type(block.activation) is nn.ReLU:
        yield "linear1", "linear2"


def _runs_as_written(name: str, modules: Mapping[str, nn.Module], trace: Trace) -> bool:
    """Tell whether a trace calls the block, or torch's stack of blocks that it is in, and nothing else touches it."""
    parents = [name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1)] if name else []
    inside = [other for other in modules if f"{other}.".startswith(f"{name}.")]
    if any(other in trace.read or has_hooks(modules[other]) for other in inside):
        return False
    for called in parents:
        if not isinstance(modules[called], (*_BLOCKS, *_AROUND, nn.ModuleList)) or not _is_torch_s(modules[called]):
            return False
        if only_call(called, trace)[0] is not None:
            return True
    return False


def _is_torch_s(module: nn.Module) -> bool:
    """Tell whether a module does what torch's class does, and no more."""
    return type(module).__module__.startswith("torch.nn.") and "forward" not in vars(module) and not has_hooks(module)
