"""Values of a model's graph as samples of their channels, and what the operations between layers do to them.

A channel that comes out of a norm is SAMPLES values of the normal distribution that the norm gives it, in an order that
no other norm has, as if the two were independent. Whatever is computed from channels alone then runs on these values:
activations, sums and products of branches, constants. Operations that move channels move their columns. All else is
UNKNOWN, and so is what an operation makes of it, except that activations guess it to be N(0, 1).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Seed = Callable[[str], int]  # numbers norms, by what they are
SAMPLES = 1024  # of each channel: means are right to a thousandth of a standard deviation, products to a few percent


class InputEstimate(NamedTuple):
    """Mean and variance of a layer's input, over all that the model is made for: float64 [C], C all input channels.

    guessed: they are right in kind but not in size, as they follow from a norm that is not of each channel (LayerNorm,
    GroupNorm, RMSNorm), from the largest of several values, or from an activation of what is unknown.
    """

    mean: Tensor
    var: Tensor
    guessed: bool


@dataclass(frozen=True)
class Channels:
    """A tensor of the model: samples float32 [SAMPLES, C], or [SAMPLES, 1] where any channel is taken to be like that.

    axis: where its channels are, from the front, or -1; None where it does not matter. rank: its dimensions, where they
    are known. flat: each channel stands for several on that axis, one for each pixel.
    """

    samples: Tensor
    axis: int | None = None
    rank: int | None = None
    guessed: bool = False
    flat: bool = False

    def on_axis(self, axis: int) -> bool:
        """Tell whether its channels are on this axis, as far as is known."""
        if self.axis is None or axis == self.axis:
            return True
        return self.rank is not None and (axis - self.axis) % self.rank == 0

    def from_end(self) -> int | None:
        """Count its axis from the end, -1 for the last; None where that is not known."""
        if self.axis is None or self.axis < 0:
            return self.axis
        return None if self.rank is None else self.axis - self.rank

    def count(self) -> Any:
        """Count its channels; UNKNOWN where these are not all that is on their axis."""
        return UNKNOWN if self.axis is None or self.flat else self.samples.shape[1]

    def estimate(self, channels: int) -> InputEstimate | None:
        """Compute mean and variance as a layer of so many channels sees them; None where it cannot be that many."""
        x = self.samples.double()
        mean, var = x.mean(0), x.var(0, correction=0)
        repeats, rest = divmod(channels, mean.numel())
        fits = repeats == 1 or self.flat or self.axis is None
        if rest or not fits or not bool((mean + var).isfinite().all()):
            return None
        return InputEstimate(mean.repeat_interleave(repeats), var.repeat_interleave(repeats), self.guessed)


class Shape(NamedTuple):
    """The size of a tensor, of which only the number of channels is known."""

    of: Channels


UNKNOWN = object()  # anything may be there


class UnknownError(Exception):
    """Raised by an operation whose result is UNKNOWN."""


def normal(seed: int) -> Tensor:
    """Make quantiles of N(0, 1) in an order of their own, float32 [SAMPLES, 1], with mean 0 and variance 1."""
    at = (torch.arange(SAMPLES, dtype=torch.float64, device="cpu") + 0.5) / SAMPLES
    quantiles = torch.special.ndtri(at)
    order = torch.randperm(SAMPLES, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return (quantiles / quantiles.square().mean().sqrt())[order, None].float()


def normals(
    seed: int, channels: int, weight: Tensor | None, bias: Tensor | None, axis: int, rank: int | None, guessed: bool
) -> Channels:
    """Make channels of mean `bias` and standard deviation `weight`, independent of those of any other seed."""
    samples = normal(seed).expand(SAMPLES, channels)
    if weight is not None:
        samples = samples * weight.detach().float().cpu()
    if bias is not None:
        samples = samples + bias.detach().float().cpu()
    return Channels(samples.contiguous(), axis, rank, guessed)


def rank_of(x: Any) -> int | None:
    """Count the dimensions of a value, where they are known."""
    return x.rank if isinstance(x, Channels) else None


# --- Functions and methods --------------------------------------------------------------------------------------------


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ACTIVATIONS = _names(
    "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish prelu relu relu6 selu sigmoid "
    "silu softplus softshrink softsign tanh tanhshrink threshold"
)
_ELEMENTWISE = _names(
    "abs add clamp clamp_max clamp_min clip cos div divide erf exp float_power iadd imul isub itruediv maximum minimum "
    "mul multiply neg negative pow reciprocal rsqrt sin sqrt square sub subtract true_divide truediv"
)
_KEEPING = _names(
    "alpha_dropout bfloat16 contiguous cpu cuda detach double dropout dropout1d dropout2d dropout3d expand expand_as "
    "feature_alpha_dropout float half stochastic_depth to type type_as"
)
_COPYING = _names(  # what is done to their results in place does not reach their arguments
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d avg_pool2d avg_pool3d clone interpolate "
    "upsample"
)
_LARGEST = _names("adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool1d max_pool2d max_pool3d")


def apply(name: str, function: Callable, args: Sequence[Any], kwargs: dict[str, Any], seed: Seed) -> Any:
    """Run a function or method of tensors, by name, on channels; `seed` numbers the norms among them."""
    plain = name if name.startswith("_") else name.removesuffix("_")
    if name == "layer_norm":
        return _functional_layer_norm(*args, seed=seed, **kwargs)
    if plain in _ACTIVATIONS and args and args[0] is UNKNOWN:
        args = (Channels(normal(0), guessed=True), *args[1:])
    if plain in _ACTIVATIONS or plain in _ELEMENTWISE:
        return _elementwise(function, args, kwargs)
    found = [x for x in (*args, *kwargs.values()) if isinstance(x, Channels | Shape)]
    if not found and not _mentions_unknown((args, kwargs)) and function.__module__ in ("_operator", "operator", "math"):
        return function(*args, **kwargs)
    x = args[0] if args else kwargs.get("input", kwargs.get("x"))
    if plain in _MOVES:
        return _MOVES[plain](x, *args[1:], **{key: value for key, value in kwargs.items() if key not in ("input", "x")})
    if not isinstance(x, Channels) or plain not in _KEEPING | _COPYING | _LARGEST:
        return UNKNOWN
    return x if plain in _KEEPING else replace(copied(x), guessed=x.guessed or plain in _LARGEST)


def copied(x: Channels) -> Channels:
    """Copy channels to memory of their own."""
    return replace(x, samples=x.samples.clone())


def _mentions_unknown(x: Any) -> bool:
    if isinstance(x, dict):
        return _mentions_unknown(tuple(x.values()))
    return any(map(_mentions_unknown, x)) if isinstance(x, tuple | list) else x is UNKNOWN


def _elementwise(function: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an elementwise function on the samples; in place, too, as in the model."""
    found = [x for x in (*args, *kwargs.values()) if isinstance(x, Channels)]
    if _mentions_unknown((args, kwargs)):
        raise UnknownError
    if not found:
        return function(*args, **kwargs)
    first = next((x for x in found if x.axis is not None), found[0])
    for x in found:
        if x.axis is not None and (not (first.on_axis(x.axis) or x.on_axis(first.axis)) or x.flat != first.flat):
            raise UnknownError
    args = [_samples(x, first) for x in args]
    samples = function(*args, **{key: _samples(x, first) for key, x in kwargs.items()})
    ranks = {x.rank for x in found if x.axis is not None}
    rank = ranks.pop() if len(ranks) == 1 else None
    return Channels(samples, first.axis, rank, any(x.guessed for x in found), first.flat)


def _samples(x: Any, beside: Channels) -> Any:
    """Find what stands for an operand: of a parameter [C], [C, 1, 1] ... its values as a row."""
    if isinstance(x, Channels):
        return x.samples
    if not isinstance(x, Tensor):
        return x
    x = x.detach().float().cpu()
    if x.numel() == 1:
        return x.reshape(())
    end = next(i for i in range(-1, -1 - x.dim(), -1) if x.shape[i] != 1)
    there = beside.from_end() == end or (beside.axis == 1 and beside.rank is None and end < -1)
    if x.numel() != x.shape[end] or not there or beside.flat:
        raise UnknownError
    return x.reshape(1, -1)


def _functional_layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *, seed: Seed
) -> Any:
    if len(normalized_shape) != 1 or _mentions_unknown((weight, bias, normalized_shape)):
        raise UnknownError
    return normals(seed("last"), int(normalized_shape[0]), weight, bias, -1, rank_of(input), True)


# --- What moves channels ----------------------------------------------------------------------------------------------


def _together(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Unpack arguments that were given as one tuple or list."""
    return tuple(values[0]) if len(values) == 1 and isinstance(values[0], tuple | list) else values


def _dims(*dims: Any) -> tuple[int, ...]:
    """Check dimensions that were given one by one, or together."""
    dims = _together(dims)
    if not all(type(dim) is int for dim in dims):
        raise UnknownError
    return dims


def flatten(x: Channels, start_dim: int = 0, end_dim: int = -1) -> Any:
    """Put the pixels in one dimension, alone or with the channels."""
    if x.axis is None:
        return x
    if x.axis == 1 and start_dim == 1 and end_dim == -1:
        return replace(x, rank=2, flat=x.rank != 2)
    if x.axis == 1 and start_dim == 2 and end_dim == -1:
        return replace(x, rank=3)
    raise UnknownError


def _view(x: Channels, *sizes: Any) -> Any:
    sizes = _together(sizes)
    if x.axis is None:
        return x
    pixels = x.rank is not None and x.rank != 3  # of [N, C, L] it may put together what comes one after the other
    if x.axis == 1 and len(sizes) == 2 and (sizes[1] == -1 or (sizes[0] == -1 and type(sizes[1]) is int and pixels)):
        return flatten(x, 1)
    if x.axis == 1 and len(sizes) > 2 and type(sizes[1]) is int and sizes[1] == x.count():
        return replace(x, rank=len(sizes))
    if x.from_end() == -1 and type(sizes[-1]) is int and sizes[-1] == x.count():
        return replace(x, axis=-1, rank=len(sizes))
    raise UnknownError


def _permute(x: Channels, *dims: Any) -> Any:
    dims = _dims(*dims)
    if x.axis is None:
        return x
    dims = [dim % len(dims) for dim in dims]
    return replace(x, axis=dims.index(x.axis % len(dims)), rank=len(dims))


def _transpose(x: Channels, first: int, second: int) -> Any:
    if x.axis is None:
        return x
    at = x.axis
    if x.rank is not None:
        at, first, second = (dim % x.rank for dim in (at, first, second))
    elif not all((dim < 0) == (at < 0) for dim in (first, second)):
        raise UnknownError
    return replace(x, axis={first: second, second: first}.get(at, at))


def _reduce(x: Channels, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
    """Take away dimensions other than that of the channels; a view."""
    dims = _dims(dim)
    if x.axis is None:
        return x
    if any(x.on_axis(dim) for dim in dims):
        raise UnknownError
    if keepdim:
        return x
    if x.rank is not None:
        at = x.axis % x.rank
        before = sum(dim % x.rank < at for dim in dims)
        return replace(x, axis=at - before, rank=x.rank - len(dims))
    if x.axis >= 0 and any(0 <= dim < x.axis or dim < 0 for dim in dims):
        raise UnknownError
    return x


def _mean(x: Channels, *args: Any, **kwargs: Any) -> Any:
    return copied(_reduce(x, *args, **kwargs))


def _reduce_to_largest(x: Channels, dim: Any = None, keepdim: bool = False) -> Any:
    return replace(_mean(x, dim, keepdim), guessed=True)


def _unsqueeze(x: Channels, dim: int) -> Any:
    if x.axis is None:
        return x
    if x.axis >= 0 and (dim > x.axis or (dim < 0 and x.rank is not None and dim + 1 + x.rank > x.axis)):
        return replace(x, rank=None if x.rank is None else x.rank + 1)
    raise UnknownError


def _size(x: Channels, dim: int | None = None) -> Any:
    if dim is None:
        return Shape(x)
    return x.count() if x.on_axis(dim) else UNKNOWN


def _getattr(x: Channels, name: str) -> Any:
    return Shape(x) if name == "shape" and isinstance(x, Channels) else UNKNOWN


def _getitem(x: Any, index: Any) -> Any:
    if isinstance(x, Shape):
        return _size(x.of, index)
    if not isinstance(x, Channels):
        return UNKNOWN if x is UNKNOWN else x[index]
    index = index if isinstance(index, tuple) else (index,)
    if x.axis is None:
        return x
    kinds = [type(each) for each in index]
    if not set(kinds) <= {slice, int}:
        raise UnknownError
    rank = None if x.rank is None else x.rank - kinds.count(int)
    if x.axis < 0:
        most = 1 if x.rank == 2 else 2
        if len(index) > most:  # they might reach the last dimension
            raise UnknownError
        return replace(x, rank=rank)
    own = index[x.axis] if len(index) > x.axis else slice(None)
    if not isinstance(own, slice) or x.flat:
        raise UnknownError
    before = kinds[: x.axis].count(int)
    return replace(x, samples=x.samples[:, own], axis=x.axis - before, rank=rank)


def _cat(tensors: Sequence[Any], dim: int = 0, axis: int | None = None) -> Any:
    dim = dim if axis is None else axis
    if not all(isinstance(x, Channels) for x in tensors):
        raise UnknownError
    unlike = next((x for x in tensors if x.axis is None), None)
    if unlike is not None:
        return unlike
    first = tensors[0]
    if any(x.flat or not x.on_axis(dim) for x in tensors):
        raise UnknownError
    return replace(first, samples=torch.cat([x.samples for x in tensors], 1), guessed=any(x.guessed for x in tensors))


def _chunk(x: Channels, chunks: int, dim: int = 0) -> Any:
    if x.axis is None or not x.on_axis(dim):
        return (x,) * chunks
    return tuple(replace(x, samples=part) for part in x.samples.chunk(chunks, 1))


def _split(x: Channels, split_size_or_sections: Any, dim: int = 0) -> Any:
    if not x.on_axis(dim) or x.flat:
        raise UnknownError
    if x.axis is None:
        return (x,) * len(split_size_or_sections)
    return tuple(replace(x, samples=part) for part in x.samples.split(split_size_or_sections, 1))


def _pad(x: Channels, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    """Add channels of that value; around the pixels a value changes little."""
    if x.axis is None:
        return x
    end = x.from_end()
    if end is None:
        raise UnknownError
    at = 2 * (-1 - end)  # in `pad`, whose first pair is the last dimension's
    before, after = pad[at : at + 2] if len(pad) > at + 1 else (0, 0)
    if (before, after) == (0, 0):
        return x
    if mode != "constant" or x.flat:
        raise UnknownError
    return replace(x, samples=F.pad(x.samples, (before, after), value=value or 0.0))


_MOVES: dict[str, Callable[..., Any]] = {
    "amax": _reduce_to_largest,
    "cat": _cat,
    "chunk": _chunk,
    "concat": _cat,
    "flatten": flatten,
    "getattr": _getattr,
    "getitem": _getitem,
    "mean": _mean,
    "pad": _pad,
    "permute": _permute,
    "reshape": _view,
    "size": _size,
    "split": _split,
    "squeeze": _reduce,
    "transpose": _transpose,
    "unsqueeze": _unsqueeze,
    "view": _view,
}
