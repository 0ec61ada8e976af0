"""Calibration: what data says of the input of every layer, once for many settings of quantize()."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ocs.calibration.additions import Additions, Range, Term
from ocs.calibration.gram import LayerMoments, widest_block
from ocs.calibration.run import Data, Watch, observe
from ocs.calibration.statistics import Statistics
from ocs.errors import check_order, error_context
from ocs.model.rewrite import keeps_grad_mode
from ocs.model.targets import Target, check_model, check_values, find_targets
from ocs.model.wrappers import named_modules, submodule, unwrapped
from ocs.nn.registry import replacement_of
from ocs.nn.weights import input_weight, weights_of
from ocs.weight.arguments import check_flag


class Calibration(dict[str, Statistics]):
    """What calibrate() has seen, by layer name; quantize(calibration=) takes it in place of data, again and again.

    moments: second moments of what the layers' weights meet, by layer name, where calibrate() was asked for them.
    terms: the ranges of outputs that are added to another tensor.
    """

    def __init__(
        self,
        *statistics: Any,
        moments: Mapping[str, LayerMoments] | None = None,
        terms: Mapping[Term, Range] | None = None,
    ) -> None:
        super().__init__(*statistics)
        self.moments, self.terms = dict(moments or {}), dict(terms or {})


@keeps_grad_mode
def calibrate(model: nn.Module, data: Data, *, moments: bool = False, progress: bool | None = None) -> Calibration:
    """Run batches through a float model and keep what quantize() needs to know of every layer's input.

    Args:
        model: a float model; it is run in eval mode and without gradients, and is as it was afterwards.
        data: batches of inputs; dicts of arguments by name, the explicit way for any forward; tuples or lists, of which
            forward gets as many parts as it requires, at least the first: (batch, target) for forward(x), both for
            forward(ids, mask); one part more is the target, and an error where it looks like an argument that forward
            may take, too (mask=None); a list of images where forward's first argument is a list; or a callable
            that runs the model on what it likes: data(model). Where torch.distributed is initialized, each rank gives
            its own, and all get the statistics of all.
        moments: keep second moments, too, which rounding="gptq" needs: 4 (C K)^2 bytes for each group of every weight
            [O, C, ...] with K values to the filter, some 0.6 GB for a ResNet-50; but never more than 2 GiB for the
            model (ocs.calibration.gram.BYTES). Weights of more than 4,608 columns C K, and all that are too wide where
            that would not be enough, keep theirs in blocks of neighbouring columns.
        progress: show a bar; by default where it takes over two seconds, a terminal looks on and tqdm is installed.

    Returns:
        Statistics by layer name: per layer some 70 KB and 1 KB for each input channel, however many batches there are.

    Raises:
        ValueError: there is no batch or none reaches a layer, a layer's input holds NaN, Inf or values beyond 2^127, or
            a layer is lazy and has no shape yet.
    """
    check_order("ocs.calibrate(model, data)", model, data)
    model = unwrapped(model)
    check_model(model)
    check_flag("moments", moments)
    targets = [target for target in find_targets(model) if target.tied_to or not target.reason_float]
    for target in targets:
        check_values(target)
    inputs = [watch_input(target) for target in targets]
    seen = [target for target in targets if not replacement_of(target.module).unseen(target.module)]
    of_weights = watch_moments(model, seen) if moments else []
    return collect(model, data, inputs, of_weights, progress, "data")


def collect(
    model: nn.Module,
    data: Data,
    inputs: Sequence[Watch],
    moments: Sequence[Watch],
    progress: bool | None,
    what: str,
    additions: Additions | None = None,
) -> Calibration:
    """Run the batches, and keep what was seen of the layers that had an input; that none had one is a ValueError.

    inputs, moments: what to look at, from watch_input and watch_moments. what: the argument that data is, for errors.
    additions: those that were seen before, which these join.
    """
    watches, additions = [*inputs, *moments], additions or Additions(dict(named_modules(model)))
    observe(model, data, watches, progress, steps=additions.steps(), what=what)
    additions.reduce()
    names = [*dict.fromkeys(watch.name for watch in watches)]
    if names and not any(watch.observer.inputs for watch in watches):
        raise ValueError(f"calibration reached none of the layers {', '.join(names[:3])} ...: does it run the model?")
    return Calibration(_reached(inputs), moments=_reached(moments), terms=additions.ranges)


def _reached(watches: Sequence[Watch]) -> dict[str, Any]:
    return {watch.name: watch.observer for watch in watches if watch.observer.inputs}


def watch_input(target: Target, *, channels: bool = True) -> Watch:
    """Take statistics of a layer's input, with a histogram of each channel unless the layer cannot have it split.

    channels: False leaves these histograms out.
    """
    module, kind = target.module, replacement_of(target.module)
    with error_context(target.name):
        weight = input_weight(module)
    if not (channels and kind.splits_input):
        return Watch(target.name, module, Statistics(weight.input_axis))
    return Watch(target.name, module, Statistics(weight.input_axis, weight.in_channels))


def watch_moments(model: nn.Module, targets: Sequence[Target]) -> list[Watch]:
    """Take second moments of what the weights of layers meet, all together within the bound of ocs.calibration.gram."""
    for target in targets:
        with error_context(target.name):
            weights_of(target.module)  # those of lazy layers have no shape yet
    widest = widest_block(target.module for target in targets)
    return [_watch_moments(model, target, widest) for target in targets]


def _watch_moments(model: nn.Module, target: Target, widest: int) -> Watch:
    """Look at a layer's calls, or at those of the attention that reads its weight."""
    parent = submodule(model, target.name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention) and type(parent).forward is nn.MultiheadAttention.forward:
        return Watch(target.name, parent, LayerMoments(target.module, parent, widest))
    return Watch(target.name, target.module, LayerMoments(target.module, widest=widest))
