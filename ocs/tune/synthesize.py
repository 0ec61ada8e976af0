"""Inputs made without data: those of which a float model's BatchNorms see what their statistics say (ZeroQ).

Cai et al. 2020, arXiv 2001.00281, section 3.1.
"""

import copy
import math
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ocs.errors import check_order
from ocs.model.rewrite import keeps_grad_mode
from ocs.model.wrappers import unwrapped
from ocs.nn.base import QuantizedLayer
from ocs.nn.convolution import CONVOLUTIONS
from ocs.progress import with_progress
from ocs.tune.reestimate import running_norms

RATE = 0.1  # of Adam, for inputs of unit variance


@keeps_grad_mode
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
    """Make inputs of which the float model's BatchNorms see what their statistics say; needs no data (ZeroQ).

    Adam moves smooth noise so that, batch by batch, mean and standard deviation before every BatchNorm are matched, and
    0 and 1 of the inputs themselves: in units of the running standard deviation, each norm with the same weight. They
    are no images, but serve ocs.reestimate_batchnorm with reference=, and calibration= where rounding is "gptq"
    or "learned".

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
            quantized, a number is no whole one from 1 on, seed is out of range, the shape has a batch dimension, or the
            loss is not finite.
        RuntimeError: what the model raises for inputs of this shape, with a note that says so.
    """
    check_order("ocs.synthesize(model, shape)", model, shape)
    model = unwrapped(model)
    running_norms(model)
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
            (p for p in model.parameters() if p.is_floating_point()),
            next(iter(running_norms(model).values())).running_mean,
        )
        noise = _smooth_noise(images, shape, torch.Generator("cpu").manual_seed(int(seed))).to(like.device)
        parts = with_progress(noise.split(batch), "synthesize", progress, "batch")
        return [_matched(frozen, part, steps).to(like.dtype) for part in parts]


def _smooth_noise(images: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw [images, *shape] of mean 0 and variance 1: noise of all octaves, the coarser the stronger, as in images."""
    spatial, x = shape[1:], torch.randn(images, *shape, generator=generator, dtype=torch.float32, device="cpu")
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}.get(len(spatial))
    if mode is None:
        return x
    x, size = x / math.sqrt(min(spatial)), 2
    while size < min(spatial):
        coarse = torch.randn(
            images, shape[0], *[size] * len(spatial), generator=generator, dtype=torch.float32, device="cpu"
        )
        x += nn.functional.interpolate(coarse, tuple(spatial), mode=mode) / math.sqrt(size)
        size *= 2
    return (x - x.mean()) / x.std()


def _matched(model: nn.Module, x: Tensor, steps: int) -> Tensor:
    """Move a batch of noise until the norms see what their statistics say."""
    x = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], RATE)
    count = torch.zeros((), dtype=torch.float32, device="cpu")  # whatever torch's defaults are
    optimizer.state[x].update(step=count, exp_avg=torch.zeros_like(x), exp_avg_sq=torch.zeros_like(x))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad(), _losses(model) as losses:
        for _ in range(steps):
            losses.clear()
            try:
                model(x)
            except Exception as error:
                _explain(model, tuple(x.shape[1:]), error)
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


def _explain(model: nn.Module, shape: tuple[int, ...], error: Exception) -> None:
    """Say what may be wrong with a shape that a model does not take: a ValueError where it is of a batch."""
    first = next((module for module in model.modules() if isinstance(module, CONVOLUTIONS)), None)
    if first is not None and len(shape) == len(first.kernel_size) + 2:
        raise ValueError(f"shape={shape} is that of a batch: give that of one input, {shape[1:]}") from error
    error.add_note(f"while synthesizing inputs: is shape={shape} that of one input?")


@contextmanager
def _losses(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect how far the input of each BatchNorm is from its statistics, in the order of calls."""
    losses: list[Tensor] = []

    def take(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(iter((*args, *kwargs.values())))
        losses.append(_distance(x, norm.running_mean, (norm.running_var + norm.eps).sqrt()))

    with ExitStack() as hooks:
        for norm in running_norms(model).values():
            hooks.callback(norm.register_forward_pre_hook(take, with_kwargs=True).remove)
        yield losses


def _distance(x: Tensor, mean: Tensor | float, deviation: Tensor | float) -> Tensor:
    """Average over channels the squared differences of mean and standard deviation, in units of that deviation."""
    dims = [0, *range(2, x.dim())]
    found = x.var(dims, correction=0).clamp(min=1e-12).sqrt()
    return (((x.mean(dims) - mean) / deviation).square() + ((found - deviation) / deviation).square()).mean()
