"""BatchNorm without its training data: statistics measured again, or inputs made that have those of the float model.

Quantized weights give other means and variances than the float ones; a BatchNorm that expects the new ones takes most
of that back, at no cost. Its statistics are measured on a few inputs without labels, and where there are none on inputs
synthesized to have the float model's statistics (ZeroQ: Cai et al. 2020, arXiv 2001.00281, section 3.1).
"""

from __future__ import annotations

import copy
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Integral
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ocs.calibration.ranks import reduced
from ocs.calibration.run import Data, observe
from ocs.model.batchnorm_folding import FoldedBatchNorm
from ocs.nn.base import QuantizedLayer
from ocs.progress import with_progress

# --- Statistics -------------------------------------------------------------------------------------------------------


class NormStatistics:
    """Mean and variance of all that a BatchNorm is given; on the way, each batch is normalized by its own.

    Later norms so see what they would see if this one's statistics were right already.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm = norm
        self.count = 0  # values of each channel
        self.mean = torch.zeros(norm.num_features, dtype=torch.float64)
        self.squares = torch.zeros(norm.num_features, dtype=torch.float64)  # of what is left without the mean, summed

    def observe(self, _: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Take in one more batch [N, C, ...]."""
        x = next(iter(arguments.values()))
        if not x.numel():
            return
        rows = x.detach().movedim(1, 0).flatten(1).cpu().double()
        if rows.shape[1] < 2:
            raise ValueError(
                "a batch gave it one value of each channel: give batches of 32 or more, drop a short last one"
            )
        mean, variance = rows.mean(1), rows.var(1, correction=0)
        if not bool((mean + variance).isfinite().all()):
            raise ValueError("its input holds NaN or Inf: repair model or batch")
        self.merge(rows.shape[1], mean, variance * rows.shape[1])
        self.norm.running_mean.copy_(mean)
        self.norm.running_var.copy_(variance)

    def merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        """Take in so many values of each channel."""
        if not count:
            return
        total, away = self.count + count, mean - self.mean
        self.squares = self.squares + squares + away.square() * (self.count * count / total)
        self.mean, self.count = self.mean + away * (count / total), total

    def reduce(self) -> None:
        """Merge what all ranks have seen, so that each has the same."""
        count = int(reduced(torch.tensor(self.count), dist.ReduceOp.SUM))
        mean = reduced(self.mean * self.count, dist.ReduceOp.SUM) / max(count, 1)
        self.squares = reduced(self.squares + self.count * (self.mean - mean).square(), dist.ReduceOp.SUM)
        self.count, self.mean = count, mean


def reestimate_batchnorm(
    model: nn.Module, data: Data, *, reference: nn.Module | None = None, progress: bool | None = None
) -> None:
    """Measure the running statistics of every BatchNorm again, in place: after ocs.quantize, on a few hundred inputs.

    One pass, in eval mode but for the norms, which normalize each batch by its own statistics; what they keep are mean
    and variance over all batches together. Give batches of 32 or more. Where torch.distributed is initialized, each
    rank gives its own batches, and all get the statistics of all. Norms that no batch reaches stay as they are, and so
    do momentum and num_batches_tracked.

    Args:
        model: quantized or float, with BatchNorms: without fold_bn.
        data: batches, (batch, target) pairs of which the target is not used, dicts of keyword arguments, or a callable
            that runs the model on what it likes: data(model).
        reference: the float model that `model` was made from, of the same architecture. Its running statistics then
            count as right, and change only as those of `data` differ between the two models: so that data need not
            be like what the model is for, from ocs.synthesize, say. Channels that hardly vary on the data keep theirs.
            It is run on the same data, which must give it twice: a list, no iterator; and it is as it was afterwards.
        progress: show a bar; by default where it takes over two seconds, a terminal looks on and tqdm is installed.

    Raises:
        TypeError: a model is no nn.Module, or data is one batch of a kind that should be in a list.
        ValueError: it has no BatchNorm with running statistics, there is no batch or none reaches one, a batch has one
            value for each channel of a norm, a norm's input holds NaN or Inf or its variance is beyond its dtype, or
            the reference has other norms, or data is an iterator beside it. The model is then as it was.
    """
    norms = _norms(model)
    of_reference = {} if reference is None else _norms_of_reference(reference, model, norms, data)
    measured = _measure(model, norms, data, progress)
    if reference is not None:
        expected = _measure(reference, of_reference, data, progress)
        measured = {
            name: _relative(of_reference[name], found, expected[name])
            for name, found in measured.items()
            if name in expected
        }
    cast = {name: [each.to(norms[name].running_var) for each in found] for name, found in measured.items()}
    for name, found in cast.items():
        if not all(bool(each.isfinite().all()) for each in found):
            raise ValueError(
                f"{name}: what it is given is too large for its statistics in {found[0].dtype}: use float32"
            )
    with torch.no_grad():
        for name, (mean, variance) in cast.items():
            norms[name].running_mean.copy_(mean)
            norms[name].running_var.copy_(variance)


Moments = tuple[Tensor, Tensor]  # mean and variance
STILL = 1e-3  # of a channel's running variance: what varies less on the data tells nothing of its scale


def _norms_of_reference(
    reference: nn.Module, model: nn.Module, norms: Mapping[str, _BatchNorm], data: Data
) -> dict[str, _BatchNorm]:
    """Those of the float model, which are the quantized one's."""
    found = _norms(reference)
    if {name: norm.num_features for name, norm in norms.items()} != {
        name: norm.num_features for name, norm in found.items()
    }:
        if any(isinstance(module, FoldedBatchNorm) for module in model.modules()):
            raise ValueError("some of the model's BatchNorms are folded into its layers: quantize with fold_bn=False")
        raise ValueError("reference has other BatchNorms than model: give the float model that it was made from")
    if isinstance(data, Iterator):
        raise ValueError(
            "data is an iterator, which gives its batches once, and reference= needs them twice: make a list"
        )
    return found


def _measure(
    model: nn.Module, norms: Mapping[str, _BatchNorm], data: Data, progress: bool | None
) -> dict[str, Moments]:
    """What each norm is given; its statistics are as they were afterwards."""
    for norm in norms.values():
        if norm.running_mean.is_inference():  # made in inference mode, and perhaps not to be written to outside of it
            norm.running_mean, norm.running_var = norm.running_mean.clone(), norm.running_var.clone()
    before = [(norm, norm.running_mean.clone(), norm.running_var.clone()) for norm in norms.values()]
    watched = {name: (norm, NormStatistics(norm)) for name, norm in norms.items()}
    try:
        observe(model, data, watched, progress, what="data")
    finally:
        with torch.no_grad():
            for norm, mean, variance in before:
                norm.running_mean.copy_(mean)
                norm.running_var.copy_(variance)
    found = {name: each for name, (_, each) in watched.items() if each.count}
    if not found:
        raise ValueError(f"no batch reached the norms {', '.join([*norms][:3])} ...: does data run the model?")
    return {name: (each.mean, each.squares / each.count) for name, each in found.items()}


def _relative(norm: _BatchNorm, found: Moments, expected: Moments) -> Moments:
    """A norm's running statistics, changed as those found differ from those expected; where both say something."""
    mean, variance = norm.running_mean.cpu().double(), norm.running_var.cpu().double()
    varies = torch.minimum(found[1], expected[1]) > STILL * variance
    gain = variance / expected[1].where(varies, 1.0)
    changed = mean + (found[0] - expected[0]) * gain.sqrt(), found[1] * gain
    return changed[0].where(varies, mean), changed[1].where(varies, variance)


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorms that normalize by running statistics, by name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    kept = {name: norm for name, norm in norms.items() if norm.running_mean is not None}
    for name, norm in kept.items():
        if nn.parameter.is_lazy(norm.running_mean) or norm.running_mean.is_meta:
            raise ValueError(f"{name}: it holds no values yet: run a batch through lazy layers, fill meta tensors")
    if kept:
        return kept
    if any(isinstance(module, FoldedBatchNorm) for module in model.modules()):
        raise ValueError("the model's BatchNorms are folded into its layers: quantize with fold_bn=False")
    raise ValueError(f"{type(model).__name__} has no BatchNorm with running statistics")


# --- Inputs -----------------------------------------------------------------------------------------------------------

RATE = 0.1  # of Adam, for inputs of unit variance


def synthesize(
    model: nn.Module,
    shape: Sequence[int],
    *,
    images: int = 256,
    steps: int = 30,
    batch: int = 64,
    seed: int = 0,
    progress: bool | None = None,
) -> list[Tensor]:
    """Inputs with which the float model's BatchNorms see what their running statistics say; needs no data (ZeroQ).

    Adam moves smooth noise so that, batch by batch, mean and standard deviation before every BatchNorm are matched, and
    0 and 1 of the inputs themselves: in units of the running standard deviation, each norm with the same weight. They
    are no images, but serve ocs.reestimate_batchnorm with reference=, and calibration= where rounding="gptq".

    Args:
        model: a float model for inputs of mean 0 and variance 1 in each channel; it is not changed.
        shape: of one input, (C, H, W).
        images: how many.
        steps: of Adam, for each batch.
        batch: inputs that are optimized together.
        seed: the same gives the same inputs, on one machine; 0 to 2^63 - 1.
        progress: show a bar; by default where it takes over two seconds, a terminal looks on and tqdm is installed.

    Returns:
        Batches [N, *shape] of the dtype and on the device of the model's first parameter, N = `batch` but perhaps for
        the last. They are found in float32, whatever the model's dtype.

    Raises:
        TypeError: model is no nn.Module, shape no sequence or seed no whole number.
        ValueError: it has no BatchNorm with running statistics or none that inputs of this shape reach, it is
            quantized, a number is no whole one from 1 on, seed is out of range, or the loss is not finite.
        RuntimeError: what the model raises for inputs of this shape, with a note that says so.
    """
    _norms(model)
    if any(isinstance(module, QuantizedLayer) for module in model.modules()):
        raise ValueError("model is quantized: inputs are made for the float model's statistics, give that")
    if not isinstance(shape, Sequence) or not shape:
        raise TypeError(f"shape={reprlib.repr(shape)}: use that of one input, (C, H, W) say")
    if not isinstance(seed, Integral):
        raise TypeError(f"seed={seed!r}: use a whole number")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r}: use 0 to 2^63 - 1")
    numbers = {"images": images, "steps": steps, "batch": batch, **{f"shape[{i}]": n for i, n in enumerate(shape)}}
    for name, value in numbers.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: use a whole number from 1 on")
    with torch.inference_mode(False):
        frozen = copy.deepcopy(model).requires_grad_(False).float()
        for module in frozen.modules():
            module.training = False
        like = next(
            (p for p in model.parameters() if p.is_floating_point()), next(iter(_norms(model).values())).running_mean
        )
        noise = _smooth_noise(images, shape, torch.Generator().manual_seed(int(seed))).to(like.device)
        parts = with_progress(noise.split(batch), "synthesize", progress, "batch")
        return [_matched(frozen, part, steps).to(like.dtype) for part in parts]


def _smooth_noise(images: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """[images, *shape] of mean 0 and variance 1: noise of every octave, the coarser the stronger, as images have it."""
    spatial, x = shape[1:], torch.randn(images, *shape, generator=generator)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}.get(len(spatial))
    if mode is None:
        return x
    x, size = x / math.sqrt(min(spatial)), 2
    while size < min(spatial):
        coarse = torch.randn(images, shape[0], *[size] * len(spatial), generator=generator)
        x += nn.functional.interpolate(coarse, tuple(spatial), mode=mode) / math.sqrt(size)
        size *= 2
    return (x - x.mean()) / x.std()


def _matched(model: nn.Module, x: Tensor, steps: int) -> Tensor:
    """A batch, from noise."""
    x = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad(), _losses(model) as losses:
        for _ in range(steps):
            losses.clear()
            try:
                model(x)
            except Exception as error:
                error.add_note(f"while synthesizing inputs: is shape={tuple(x.shape[1:])} that of one input?")
                raise
            if not losses:
                raise ValueError(f"inputs {list(x.shape)} reach no BatchNorm of the model")
            loss = sum(losses) / len(losses) + _distance(x, 0.0, 1.0)
            if not bool(loss.isfinite()):
                raise ValueError("inputs that match the BatchNorms' statistics cannot be found: the loss is not finite")
            (x.grad,) = torch.autograd.grad(loss, x)
            optimizer.step()
            schedule.step()
    return x.detach()


@contextmanager
def _losses(model: nn.Module) -> Iterator[list[Tensor]]:
    """How far the input of each BatchNorm is from its statistics, in the order of calls."""
    losses: list[Tensor] = []

    def take(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(iter((*args, *kwargs.values())))
        losses.append(_distance(x, norm.running_mean, (norm.running_var + norm.eps).sqrt()))

    with ExitStack() as hooks:
        for norm in _norms(model).values():
            hooks.callback(norm.register_forward_pre_hook(take, with_kwargs=True).remove)
        yield losses


def _distance(x: Tensor, mean: Tensor | float, deviation: Tensor | float) -> Tensor:
    """Squared differences of mean and standard deviation by channel, in units of that deviation; their average."""
    dims = [0, *range(2, x.dim())]
    found = x.var(dims, correction=0).clamp(min=1e-12).sqrt()
    return (((x.mean(dims) - mean) / deviation).square() + ((found - deviation) / deviation).square()).mean()
