"""What the graph knows of the inputs of each layer, without data: their mean and variance, channel by channel.

After a BatchNorm a channel is about normal with the norm's own mean and variance, beta and gamma^2 (Nagel et al. 2019,
arXiv 1906.04721, section 4.2). Here each such channel is a sample of that distribution, drawn independently of all
others, and elementwise operations, sums and products of branches, pooling and the like simply run on the samples.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.padding import _ConstantPadNd, _ReflectionPadNd, _ReplicationPadNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from ocs.model.channel_samples import UNKNOWN, Channels, InputEstimate, apply, copied, flatten, normal, normals, rank_of
from ocs.model.graph import has_hooks, traced_parts
from ocs.model.wrappers import named_modules, submodule
from ocs.nn.base import QuantizedLayer
from ocs.nn.convolution import CONVOLUTIONS
from ocs.nn.registry import REPLACEMENTS, is_quantizable, replacement_of
from ocs.nn.weights import input_weight

_ANY_CONVOLUTION = (*CONVOLUTIONS, *(REPLACEMENTS[kind] for kind in CONVOLUTIONS))
MEAN_SHARE = 0.05  # of an input's power: where its mean has more, errors that add up along channels count


class HasMean(NamedTuple):
    """Whether a layer's inputs have a mean worth compensating, what tells, and whether that is known or assumed."""

    worth: bool
    reason: str
    known: bool = True


def estimate_inputs(model: nn.Module) -> dict[str, InputEstimate | None]:
    """Estimate the input of every layer that could be quantized, by name; None where nothing is known. Needs no data.

    Never fails and never changes the model: what torch.fx cannot trace is unknown, and so is what differs between two
    calls of a layer or between the choices of a forward's optional arguments.
    """
    names = [name for name, module in named_modules(model) if _is_layer(module)]
    return {name: _agreed(inputs) for name, inputs in _inputs(model, names).items()}


def inputs_have_mean(model: nn.Module) -> dict[str, HasMean]:
    """Tell of every layer that could be quantized whether its squared mean is above a twentieth of its input's power.

    Where nothing is known of a layer's input, that of a convolution is taken to have a mean (images and feature maps
    mostly do), that of any other layer not (embeddings, states and what attention gives mostly do not).
    """
    modules = dict(named_modules(model))
    found = {}
    for name, estimate in estimate_inputs(model).items():
        if estimate is None:
            convolution = isinstance(modules[name], CONVOLUTIONS)
            found[name] = HasMean(convolution, "nothing is known of its input", known=False)
            continue
        power = float(estimate.mean.square().sum())
        share = power / max(power + float(estimate.var.sum()), 1e-30)
        verb = "is guessed to have" if estimate.guessed else "has"
        found[name] = HasMean(share > MEAN_SHARE, f"its mean {verb} {share:.0%} of its input's power")
    return found


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLayer) or is_quantizable(module)


def _inputs(model: nn.Module, names: list[str]) -> dict[str, list[InputEstimate | None]]:
    """Estimate what each layer is given, call by call."""
    found: dict[str, list[InputEstimate | None]] = {name: [] for name in names}
    try:
        first_names = {id(module): name for name, module in named_modules(model)}
        for part, traces in traced_parts(model):
            root = submodule(model, part)
            for trace in traces:
                for module, estimate in _Walk(root, trace.graph).inputs:
                    name = first_names.get(id(module))
                    if name in found:
                        found[name].append(estimate)
    except Exception:  # noqa: BLE001 - an estimate of what anyone may have written
        return {name: [] for name in names}
    return found


def _agreed(inputs: list[InputEstimate | None]) -> InputEstimate | None:
    """Find what all calls of a layer have in common; exactly, as the same operations give the same samples."""
    first = inputs[0] if inputs else None
    for other in inputs[1:]:
        if first is None or other is None or first.mean.shape != other.mean.shape:
            return None
        close = torch.allclose(first.mean, other.mean, 0.05, 1e-3) and torch.allclose(first.var, other.var, 0.1, 1e-3)
        if not close:
            return None
    return first


# --- The walk ---------------------------------------------------------------------------------------------------------


class _Walk:
    """Runs a graph on channels.

    inputs: each layer that it calls, with the estimate of its input where there is one.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root = root
        self.inputs: list[tuple[nn.Module, InputEstimate | None]] = []
        self.calls: Counter[str] = Counter()
        values: dict[fx.Node, Any] = {}
        users = {node: set(node.users) for node in graph.nodes}
        for node in graph.nodes:
            args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), lambda x: _value(values, x))
            values[node] = self.run(node, args, kwargs)
            for source in node.all_input_nodes:
                users[source].discard(node)
                if not users[source]:
                    values.pop(source)

    def run(self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Compute a node; UNKNOWN whatever goes wrong, as what is run are functions meant for other tensors."""
        try:
            if node.op == "get_attr":
                owner, _, name = node.target.rpartition(".")
                return getattr(submodule(self.root, owner), name)
            if node.op == "call_module":
                rank = self.rank_of_output(node.args[0] if node.args else None)
                return self.call(submodule(self.root, node.target), args, kwargs, rank)
            if node.op == "call_method":
                return apply(node.target, getattr(Tensor, node.target, None), args, kwargs, self.seed)
            if node.op == "call_function":
                return apply(node.target.__name__, node.target, args, kwargs, self.seed)
        except Exception:  # noqa: BLE001
            pass
        return UNKNOWN

    def rank_of_output(self, node: Any) -> int | None:
        """Count the dimensions of what a layer gives to a BatchNorm1d; None for any other node."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        module = submodule(self.root, node.target)
        if isinstance(module, (nn.Linear, REPLACEMENTS[nn.Linear])):
            return 2
        return len(module.kernel_size) + 2 if isinstance(module, _ANY_CONVOLUTION) else None

    def call(self, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], rank: int | None) -> Any:
        """Run a module on its input, of so many dimensions; what a layer is given is kept."""
        plain = not has_hooks(module)
        if _is_layer(module):
            self.inputs.append((module, None))  # whatever goes wrong below, the call counts
            if plain:
                self.inputs[-1] = (module, _input_of(module, args, kwargs))
            return UNKNOWN
        if not plain or len(args) != 1 or kwargs:
            return UNKNOWN
        return _run_module(module, args[0], rank, self.seed)

    def seed(self, what: str) -> int:
        """Number a norm, alike for the same norms in any trace that were called as often."""
        self.calls[what] += 1
        return zlib.crc32(f"{what} {self.calls[what]}".encode())


def _value(values: dict[fx.Node, Any], x: Any) -> Any:
    return values.get(x, UNKNOWN) if isinstance(x, fx.Node) else x


def _input_of(layer: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> InputEstimate | None:
    """Estimate a layer's input; that of attention only where query, key and value are one."""
    if isinstance(layer, QuantizedLayer):
        names, channels = layer.input_names, layer.groups * next(iter(layer.channels.values()))
    else:
        weight = input_weight(layer)
        names, channels = replacement_of(layer).input_names, weight.in_channels
    convolution = isinstance(layer, _ANY_CONVOLUTION)
    given = kwargs | dict(zip(names, args, strict=False))
    inputs = [given[name] for name in names if name in given]
    x = inputs[0]
    if not isinstance(x, Channels) or any(other is not x for other in inputs):
        return None
    if x.on_axis(1 if convolution else -1):
        return x.estimate(channels)
    if x.axis == 1 and x.rank is None and not convolution:  # a BatchNorm1d mostly has [N, C]
        return replace(x, guessed=True).estimate(channels)
    return None


# --- Modules ----------------------------------------------------------------------------------------------------------

_ACTIVATION_MODULES = tuple(
    nn.__dict__[name]
    for names in (
        "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU ReLU ReLU6 SELU",
        "Sigmoid SiLU Softplus Softshrink Softsign Tanh Tanhshrink Threshold",
    )
    for name in names.split()
)
_PADS = (_ConstantPadNd, _ReflectionPadNd, _ReplicationPadNd)
_COPYING_MODULES = (_AvgPoolNd, _AdaptiveAvgPoolNd, nn.Upsample, *_PADS)
_MAX_MODULES = (_MaxPoolNd, _AdaptiveMaxPoolNd)


def _run_module(module: nn.Module, x: Any, rank: int | None, seed: Callable[[str], int]) -> Any:
    if isinstance(module, _BatchNorm | _InstanceNorm | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
        of_torch = type(module).forward.__module__.startswith("torch.nn.")  # others may do more: an activation, say
        return _norm(module, x, rank, seed) if of_torch else UNKNOWN
    if isinstance(module, _ACTIVATION_MODULES):
        x = x if isinstance(x, Channels) else Channels(normal(0), guessed=True)
        return replace(x, samples=type(module).forward(module, x.samples))
    if isinstance(x, Channels) and isinstance(module, nn.Flatten):
        return flatten(x, module.start_dim, module.end_dim)
    if isinstance(x, Channels) and isinstance(module, _MAX_MODULES) and not module.return_indices:
        return replace(copied(x), guessed=True)
    if isinstance(x, Channels) and isinstance(module, _COPYING_MODULES):
        return copied(x)
    return x if isinstance(module, nn.Identity | _DropoutNd) else UNKNOWN


def _norm(norm: nn.Module, x: Any, rank: int | None, seed: Callable[[str], int]) -> Any:
    """Make channels of mean beta and variance gamma^2; with running statistics, less what eps takes of it."""
    rank = rank_of(x) or (rank if isinstance(norm, _BatchNorm) else None)
    weight, bias = norm.weight, getattr(norm, "bias", None)
    if isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        if len(norm.normalized_shape) != 1:
            return UNKNOWN
        return normals(seed("last"), norm.normalized_shape[0], weight, bias, -1, rank, True)
    channels = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
    rank = next((rank for name, rank in (("2d", 4), ("3d", 5)) if name in type(norm).__name__), rank)
    y = normals(seed("first"), channels, weight, bias, 1, rank, isinstance(norm, nn.GroupNorm))
    variance = getattr(norm, "running_var", None)
    if variance is None:
        return y
    mean = 0.0 if bias is None else bias.detach().float().cpu()
    variance = variance.float().cpu()
    return replace(y, samples=mean + (y.samples - mean) * (variance / (variance + norm.eps)).sqrt())
