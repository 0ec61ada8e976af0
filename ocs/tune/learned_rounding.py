"""Learned rounding: integers moved up or down by gradient, so that outputs of blocks are those of the float model.

Nagel et al., "Up or Down? Adaptive Rounding", ICML 2020, arXiv 2004.10568, let each weight choose between two integers
by a rectified sigmoid h of a number that is learned; Li et al., "BRECQ", ICLR 2021, arXiv 2102.05426, do so for the
outputs of a block, in the order of the model, and so does this: on the block's inputs in the quantized model so far,
towards its outputs in the float one; then for the outputs of the whole model, where it is small and has several blocks.
What differs:

- The integers that gptq found, not those beside the float weight, are one of the two choices, the other is next to it
  on the float weight's side; and h starts nearer to the former. So a few hundred steps are enough, where the papers
  take ten thousand and more.
- h becomes 0 or 1 by its temperature, which falls from step to step, not by a penalty.
- Every HELD_OUT-th batch is not learned from: the new integers stay where they leave less error there.

A split channel has one integer, its copies' added up; what it moves by, the copy moves that has room. Where copies have
scales of their own (granularity="group"), it is the last copy's, which rounds what the others leave.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ocs.calibration.ranks import rank_count, reduced, sum_over_ranks
from ocs.calibration.run import Call, Data, calls_of, float_tensors, undisturbed
from ocs.errors import error_context
from ocs.kernels.constants import qmax
from ocs.model.rewrite import Step, for_a_while, module_slots
from ocs.model.wrappers import named_modules
from ocs.nn.base import QuantizedLayer
from ocs.progress import with_progress
from ocs.weight.blocks import dequantize_weight

EPOCHS, STEPS = 12, 120  # over the inputs of a block; more where that would be fewer steps
RATE, DECAYS = 0.1, (0.9, 0.99)  # of Adam
COLD = 0.02  # the last temperature; the first is 1
STRETCH = 0.1  # of the sigmoid, beyond 0 and 1
TRUST = 0.75  # how near to the integer that is there h starts; the rest is the float weight's share
HELD_OUT = 8
SMALL = 2**22  # integers of a model that is learned as a whole, too
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Learnable(NamedTuple):
    """A layer whose integers are to be learned."""

    name: str
    module: nn.Module  # that stands in the model
    layer: QuantizedLayer  # that replaces it
    weights: Mapping[str, Tensor]  # the float ones [O, C, ...], by name


class Outcome(IntEnum):
    """What became of a layer's integers."""

    UNREACHED = 0  # no gradient reaches them, or outputs are exact, or cannot be compared
    TRIED = 1  # those that were learned left more error
    LEARNED = 2


class Standing(NamedTuple):
    """What stands in the model for a while."""

    modules: Mapping[int, nn.Module]  # by id of what stands there now
    swap: list[Step]

    def of(self, module: nn.Module) -> nn.Module:
        """Find what stands for a module."""
        return self.modules.get(id(module), module)

    def calls(self, model: nn.Module, data: Data, module: nn.Module) -> list[Call]:
        """Record every call of what stands for a module."""
        return for_a_while(self.swap, partial(calls_of, model, data, self.of(module)))


class Block(NamedTuple):
    """A module whose outputs are to be those of the float model, and the layers in it that are learned for that."""

    name: str
    module: nn.Module
    layers: list[Learnable]


def learn_rounding(
    model: nn.Module,
    replacements: Mapping[int, nn.Module],
    layers: Sequence[Learnable],
    data: Data,
    progress: bool | None = None,
    floats: Mapping[int, nn.Module] = MappingProxyType({}),
) -> dict[str, Outcome]:
    """Learn the integers of quantized layers that are to replace those of a float model, which stays as it is.

    Where torch.distributed is initialized, the inputs of rank 0 count, and all ranks get its integers.

    Args:
        model: the float model.
        replacements: all that is to stand in the model, by id of what stands there now; the layers among them change.
        layers: those whose integers are learned.
        data: what calibrates, the same each time it is run.
        progress: show a bar.
        floats: what stands in the float model, by id, once its norms are folded, whose layers' outputs these are to be.

    Returns:
        What became of each layer, by name.

    Raises:
        ValueError: the data give other calls or outputs each time, or outputs that are not finite.
    """

    def run() -> list[float]:
        if rank_count() > 1 and dist.get_rank() > 0:
            return [0.0] * len(layers)
        outcomes = _learn(model, replacements, layers, data, progress, floats)
        return [float(outcomes[layer.name]) for layer in layers]

    outcomes = sum_over_ranks(run, len(layers))
    if rank_count() > 1:
        for each in layers:
            for name in each.weights:
                _share(each.layer, name)
    return {layer.name: Outcome(int(outcome)) for layer, outcome in zip(layers, outcomes, strict=True)}


def _share(layer: QuantizedLayer, name: str) -> None:
    """Give all ranks the integers of rank 0."""
    ints, scale, source = layer.weight_state(name)
    own = ints.int() if dist.get_rank() == 0 else torch.zeros_like(ints, dtype=torch.int32)
    layer.hold(name, reduced(own, dist.ReduceOp.SUM).to(torch.int8), scale, source)
    layer.rebuild()


def _learn(
    model: nn.Module,
    replacements: Mapping[int, nn.Module],
    layers: Sequence[Learnable],
    data: Data,
    progress: bool | None,
    floats: Mapping[int, nn.Module],
) -> dict[str, Outcome]:
    made_there = next((name for name, tensor in _tensors_of(model) if tensor.is_inference()), None)
    if made_there is not None:
        raise ValueError(f"{made_there} was made in inference mode, which knows no gradients: make the model outside")
    blocks = blocks_of(model, layers)
    integers = sum(w.numel() for each in layers for w in each.weights.values())
    if integers <= SMALL and len(blocks) > 1:
        blocks.append(Block("", model, list(layers)))
    student, teacher = (
        Standing(new, [slot.step() for slot in module_slots(model, new)]) for new in (replacements, floats)
    )
    outcomes = {layer.name: Outcome.UNREACHED for layer in layers}
    for block in with_progress(blocks, "learn rounding", progress, "block"):
        with error_context(block.name or "the model"):
            for name, outcome in _learn_block(model, block, student, teacher, data).items():
                outcomes[name] = max(outcomes[name], outcome)
    return outcomes


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def blocks_of(model: nn.Module, layers: Sequence[Learnable]) -> list[Block]:
    """Cut a model into blocks, in the order of its modules.

    A block is the outermost module of a class that the model has more than once, containers not counted, with all
    layers in it that are learned; a layer in no such module is a block of its own.
    """
    by_id, inside = {id(layer.module): layer for layer in layers}, {}
    for _, module in named_modules(model):
        found = [by_id[id(each)] for each in module.modules() if id(each) in by_id]
        if found:
            inside[id(module)] = (module, found)
    kinds = Counter(type(m) for m, _ in inside.values() if id(m) not in by_id and type(m) not in CONTAINERS)
    blocks, taken = [], set()
    for name, module in named_modules(model):
        if id(module) not in inside or id(module) in taken:
            continue
        if id(module) in by_id or (module is not model and kinds[type(module)] > 1):
            blocks.append(Block(name, module, inside[id(module)][1]))
            taken |= {id(each) for each in module.modules()}
    return blocks


# --- One block --------------------------------------------------------------------------------------------------------


def _learn_block(model: nn.Module, block: Block, ours: Standing, floats: Standing, data: Data) -> dict[str, Outcome]:
    """Learn the integers of a block."""
    student, swap = ours.of(block.module), ours.swap
    expected = [list(float_tensors(call.output)) for call in floats.calls(model, data, block.module)]
    calls = ours.calls(model, data, block.module)
    if [_shapes(float_tensors(call.output)) for call in calls] != [_shapes(each) for each in expected]:
        if block.module is model:
            raise ValueError("calibration gives outputs of other shapes each time: the same batches must give the same")
        return {each.name: Outcome.UNREACHED for each in block.layers}  # as experts that are given other tokens
    training = BlockTraining(student, block.layers, calls, expected)
    with torch.backends.cudnn.flags(enabled=not _is_recurrent(student)):  # cuDNN's have no gradient in eval mode
        kept = for_a_while(swap, lambda: undisturbed(model, lambda: _as_folded(block.layers, training.run)))
    outcome = Outcome.LEARNED if kept else Outcome.TRIED
    moved = [id(w.layer) for w in training.weights if w.steps]
    return {each.name: outcome if id(each.layer) in moved else Outcome.UNREACHED for each in block.layers}


def _shapes(tensors: Iterable[Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


def _is_recurrent(module: nn.Module) -> bool:
    kinds = (each.float_kind if isinstance(each, QuantizedLayer) else type(each) for each in module.modules())
    return any(issubclass(kind, nn.RNNBase) for kind in kinds)


def _as_folded(layers: Iterable[Learnable], body: Callable[[], bool]) -> bool:
    """Run body() while these layers run folded, and have them compute with their integers again afterwards."""
    expand = {id(each.layer): each.layer.expand for each in layers}
    try:
        for each in layers:
            each.layer.expand = False
        return body()
    finally:
        for each in layers:
            each.layer.expand = expand[id(each.layer)]
            vars(each.layer).pop("folded", None)
            each.layer.rebuild()


class BlockTraining:
    """The integers of a block, and what they are learned from.

    Args:
        student: the block in the quantized model; its layers run folded.
        layers: in it.
        calls: of the student. expected: the float model's float outputs for each.
    """

    def __init__(
        self, student: nn.Module, layers: Sequence[Learnable], calls: list[Call], expected: list[list[Tensor]]
    ) -> None:
        self.student, self.layers, self.expected, self.calls = student, [each.layer for each in layers], expected, calls
        self.weights = [
            (LastIntegers if each.layer.scale_group else SoftIntegers)(each.layer, name, w)
            for each in layers
            for name, w in each.weights.items()
            if w.numel()
        ]
        self.used = [i for i, tensors in enumerate(expected) if any(tensor.numel() for tensor in tensors)]
        self.powers = _powers([expected[i] for i in self.used])

    def run(self) -> bool:
        """Learn, and write the new integers to the layers if they are better; returns whether they are."""
        held = self.used[::HELD_OUT] if len(self.used) >= HELD_OUT else []
        seen = [i for i in self.used if i not in held]
        for layer in self.layers:
            vars(layer)["folded"] = partial(_value, [w for w in self.weights if w.layer is layer])
        self._show(w.whole for w in self.weights)
        before = self._error(held or seen)
        if not before:
            return False
        self._train(seen)
        self._show(w.hard() for w in self.weights)
        better = self._error(held or seen) < before
        for weight in self.weights if better else ():
            weight.keep()
        return better

    def _show(self, values: Iterable[Tensor]) -> None:
        """Have the layers compute with these integers."""
        for weight, value in zip(self.weights, values, strict=True):
            weight.value = value * weight.scale + weight.rest
        for layer in self.layers:
            layer.rebuild()

    def _loss(self, i: int) -> Tensor:
        """Compute how far the outputs of a call are off: the mean square over all numbers, in standard deviations."""
        args, kwargs = copy.deepcopy((self.calls[i].args, self.calls[i].kwargs))  # which modules may write to
        found, expected = list(float_tensors(self.student(*args, **kwargs))), self.expected[i]
        if _shapes(found) != _shapes(expected):
            raise ValueError("its outputs have other shapes each time: the same batch must give the same")
        parts = zip(found, expected, self.powers, strict=True)
        squares = sum((y.float() - y0.float()).square().sum() / power for y, y0, power in parts)
        return squares / sum(y.numel() for y in found)

    def _error(self, which: Sequence[int]) -> float:
        """Compute the mean loss of some calls."""
        error = sum(float(self._loss(i)) for i in which) / max(len(which), 1)
        if not math.isfinite(error):
            raise ValueError("its outputs hold NaN or Inf on calibration batches: repair model or batch")
        return error

    def _train(self, seen: Sequence[int]) -> None:
        """Take Adam's steps while the temperature falls, until all is decided."""
        epochs = max(EPOCHS, math.ceil(STEPS / len(seen)))
        order, step = torch.Generator("cpu").manual_seed(0), 0
        for _ in range(epochs):
            for at in torch.randperm(len(seen), generator=order, device="cpu").tolist():
                temperature = COLD ** (step / (epochs * len(seen)))
                with torch.enable_grad():
                    self._show(w.soft(temperature) for w in self.weights)
                    loss = self._loss(seen[at])
                if not loss.requires_grad:
                    return
                for weight, grad in zip(self.weights, self._gradients(loss), strict=True):
                    if grad is not None and bool(grad.isfinite().all()):
                        weight.step(grad)
                step += 1
            if all(w.decided for w in self.weights):
                return

    def _gradients(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        """Derive the loss by the numbers that are learned, None for those that it does not depend on."""
        try:
            return torch.autograd.grad(loss, [w.logit for w in self.weights], allow_unused=True)
        except RuntimeError as error:
            raise ValueError(f"it cannot be derived, use rounding='gptq': {error}") from error


def _value(weights: Sequence["SoftIntegers"], name: str) -> Tensor:
    """Find a layer's weight by its name, as it is now."""
    return next(weight.value for weight in weights if weight.name == name)


def _powers(expected: Sequence[Sequence[Tensor]]) -> list[float]:
    """Compute the variance of each output over all calls; 1 where it does not vary."""
    powers = []
    for outputs in zip(*expected, strict=True):
        values = torch.stack([torch.stack([y.float().mean(), y.float().square().mean()]) for y in outputs if y.numel()])
        mean, square = values.double().mean(0).tolist()
        powers.append(square - mean * mean or 1.0)
    return powers


# --- One weight -------------------------------------------------------------------------------------------------------


class SoftIntegers:
    """The integers of a weight while they are learned: one for each original channel, its copies' added up.

    Args:
        layer: that holds them, and which the learned ones are written to.
        name: of the weight. w: the float one, [O, C, ...].
    """

    def __init__(self, layer: QuantizedLayer, name: str, w: Tensor) -> None:
        self.layer, self.name, self.rest = layer, name, 0.0
        ints, scale, source = layer.weight_state(name)
        C, groups = layer.channels[name], layer.groups
        local = source.view(groups, -1) - C * torch.arange(groups, device=source.device)[:, None]
        self.channel = local.view(groups, 1, -1, *[1] * (ints.dim() - 2))
        most = self._take(ints, scale)
        units = (w.float() - self.rest) / self.scale
        below = units < self.whole
        self.lower = (self.whole - below.float()).clamp(-most, most - 1)
        share = TRUST * (self.whole - self.lower) + (1 - TRUST) * (units - self.lower).clamp(0, 1)
        share = (share + STRETCH) / (1 + 2 * STRETCH)
        self.logit = (share / (1 - share)).log().requires_grad_()
        self.moments = torch.zeros_like(self.logit), torch.zeros_like(self.logit)
        self.steps, self.decided = 0, False
        self.value = self.whole * self.scale + self.rest

    def _take(self, ints: Tensor, scale: Tensor) -> Tensor | int:
        """Set the integers that are learned, `whole`, their `scale`, and the `rest` of the weight; returns the most."""
        self.scale = scale if scale.dim() == 0 else scale.view(-1, *[1] * (ints.dim() - 1))
        self.whole = self._added_up(ints)
        return self._added_up(torch.full_like(ints, qmax(self.layer.bits)))

    def _added_up(self, ints: Tensor) -> Tensor:
        """Add the integers of copies [O, C + n, ...] up on their channels: float32 [O, C, ...]."""
        grouped = ints.unflatten(0, (self.layer.groups, -1)).float()
        whole = grouped.new_zeros(*grouped.shape[:2], self.layer.channels[self.name], *grouped.shape[3:])
        return whole.scatter_add_(2, self.channel.expand_as(grouped), grouped).flatten(0, 1)

    def soft(self, temperature: float) -> Tensor:
        """Compute numbers between two integers, nearer to one the lower the temperature."""
        chance = torch.sigmoid(self.logit / temperature) * (1 + 2 * STRETCH) - STRETCH
        self.decided = bool(((chance <= 0) | (chance >= 1)).all())
        return self.lower + chance.clamp(0, 1)

    def hard(self) -> Tensor:
        """Choose one of the two."""
        return self.lower + (self.logit.detach() > 0)

    def step(self, grad: Tensor) -> None:
        """Take one of Adam's steps."""
        self.steps += 1
        (mean, square), (of_mean, of_square) = self.moments, DECAYS
        mean.lerp_(grad, 1 - of_mean)
        square.lerp_(grad.square(), 1 - of_square)
        deviation = (square / (1 - of_square**self.steps)).sqrt_().add_(1e-12)
        with torch.no_grad():
            self.logit.addcdiv_(mean, deviation, value=-RATE / (1 - of_mean**self.steps))

    def keep(self) -> None:
        """Write the choice to the layer: each channel's integer moves by what its first copy that has room moves by."""
        ints, scale, source = self.layer.weight_state(self.name)
        left = (self.hard() - self.whole).unflatten(0, (self.layer.groups, -1))
        moved, most = ints.unflatten(0, (self.layer.groups, -1)).float(), qmax(self.layer.bits)
        C = self.layer.channels[self.name]
        for part in (slice(C), *(slice(j, j + 1) for j in range(C, ints.shape[1]))):
            old = moved[:, :, part]
            index = self.channel[:, :, part].expand_as(old)
            new = (old + left.gather(2, index)).clamp(-most, most)
            left.scatter_add_(2, index, old - new)
            moved[:, :, part] = new
        self.layer.hold(self.name, moved.flatten(0, 1).to(torch.int8), scale, source)


class LastIntegers(SoftIntegers):
    """The integers of a weight with scales of groups: of each channel those of its last part, all others stay."""

    def _take(self, ints: Tensor, scale: Tensor) -> int:
        C, columns = self.layer.channels[self.name], torch.arange(ints.shape[1], device=ints.device)
        last = self.channel.new_zeros(*self.channel.shape[:2], C, *self.channel.shape[3:])
        places = columns.view_as(self.channel[:1]).expand_as(self.channel)
        self.last = last.scatter_reduce(2, self.channel, places, "amax")
        scales = dequantize_weight(torch.ones_like(ints), scale, C, self.layer.scale_group)
        self.scale, self.whole = self._of_last(scales), self._of_last(ints).float()
        self.rest = self.layer.folded(self.name) - self.whole * self.scale
        return qmax(self.layer.bits)

    def _of_last(self, x: Tensor) -> Tensor:
        """Pick the last parts of expanded channels [O, C + n, ...]: [O, C, ...]."""
        grouped = x.unflatten(0, (self.layer.groups, -1))
        index = self.last.expand(*grouped.shape[:2], -1, *grouped.shape[3:])
        return grouped.gather(2, index).flatten(0, 1)

    def keep(self) -> None:
        """Write the choice to the layer."""
        ints, scale, source = self.layer.weight_state(self.name)
        grouped, new = (each.unflatten(0, (self.layer.groups, -1)) for each in (ints, self.hard().to(torch.int8)))
        moved = grouped.scatter(2, self.last.expand_as(new), new)
        self.layer.hold(self.name, moved.flatten(0, 1), scale, source)
