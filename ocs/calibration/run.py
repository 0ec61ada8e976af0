"""Calibration: run batches through the float model, and keep of each layer's input what thresholds and splits need.

What is kept does not grow with the number of batches: a histogram of |x|, the largest and smallest value, the sum of
each channel, and where channels shall be split a logarithmic histogram of each. Limits are powers of two, so that a
histogram over a larger one has the counts of the smaller one added up: statistics merge exactly, over batches as over
the ranks of a torch.distributed group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from inspect import signature
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ocs.calibration.gram import LayerMoments
from ocs.calibration.ranks import reduced, several_ranks
from ocs.errors import error_context
from ocs.kernels.constants import OCTAVE_BINS, OCTAVES, TINY
from ocs.model.targets import Target, check_model, check_values, find_targets
from ocs.nn.convolution import CONVOLUTIONS
from ocs.nn.input import as_rows
from ocs.nn.registry import replacement_of
from ocs.nn.weights import check_values as check_weight_values
from ocs.nn.weights import input_weight
from ocs.progress import with_progress
from ocs.weight.threshold import Clip, count_zeros

BINS = 4096  # of |x| below the limit, besides OCTAVE_BINS of each channel, eight to the octave
ROWS = 4096  # whose sum float32 still holds well
PERCENTILE = 0.99  # a channel is split for its values beyond this share of the layer's (section 5.3 of the paper)

Data = Iterable[Any] | Callable[[nn.Module], Any]


class Observer(Protocol):
    """What is kept of the inputs of a module."""

    def observe(self, layer: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Take in one call of the module with these arguments by name."""

    def reduce(self) -> None:
        """Merge what all ranks have seen."""


class Statistics:
    """Of the inputs of one layer, whose channels are on axis `axis`.

    channels: their number, where they may be split; None keeps no histogram for each of them.
    """

    def __init__(self, axis: int, channels: int | None = None) -> None:
        self.axis, self.channels = axis, channels
        self.inputs = 0  # tensors seen
        self.rows = 0  # values of each channel seen
        self.sums = torch.zeros(0, dtype=torch.float64)  # of each channel, once there is one
        self.zeros = 0
        self.largest, self.smallest = 0.0, math.inf  # max |x|, min x
        self.limit = 0.0  # a power of two above every |x|, or 0 as long as there are only zeros
        self.counts = torch.zeros(BINS, dtype=torch.int64)  # of |x| over [0, limit], zeros left out
        self.octaves = torch.zeros(channels or 0, OCTAVE_BINS, dtype=torch.int64)
        self.channel_max = torch.zeros(channels or 0)

    # --- Growing

    def observe(self, layer: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Take in one call of the layer with these arguments by name, each tensor once."""
        inputs = [_tensor_of(arguments[name]) for name in replacement_of(layer).input_names if name in arguments]
        for x in {id(x): x for x in inputs if isinstance(x, Tensor)}.values():
            self.update(x)

    def update(self, x: Tensor) -> None:
        """Take in one more input."""
        if not x.is_floating_point() or x.is_nested or not x.numel():
            return
        if x.is_meta:
            raise ValueError("its input holds no values: give a model on the meta device weights first")
        if self.channels not in (None, x.shape[self.axis]):
            raise ValueError(f"its input has {x.shape[self.axis]} channels, it needs {self.channels}")
        rows = as_rows(x.detach(), self.axis)
        smallest, most = (float(bound) for bound in rows.aminmax())
        largest = max(abs(smallest), abs(most))
        if not largest < 2.0**127:  # NaN, too
            raise ValueError("its input holds NaN, Inf or values that float32 hardly holds: repair model or batch")
        largest = largest if largest >= TINY else 0.0
        self.inputs += 1
        self._add(rows.shape[0] * rows.shape[2], _channel_sums(rows))
        self.smallest, self.largest = min(self.smallest, smallest), max(self.largest, largest)
        self._grow(largest)
        zeros = count_zeros(rows) if largest else rows.numel()
        self.zeros += zeros
        if not largest:
            lowest = torch.zeros_like(self.octaves)
            lowest[:, 0] = rows.numel() // rows.shape[1]
            self.octaves = self.octaves + lowest
            return
        counts = torch.ops.ocs.histogram(rows, BINS, self.limit).cpu()
        counts[0] -= zeros
        self.counts = self.counts + counts  # not in place: they may be of inference mode
        if self.channels is not None:
            self.octaves = self.octaves + torch.ops.ocs.octave_histogram(rows, self.limit).cpu()
            self.channel_max = self.channel_max.maximum(torch.ops.ocs.channel_max(rows, 1).cpu())

    def _add(self, rows: int, sums: Tensor) -> None:
        """Take in the sums of so many values of each channel; of inputs that differ in size there is no mean."""
        if not rows:
            return
        alike = not self.rows or self.sums.shape == sums.shape
        self.sums = (self.sums + sums if self.rows else sums) if alike else self.sums.new_empty(0)
        self.rows += rows

    def _grow(self, largest: float) -> None:
        """Raise the limit to a power of two above `largest`."""
        limit = math.ldexp(1.0, math.frexp(largest)[1]) if largest else 0.0
        if limit <= self.limit:
            return
        doublings = round(math.log2(limit / self.limit)) if self.limit else 0
        if doublings:
            merged = 2 ** min(doublings, int(math.log2(BINS)))
            self.counts = nn.functional.pad(self.counts.view(-1, merged).sum(1), (0, BINS - BINS // merged))
            down = min(8 * doublings, OCTAVE_BINS - 1)
            lowest = self.octaves[:, : down + 1].sum(1, keepdim=True)
            self.octaves = nn.functional.pad(torch.cat([lowest, self.octaves[:, down + 1 :]], 1), (0, down))
        self.limit = limit

    def merge(self, other: Statistics) -> None:
        """Take in what another has seen of the same layer."""
        self._grow(other.largest)
        other._grow(self.largest)
        self.smallest, self.largest = min(self.smallest, other.smallest), max(self.largest, other.largest)
        self.inputs, self.zeros = self.inputs + other.inputs, self.zeros + other.zeros
        self.counts, self.octaves = self.counts + other.counts, self.octaves + other.octaves
        self.channel_max = self.channel_max.maximum(other.channel_max)
        self._add(other.rows, other.sums)

    def reduce(self) -> None:
        """Merge what all ranks have seen, so that each has the same."""
        bounds = reduced(torch.tensor([self.largest, -self.smallest], dtype=torch.float64), dist.ReduceOp.MAX)
        self.largest, self.smallest = bounds[0].item(), -bounds[1].item()
        self._grow(self.largest)
        sums = reduced(torch.tensor([self.inputs, self.zeros]), dist.ReduceOp.SUM)
        self.inputs, self.zeros = sums.tolist()
        self._reduce_sums()
        self.counts = reduced(self.counts, dist.ReduceOp.SUM)
        if self.channels:
            self.octaves = reduced(self.octaves, dist.ReduceOp.SUM)
            self.channel_max = reduced(self.channel_max, dist.ReduceOp.MAX)

    def _reduce_sums(self) -> None:
        """Ranks that have seen nothing have no sums, and do not know their number."""
        seen = self.rows > 0
        sizes = torch.tensor([self.sums.numel(), -self.sums.numel() if seen else -(2**62)])
        most, least = reduced(sizes, dist.ReduceOp.MAX).tolist()
        self.rows = int(reduced(torch.tensor(self.rows), dist.ReduceOp.SUM))
        sums = self.sums if seen else self.sums.new_zeros(most)
        self.sums = reduced(sums, dist.ReduceOp.SUM) if most == -least and most else self.sums.new_zeros(0)

    # --- What follows from them

    def mean(self) -> Tensor | None:
        """float64 [C] of each channel; None where there is none, or inputs differ in size."""
        return self.sums / self.rows if self.sums.numel() else None

    def threshold(self, bits: int, method: str | float, signed: bool, split: Tensor | None = None) -> float:
        """Where the inputs are clipped, by functional.clip_threshold's methods; at most max|x|.

        split: the channels (int64, distinct) whose values are halved first.
        """
        largest = self.largest if split is None else float(self._split_max(split))
        clip = Clip(method, bits, signed)
        if not clip.searches or not largest:
            return largest if not largest else float(clip.threshold(largest))
        counts = self.counts
        if split is not None and split.numel():
            counts = self.split_counts(split)
        return min(float(clip.threshold(torch.tensor(self.limit), counts)), largest)

    def _split_max(self, split: Tensor) -> Tensor:
        halved = torch.ones_like(self.channel_max).index_fill(0, split, 0.5)
        return (self.channel_max * halved).amax()

    def split_counts(self, split: Tensor) -> Tensor:
        """The counts once the values of these channels are halved and there twice.

        In each eighth of an octave they are taken to be spread as all values are.
        """
        centers = (torch.arange(BINS) + 0.5) / BINS
        eighth = (8 * (OCTAVES + centers.log2().floor()) + 8 * (centers / 2 ** centers.log2().floor() - 1)).long()
        share = self.octaves[split].sum(0) / self.octaves.sum(0).clamp(min=1)
        split = nn.functional.pad((self.counts * share[eighth.clamp(min=0)]).cumsum(0), (1, 0)).round().diff().long()
        halved = nn.functional.pad(split.view(-1, 2).sum(1), (0, BINS // 2))
        return (self.counts - split).clamp(min=0) + 2 * halved

    def most_outliers(self, splits: int, groups: int = 1) -> Tensor:
        """int64 [groups, splits]: the channels of each group with most outliers, the lowest first where they tie."""
        own = torch.arange(self.channels).view(groups, -1)
        order = self.outliers().view(groups, -1).argsort(dim=1, descending=True, stable=True)
        return order[:, :splits] + own[:, :1]

    def outliers(self) -> Tensor:
        """float64 [channels]: how many |x| of each channel are beyond the layer's 99th percentile."""
        in_all = self.octaves.sum(0).double()
        beyond = in_all.flip(0).cumsum(0).flip(0)
        wanted = (1 - PERCENTILE) * beyond[0]
        at = int((beyond > wanted).sum()) - 1  # the percentile is in this bin, so many of which are beyond it:
        share = (wanted - (beyond[at] - in_all[at])) / in_all[at] if at >= 0 and in_all[at] else 0.0
        of_channel = self.octaves.double()
        return of_channel[:, at + 1 :].sum(1) + share * of_channel[:, max(at, 0)]


def _channel_sums(rows: Tensor) -> Tensor:
    """float64 [C] of [N, C, K]; in float32 parts first, which is fast in any layout and on devices without float64."""
    if rows.shape[2] == 1:
        sums = torch.stack([part.sum(0, dtype=torch.float32) for part in rows[:, :, 0].split(ROWS)])
    else:
        sums = rows.sum(2, dtype=torch.float32)
    return sums.sum(0, dtype=torch.float64 if rows.is_cpu else torch.float32).cpu().double()


# --- Running the model ------------------------------------------------------------------------------------------------


def observe(
    model: nn.Module,
    data: Data,
    watched: Mapping[str, tuple[nn.Module, Observer]],
    progress: bool | None = None,
    moments: Mapping[str, tuple[nn.Module, LayerMoments]] | None = None,
    *,
    what: str = "calibration",
) -> None:
    """Run the batches through the model, in eval mode and without gradients, and fill the statistics.

    watched, moments: by name, the modules, and what is kept of their inputs, and of what their weights meet. The model
    is as it was afterwards, whatever happens. what: the argument that data is, for errors.
    """
    kept = [*watched.items(), *(moments or {}).items()]
    failure: Exception | None = None
    batches = 0
    try:
        with _undisturbed(model), ExitStack() as hooks:
            for name, (layer, of_layer) in kept:
                take = _observer(name, of_layer)
                hook = layer.register_forward_pre_hook(take, with_kwargs=True)
                hooks.callback(hook.remove)
            batches = _run(model, data, progress, what)
    except Exception as error:  # noqa: BLE001 - other ranks must hear of it, or they would wait for this one
        failure = error
    if several_ranks():
        of_all = reduced(torch.tensor([int(failure is not None), batches]), dist.ReduceOp.SUM)
        failed, batches = of_all.tolist()
        if failed and failure is None:
            raise RuntimeError(f"calibration failed on {failed} other rank{'s' * (failed > 1)}")
    if failure is not None:
        raise failure
    if not batches:
        raise ValueError(f"{what} is empty: it gave no batch (was it an iterator that is used up?)")
    if several_ranks():
        for _, (_, of_layer) in kept:
            of_layer.reduce()


def _observer(name: str, kept: Observer) -> Callable[..., None]:
    """A hook that takes in what a layer is called with."""

    def take(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = signature(layer.forward).parameters
        with error_context(name):
            kept.observe(layer, dict(zip(names, args, strict=False)) | kwargs)

    return take


def _tensor_of(x: Any) -> Any:
    return x.data if isinstance(x, PackedSequence) else x


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and no compiled code or fused transformer layers, which would not call the hooks.

    Flags are set one by one, as a train() of the model's own may do more than set them.
    """
    training = {module: module.training for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for module in training:
                module.training = False
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, flag in training.items():
            module.training = flag


def _run(model: nn.Module, data: Data, progress: bool | None, what: str = "calibration") -> int:
    """Runs all batches; how many there were."""
    if isinstance(data, Callable):
        data(model)
        return 1
    _check_data(data, what)
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    count = 0
    for batch in with_progress([data] if isinstance(data, Tensor) else data, "calibrate", progress, "batch"):
        try:
            _call(model, batch, device, what)
        except Exception as error:
            error.add_note(f"while calibrating on batch {count}")
            raise
        count += 1
    return count


def with_sample(data: Data) -> tuple[Data, Data]:
    """One batch as data (a callable as it is), and data that still gives all batches."""
    if isinstance(data, Callable | Tensor):
        return data, data
    _check_data(data, "calibration")
    batches = iter(data)
    for batch in batches:
        return [batch], data if batches is not data else chain([batch], batches)
    return [], data


def outputs_of(model: nn.Module, data: Data) -> list[Tensor]:
    """Every float tensor that the model returns for the batches, float64; it runs in eval mode without gradients."""
    outputs: list[Tensor] = []
    hook = model.register_forward_hook(lambda _, args, output: outputs.extend(_float_tensors(output)))
    try:
        with _undisturbed(model):
            batches = _run(model, data, False)
    finally:
        hook.remove()
    if not batches:
        raise ValueError("calibration is empty: it gave no batch (was it an iterator that is used up?)")
    if not outputs:
        raise ValueError(
            "calibration cannot tell which layers count: the model returns no float tensor, nor a tuple or dict of them"
        )
    return outputs


def _float_tensors(output: Any) -> Iterator[Tensor]:
    """Those in tuples, lists and dicts, in order."""
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output.detach().double()
    elif isinstance(output, Mapping | tuple | list):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _float_tensors(part)


def mean_over_ranks(measure: Callable[[], list[float]], count: int) -> list[float]:
    """So many values, the mean over the ranks of torch.distributed; where one rank fails, all do."""
    failure, values = None, [0.0] * count
    try:
        values = measure()
    except Exception as error:
        if not several_ranks():
            raise
        failure = error
    if not several_ranks():
        return values
    failed, *sums = reduced(
        torch.tensor([float(failure is not None), *values], dtype=torch.float64), dist.ReduceOp.SUM
    ).tolist()
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError(f"calibration failed on {failed:.0f} other rank{'s' * (failed > 1)}")
    return [each / dist.get_world_size() for each in sums]


def _check_data(data: Any, what: str) -> None:
    """Batches, not one of them."""
    if not isinstance(data, Iterable) or isinstance(data, str | bytes):
        raise TypeError(f"{what}={data!r}: use batches, (batch, target) pairs, or a callable that runs the model")
    pair = isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)
    if isinstance(data, Mapping | PackedSequence | np.ndarray) or (pair and data[0].dim() != data[1].dim()):
        kind = "(batch, target) pair" if pair else type(data).__name__
        raise TypeError(f"{what} is one {kind}: put it in a list, {what}=[...]; of arrays make tensors")


def _call(model: nn.Module, batch: Any, device: torch.device, what: str) -> None:
    """model(batch); of a (batch, target) pair the batch alone, of a dict its entries by name."""
    if isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence):
        if not 1 <= len(batch) <= 2:
            raise ValueError(f"{what} gave {len(batch)} things at once: use a callable that runs the model on them")
        batch = batch[0]
    if isinstance(batch, np.ndarray):
        raise TypeError(f"{what} gave a numpy array: give tensors, torch.from_numpy(batch)")
    if isinstance(batch, Mapping):
        model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
        return
    model(batch.to(device) if isinstance(batch, Tensor | PackedSequence) else batch)


# --- Once for many settings -------------------------------------------------------------------------------------------


class Calibration(dict[str, Statistics]):
    """What calibrate() has seen, by layer name; quantize(calibration=) takes it in place of data, again and again.

    moments: of what the layers' weights meet, by layer name, where calibrate() was asked for them.
    """

    def __init__(self, *statistics: Any, moments: Mapping[str, LayerMoments] | None = None) -> None:
        super().__init__(*statistics)
        self.moments = dict(moments or {})


def calibrate(model: nn.Module, data: Data, *, moments: bool = False, progress: bool | None = None) -> Calibration:
    """Run batches through a float model and keep what quantize() needs to know of every layer's input.

    Args:
        model: a float model; it is run in eval mode and without gradients, and is as it was afterwards.
        data: batches, (batch, target) pairs of which the target is not used, dicts of keyword arguments, or a callable
            that runs the model on what it likes: data(model). Where torch.distributed is initialized, each rank gives
            its own, and all get the statistics of all.
        moments: keep second moments, too, which rounding="gptq" needs: 4 (C K)^2 bytes for each group of every weight
            [O, C, ...] with K values to the filter, some 0.6 GB for a ResNet-50.
        progress: show a bar; by default where it takes over two seconds, a terminal looks on and tqdm is installed.

    Returns:
        Statistics by layer name: per layer some 40 KB and 1 KB for each input channel, however many batches there are.

    Raises:
        ValueError: there is no batch or none reaches a layer, a layer's input holds NaN, Inf or values beyond 2^127, or
            a layer is lazy and has no shape yet.
    """
    check_model(model)
    if not isinstance(moments, bool):
        raise ValueError(f"moments={moments!r}: use True or False")
    layers = [target for target in find_targets(model) if not target.reason_float]
    watched = {layer.name: (layer.module, statistics_for(layer)) for layer in layers}
    second = {layer.name: moments_for(model, layer) for layer in layers} if moments else {}
    observe(model, data, watched, progress, second, what="data")
    return reached(watched, second)


def reached(
    watched: Mapping[str, tuple[nn.Module, Statistics]], moments: Mapping[str, tuple[nn.Module, LayerMoments]]
) -> Calibration:
    """What was kept of the layers that had an input; that none had one is a ValueError."""
    statistics, second = (
        {name: of_layer for name, (_, of_layer) in kept.items() if of_layer.inputs} for kept in (watched, moments)
    )
    names = [*{**watched, **moments}]
    if names and not statistics and not second:
        raise ValueError(f"calibration reached none of the layers {', '.join(names[:3])} ...: does it run the model?")
    return Calibration(statistics, moments=second)


def moments_for(model: nn.Module, layer: Target) -> tuple[nn.Module, LayerMoments]:
    """Empty ones, and the module whose calls fill them: the layer, or the attention that it projects the output of."""
    check_values(layer)
    parent = model.get_submodule(layer.name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention) and type(parent).forward is nn.MultiheadAttention.forward:
        return parent, LayerMoments(layer.module, parent)
    return layer.module, LayerMoments(layer.module)


def statistics_for(layer: Target, *, channels: bool = True) -> Statistics:
    """Empty ones, with a histogram for each channel where there shall be and the layer can have its input split."""
    kind, module = replacement_of(layer.module), layer.module
    with error_context(layer.name):
        check_weight_values(module._parameters[kind.weight_names(module)[0]])
    axis = -1 - len(module.kernel_size) if isinstance(module, CONVOLUTIONS) else -1
    if not (channels and kind.splits_input):
        return Statistics(axis)
    weight = input_weight(module)
    return Statistics(axis, weight.groups * weight.channels)
