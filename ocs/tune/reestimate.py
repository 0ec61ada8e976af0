"""BatchNorm statistics measured again, without the training data.

Quantized weights give other means and variances than the float ones; a BatchNorm that expects the new ones takes most
of that back, at no cost. Its statistics are measured on a few inputs without labels, and where there are none on inputs
that ocs.synthesize makes.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ocs.calibration.ranks import reduced
from ocs.calibration.run import Data, Watch, observe
from ocs.model.batchnorm_folding import FoldedBatchNorm
from ocs.model.references import Place
from ocs.model.rewrite import Slot, exchange, for_a_while, keeps_grad_mode
from ocs.model.wrappers import named_modules, unwrapped

STATISTICS = ("running_mean", "running_var")
STILL = 1e-3  # of a channel's running variance: what varies less on the data tells nothing of its scale


class MeanAndVariance(NamedTuple):
    """Mean and variance of the input of a BatchNorm, float64 [C] each."""

    mean: Tensor
    variance: Tensor


class NormStatistics:
    """Mean and variance of all that a BatchNorm is given; on the way, each batch is normalized by its own.

    Later norms so see what they would see if this one's statistics were right already.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm = norm
        self.count = 0  # values of each channel
        self.mean = torch.zeros(norm.num_features, dtype=torch.float64, device="cpu")
        self.squares = torch.zeros(
            norm.num_features, dtype=torch.float64, device="cpu"
        )  # of what is left without the mean, summed

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
        _set_statistics(self.norm, mean, variance)

    def merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        """Take in so many values of each channel."""
        if not count:
            return
        total, away = self.count + count, mean - self.mean
        self.squares = self.squares + squares + away.square() * (self.count * count / total)
        self.mean, self.count = self.mean + away * (count / total), total

    def estimate(self) -> MeanAndVariance:
        """Compute mean and variance of what was seen."""
        return MeanAndVariance(self.mean, self.squares / self.count)

    def reduce(self) -> None:
        """Merge what all ranks have seen, so that each has the same."""
        count = int(reduced(torch.tensor(self.count, device="cpu"), dist.ReduceOp.SUM))
        mean = reduced(self.mean * self.count, dist.ReduceOp.SUM) / max(count, 1)
        self.squares = reduced(self.squares + self.count * (self.mean - mean).square(), dist.ReduceOp.SUM)
        self.count, self.mean = count, mean


@keeps_grad_mode
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
        data: batches, (batch, target) pairs of which the target is not used, dicts of arguments by name, or a callable
            that runs the model on what it likes: data(model); see ocs.calibrate.
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
    model, reference = unwrapped(model), unwrapped(reference)
    norms = running_norms(model)
    of_reference = {} if reference is None else _norms_of_reference(reference, model, norms, data)
    measured = _measure(model, norms, data, progress)
    if reference is not None:
        expected = _measure(reference, of_reference, data, progress)
        measured = {
            name: _relative(of_reference[name], measured[name], expected[name]) for name in measured if name in expected
        }
    _write(norms, measured)


def _write(norms: Mapping[str, _BatchNorm], measured: Mapping[str, MeanAndVariance]) -> None:
    """Set the running statistics of these norms, all or none: what its dtype cannot hold is a ValueError."""
    cast = {}
    for name, found in measured.items():
        cast[name] = [each.to(norms[name].running_var) for each in found]
        if not all(bool(each.isfinite().all()) for each in cast[name]):
            dtype = norms[name].running_var.dtype
            raise ValueError(f"{name}: what it is given is too large for its statistics in {dtype}: use float32")
    tensors = [
        (norms[name], each, new) for name, found in cast.items() for each, new in zip(STATISTICS, found, strict=True)
    ]
    made_anew = [part for part in tensors if part[0]._buffers[part[1]].is_inference()]  # not to be written to
    values = [(norm._buffers[each], new) for norm, each, new in tensors if not norm._buffers[each].is_inference()]
    with torch.no_grad():
        exchange([Slot(Place(norm._buffers, each), new) for norm, each, new in made_anew], values)


def _norms_of_reference(
    reference: nn.Module, model: nn.Module, norms: Mapping[str, _BatchNorm], data: Data
) -> dict[str, _BatchNorm]:
    """Find the norms of the float model, which must be those of the quantized one, and data that can be run twice."""
    found = running_norms(reference)
    sizes, own_sizes = ({name: norm.num_features for name, norm in each.items()} for each in (found, norms))
    if sizes != own_sizes:
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
) -> dict[str, MeanAndVariance]:
    """Measure what each norm is given, where it is given something; its own statistics are as they were afterwards."""
    watches = [Watch(name, norm, NormStatistics(norm)) for name, norm in norms.items()]
    places = [Place(norm._buffers, each) for norm in norms.values() for each in STATISTICS]
    copies = [Slot(place, place.where[place.key].clone()) for place in places]  # that are written to for each batch
    run = partial(observe, model, data, watches, progress, what="data")
    for_a_while([copy.step() for copy in copies], run)
    reached = {watch.name: watch.observer.estimate() for watch in watches if watch.observer.count}
    if not reached:
        raise ValueError(f"no batch reached the norms {', '.join([*norms][:3])} ...: does data run the model?")
    return reached


def _relative(norm: _BatchNorm, found: MeanAndVariance, expected: MeanAndVariance) -> MeanAndVariance:
    """Change a norm's running statistics as those found differ from those expected; where both say something."""
    mean, variance = norm.running_mean.cpu().double(), norm.running_var.cpu().double()
    varies = torch.minimum(found.variance, expected.variance) > STILL * variance
    gain = variance / expected.variance.where(varies, 1.0)
    moved = mean + (found.mean - expected.mean) * gain.sqrt()
    return MeanAndVariance(moved.where(varies, mean), (found.variance * gain).where(varies, variance))


def _set_statistics(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Write a norm's running statistics, in place."""
    with torch.no_grad():
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


def running_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Find the BatchNorms that normalize by running statistics, by name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    norms = {name: module for name, module in named_modules(model) if isinstance(module, _BatchNorm)}
    kept = {name: norm for name, norm in norms.items() if norm.running_mean is not None}
    for name, norm in kept.items():
        if nn.parameter.is_lazy(norm.running_mean) or norm.running_mean.is_meta:
            raise ValueError(f"{name}: it holds no values yet: run a batch through lazy layers, fill meta tensors")
    if kept:
        return kept
    if any(isinstance(module, FoldedBatchNorm) for module in model.modules()):
        raise ValueError("the model's BatchNorms are folded into its layers: quantize with fold_bn=False")
    raise ValueError(f"{type(model).__name__} has no BatchNorm with running statistics")
