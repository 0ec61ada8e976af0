"""The kernels in torch operations, for tensors on devices that have no C kernels: the same values, more passes.

Two traps on GPUs: dividing by a Python number or by a CPU scalar multiplies by its reciprocal there, which can round
another way, so every divisor below is a tensor on the device of the dividend.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ocs import _C
from ocs.kernels import constants
from ocs.kernels.constants import MAX_BINS, MAX_PARTS, OCTAVE_BINS, SQUANT_LIMIT, SQUANT_STEP

KERNELS = _C.OPERATORS  # each has a function of its name here
GPTQ_BLOCK = 128  # columns between updates of all that follow
GRID_LIMIT = 2.0**30  # as in csrc: grid units are computed with up to here


_other_devices = torch.library.Library("ocs", "IMPL", "CompositeExplicitAutograd")


def kernel(empty: Callable[..., Any]) -> Callable[[Callable], Callable]:
    """Register a function as the operator of its name on other devices.

    `empty` makes its result without values from the same arguments, for torch.compile, torch.export and meta tensors.
    """

    def register(function: Callable) -> Callable:
        def fake(*args: Any) -> Any:
            meta = {arg.is_meta for arg in args if isinstance(arg, Tensor)}
            torch._check(len(meta) == 1, lambda: "ocs: meta tensors cannot be mixed with others")
            return empty(*args)

        _other_devices.impl(function.__name__, function)
        torch.library.register_fake(f"ocs::{function.__name__}", fake)
        return function

    return register


def _require(valid: bool, op: str, what: str) -> None:
    """Raise the RuntimeError of the C kernels for what is not valid; values are read where a layer is planned."""
    if not valid:
        raise RuntimeError(f"ocs::{op}: {what}")


def source_valid(source: Tensor, groups: int, channels: int) -> bool:
    """Tell whether source can be a split plan's: int64, each group's own channels first, then copies of these alone."""
    if source.dtype != torch.int64 or groups < 1 or source.numel() % groups or source.numel() < groups * channels:
        return False
    within = _within_group(source, groups, channels).cpu()
    own = torch.arange(channels, device="cpu").expand(groups, channels)
    return _all((within >= 0) & (within < max(channels, 1))) and torch.equal(within[:, :channels], own)


def _check_plan(
    op: str, groups: int, channels: int, source: Tensor, parts: Tensor | None = None, offset: Tensor | None = None
) -> None:
    """Check that all fit one another and the shape: an index out of range would end a CUDA process."""
    valid = source_valid(source, groups, channels)
    if valid and parts is not None:
        valid = parts.numel() == source.numel() and _all((parts >= 1) & (parts <= MAX_PARTS))
    if valid and offset is not None:
        valid = offset.numel() == parts.numel() and _all((offset >= 0) & (offset < parts))
    _require(valid, op, "source, parts and offset are no split plan of this shape")


def _all(conditions: Tensor) -> bool:
    """Tell whether all hold, which waits for the device."""
    return bool(conditions.all())


def _check_scales(op: str, scale: Tensor, rows: int) -> None:
    """Check one scale, or one for each of so many rows."""
    _require(
        scale.dim() == 0 or (scale.dim() == 1 and scale.numel() == rows), op, "scale must have no dimension, or one"
    )
    _require(_all((scale > 0) & scale.isfinite()), op, "every scale must be a positive finite number")


def _floats(op: str, x: Tensor) -> Tensor:
    """Convert a float tensor to float32."""
    _require(x.is_floating_point(), op, "a float tensor is needed")
    return x.float()


@kernel(lambda x: x.new_empty((), dtype=torch.float32))
def abs_max(x: Tensor) -> Tensor:
    """Find max|x|, float32 []; 0 for an empty tensor."""
    x = _floats("abs_max", x)
    return x.abs().amax() if x.numel() else x.new_zeros((), dtype=torch.float32)


@kernel(lambda x, bins, limit: x.new_empty(bins, dtype=torch.int64))
def histogram(x: Tensor, bins: int, limit: float) -> Tensor:
    """Count |x| over [0, limit] in bins, int64 [bins], what lies beyond in the last one."""
    x, width = _floats("histogram", x), torch.tensor(limit, dtype=torch.float32, device="cpu")
    valid = 1 <= bins <= MAX_BINS and 0 <= width < math.inf
    _require(bool(valid), "histogram", "bins must be 1 to 2^24, and the limit finite and not negative")
    if width == 0:
        return torch.cat([x.new_full((1,), x.numel(), dtype=torch.int64), x.new_zeros(bins - 1, dtype=torch.int64)])
    position = x.abs().flatten() / width.to(x.device) * bins
    return torch.bincount(torch.nan_to_num(position, nan=bins).clamp(max=bins - 1).long(), minlength=bins)


@kernel(lambda x, bins, limit: x.new_empty(2 * bins + 1, dtype=torch.int64))
def signed_histogram(x: Tensor, bins: int, limit: float) -> Tensor:
    """Count x over [-limit, limit], int64 [2 bins + 1]: zeros and subnormal values in the middle."""
    x = _floats("signed_histogram", x).flatten()
    counted = ~(x.abs() < torch.finfo(torch.float32).tiny) & (limit > 0)
    below, above = (histogram(x[counted & (x.signbit() == sign)], bins, limit) for sign in (True, False))
    return torch.cat([below.flip(0), x.numel() - below.sum(0, keepdim=True) - above.sum(0, keepdim=True), above])


@kernel(lambda x, limit: x.new_empty((x.shape[1], OCTAVE_BINS), dtype=torch.int64))
def octave_histogram(x: Tensor, limit: float) -> Tensor:
    """Count |x| of x [N, C, ...] below limit, a power of two, in eight bins to the octave: int64 [C, 128]."""
    _require(x.dim() >= 2, "octave_histogram", "x must have at least 2 dimensions")
    valid = 2.0**-110 <= limit < 2.0**128 and math.frexp(limit)[0] == 0.5
    _require(valid, "octave_histogram", "the limit must be a power of two, 2^-110 or more")
    octave = (_floats("octave_histogram", x).abs().contiguous().view(torch.int32) >> 20).transpose(0, 1).flatten(1)
    base = (int(torch.tensor(limit, dtype=torch.float32, device="cpu").view(torch.int32)) >> 20) - OCTAVE_BINS
    bins = (octave - base).clamp(0, OCTAVE_BINS - 1)
    bins += OCTAVE_BINS * torch.arange(x.shape[1], dtype=torch.int32, device=x.device)[:, None]
    return torch.bincount(bins.flatten(), minlength=OCTAVE_BINS * x.shape[1]).view(x.shape[1], OCTAVE_BINS)


@kernel(lambda w, groups: w.new_empty(groups * w.shape[1], dtype=torch.float32))
def channel_max(w: Tensor, groups: int) -> Tensor:
    """Find max|w| of each input channel [groups C]."""
    grouped = _grouped(_floats("channel_max", w).abs(), groups)
    if 0 in grouped.shape:
        return w.new_zeros(groups * w.shape[1], dtype=torch.float32)
    return grouped.amax((1, 3)).flatten()


def _empty_plan(channel_max: Tensor, groups: int, splits: int, even: bool) -> tuple[Tensor, ...]:
    size = channel_max.numel() + groups * splits
    dtypes = (torch.int64, torch.int32, torch.int32, torch.float32)
    return tuple(channel_max.new_empty(size, dtype=dtype) for dtype in dtypes)


@kernel(_empty_plan)
def split_plan(channel_max: Tensor, groups: int, splits: int, even: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plan on the CPU by the C kernel: it is a few numbers, and a heap is nothing for a GPU."""
    plan = torch.ops.ocs.split_plan(channel_max.cpu(), groups, splits, even)
    return tuple(part.to(channel_max.device, copy=True) for part in plan)


@kernel(lambda w, *_: w.new_empty(w.shape[0], dtype=torch.float32))
def output_max(w: Tensor, source: Tensor, parts: Tensor, groups: int) -> Tensor:
    """Find max|w| of each output channel after splitting [O]."""
    _check_plan("output_max", groups, w.shape[1], source, parts)
    expanded = _divided(_floats("output_max", w), source, parts, groups)
    if 0 in expanded.shape:
        return w.new_zeros(w.shape[0], dtype=torch.float32)
    return expanded.abs().amax((2, 3)).flatten()


@kernel(lambda w, source, parts, groups, bins, limit: limit.new_empty((*limit.shape, bins), dtype=torch.int64))
def split_histogram(w: Tensor, source: Tensor, parts: Tensor, groups: int, bins: int, limit: Tensor) -> Tensor:
    """Count the |w| after splitting that are not zero: int64 [bins], or [O, bins] where limit is [O]."""
    _check_plan("split_histogram", groups, w.shape[1], source, parts)
    limit = _floats("split_histogram", limit)
    valid = 1 <= bins <= MAX_BINS and _all((limit >= 0) & limit.isfinite()) and limit.shape in ((), w.shape[:1])
    _require(valid, "split_histogram", "bins must be 1 to 2^24, and limit [] or [O], finite and not negative")
    if not w.shape[0]:
        return torch.zeros((*limit.shape, bins), dtype=torch.int64, device=w.device)
    split = _divided(_floats("split_histogram", w), source, parts, groups)
    rows = split.abs().reshape(limit.numel(), math.prod(split.shape) // limit.numel())
    width = limit.to(w.device).reshape(-1, 1)
    position = torch.where(width > 0, rows / width, 0.0) * bins
    at = torch.nan_to_num(position, nan=bins, posinf=bins).clamp(max=bins - 1).long()
    at += bins * torch.arange(rows.shape[0], device=w.device)[:, None]
    return torch.bincount(at[rows != 0], minlength=bins * rows.shape[0]).view(*limit.shape, bins)


@kernel(lambda counts, limit, *_: limit.new_empty(limit.shape, dtype=torch.float32))
def clip_threshold(counts: Tensor, limit: Tensor, bits: int, signed: bool, method: int) -> Tensor:
    """Search on the CPU by the C kernel, in a copy of the histogram."""
    return torch.ops.ocs.clip_threshold(counts.cpu(), limit.cpu(), bits, signed, method).to(limit.device, copy=True)


@kernel(lambda x, *_: x.new_empty(x.shape[0], dtype=torch.float32))
def release_threshold(x: Tensor, counts: Tensor, bits: int, signed: bool, method: int) -> Tensor:
    """Search on the CPU by the C kernel, in a copy of the values."""
    found = torch.ops.ocs.release_threshold(x.cpu(), counts.cpu(), bits, signed, method)
    return found.to(x.device, copy=True)


def _with_channels(w: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    return w.new_empty((w.shape[0], channels, *w.shape[2:]), dtype=dtype)


def _empty_ints(
    w: Tensor, scale: Tensor, source: Tensor, parts: Tensor, offset: Tensor, groups: int, *_: int
) -> Tensor:
    return _with_channels(w, source.numel() // groups, torch.int8)


@kernel(_empty_ints)
def quantize_weight(
    w: Tensor,
    scale: Tensor,
    source: Tensor,
    parts: Tensor,
    offset: Tensor,
    groups: int,
    bits: int,
    quantization_aware: bool,
) -> Tensor:
    """Quantize the split weight to int8 [O, C + n, ...], by one addition and one division each (csrc/kernels.h)."""
    qmax = grid(bits, True)[1]
    _check_plan("quantize_weight", groups, w.shape[1], source, parts, offset)
    _check_scales("quantize_weight", scale, w.shape[0])
    u = _floats("quantize_weight", w) / _per_row(scale, w)
    u2 = torch.nan_to_num(torch.floor(2 * u), nan=GRID_LIMIT).clamp(-GRID_LIMIT, GRID_LIMIT).int()
    addend = 2 * offset + 1 if quantization_aware else parts
    added = _gather(u2, source, groups) + addend.reshape(groups, 1, -1, 1)
    ints = (added // (2 * parts).reshape(groups, 1, -1, 1)).clamp(-qmax, qmax).to(torch.int8)
    return ints.reshape(w.shape[0], source.numel() // groups, *w.shape[2:])


@kernel(_empty_ints)
def squant_weight(
    w: Tensor, scale: Tensor, source: Tensor, parts: Tensor, offset: Tensor, groups: int, bits: int
) -> Tensor:
    """Quantize to int8 [O, C + n, ...] and move integers so that rounding errors cancel (csrc/ocs.h)."""
    nearest = quantize_weight(w, scale, source, parts, offset, groups, bits, True)
    if not nearest.numel():
        return nearest
    qmax, within = grid(bits, True)[1], _within_group(source, groups, w.shape[1])
    u = _grouped(_floats("squant_weight", w) / _per_row(scale, w), groups)
    before = _grouped(nearest.int(), groups)
    total = torch.zeros_like(u, dtype=torch.int32)
    total.scatter_add_(2, within.reshape(groups, 1, -1, 1).expand(before.shape), before)
    parts, offset = parts.reshape(groups, -1), offset.reshape(groups, -1)
    low, high = -qmax * parts - offset, (qmax + 1) * parts - 1 - offset
    low = low[:, : w.shape[1]].scatter_reduce(1, within, low, "amax")[:, None, :, None]
    high = high[:, : w.shape[1]].scatter_reduce(1, within, high, "amin")[:, None, :, None]
    moved = _gather((total - _moves(total, u, low, high)).reshape(w.shape), source, groups)
    split = (moved + offset.reshape(groups, 1, -1, 1)) // parts.reshape(groups, 1, -1, 1)
    changed = moved != _gather(total.reshape(w.shape), source, groups)
    return torch.where(changed, split, before).to(torch.int8).reshape(nearest.shape)


def _empty_ints_and_error(
    w: Tensor, scale: Tensor, source: Tensor, parts: Tensor, offset: Tensor, bits: int, order: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    ints = _empty_ints(w, scale, source, parts, offset, order.shape[0])
    return ints, w.new_empty(w.shape[0], dtype=torch.float64)


@kernel(_empty_ints_and_error)
def gptq_weight(
    w: Tensor, scale: Tensor, source: Tensor, parts: Tensor, offset: Tensor, bits: int, order: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Round column by column, each one's error compensated in those that follow (csrc/ocs.h).

    Returns int8 [O, C + n, ...], and what outputs are off by, float64 [O].
    """
    groups, L, qmax = order.shape[0], factor.shape[1], grid(bits, True)[1]
    u = _grouped(_floats("gptq_weight", w) / _per_row(scale, w), groups).flatten(2)
    G, rows, N = u.shape
    _check_plan("gptq_weight", G, w.shape[1], source, parts, offset)
    _check_scales("gptq_weight", scale, w.shape[0])
    blocks = (N + L - 1) // L if L else 0
    shaped = order.shape == (G, blocks * L) and (L > 0 or not N) and order.dtype == torch.int64
    _require(shaped, "gptq_weight", "order must be int64 [groups, blocks L]")
    _require(factor.shape == (G * blocks, L, L), "gptq_weight", "factor must be [groups blocks, L, L]")
    columns = torch.arange(blocks * L, device=order.device).expand(G, -1)
    _require(torch.equal(order.sort(1)[0], columns), "gptq_weight", "order must have each column once")
    if not w.numel():
        return _empty_ints(w, scale, source, parts, offset, groups), w.new_zeros(w.shape[0], dtype=torch.float64)
    u = torch.nn.functional.pad(u, (0, blocks * L - N)).gather(2, order[:, None].expand(-1, rows, -1))
    u = u.double().transpose(1, 2).reshape(G * blocks, L, rows)
    channel = order.clamp(max=N - 1) // (N // w.shape[1])
    table = _parts_of_columns(_within_group(source, G, w.shape[1]), parts, offset, channel, qmax)
    whole, lost = _compensated(u, factor.double(), table.reshape(3, G * blocks, L, -1), (order < N).reshape(-1, L, 1))
    whole = whole.view(G, -1, rows).gather(1, order.argsort(1)[:, :N, None].expand(-1, -1, rows))
    own = _gather(whole.transpose(1, 2).reshape(w.shape), source, G)
    divisor, addend = (x.reshape(G, 1, -1, 1).double() for x in (parts, offset))
    ints = ((own + addend) / divisor).floor().clamp(-qmax, qmax).to(torch.int8)
    error = lost.view(G, blocks, rows).sum(1).flatten() * scale.to(w.device, torch.float64).square()
    return ints.reshape(w.shape[0], source.numel() // G, *w.shape[2:]), error


def _parts_of_columns(within: Tensor, parts: Tensor, offset: Tensor, channel: Tensor, qmax: int) -> Tensor:
    """Collect parts, offset and qmax of the parts of each column's channel: [3, G, N, P].

    After a channel's last part they are 1, 0 and 0, those of a part that is 0 whatever it is of.
    """
    G, E = within.shape
    counts = torch.zeros_like(within).scatter_add_(1, within, torch.ones_like(within))
    ordered, at = within.sort(dim=1, stable=True)
    place = torch.arange(E, device=within.device) - (counts.cumsum(1) - counts).gather(1, ordered)
    table = within.new_full((G, E, int(counts.max())), E)
    table[torch.arange(G, device=within.device)[:, None], ordered, place] = at
    table = table.gather(1, channel[:, :, None].expand(-1, -1, table.shape[2]))
    each = torch.stack([parts, offset, torch.full_like(offset, qmax)]).double().view(3, G, E)
    none = each.new_tensor([1, 0, 0]).view(3, 1, 1).expand(-1, G, -1)
    each = torch.cat([each, none], 2).gather(2, table.flatten(1).expand(3, -1, -1))
    return each.view(3, *table.shape)


def _compensated(u: Tensor, factor: Tensor, parts: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """Round u [blocks, L, rows] to the whole numbers of which each column takes its parts [3, blocks, L, P].

    Returns what is lost [blocks, rows], too.
    """
    v, error, whole, lost = u.clone(), torch.empty_like(u), torch.empty_like(u), torch.zeros_like(u[:, 0])
    divisor, offset, limit = parts[..., None, :]
    for start in range(0, u.shape[1], GPTQ_BLOCK):
        stop = min(start + GPTQ_BLOCK, u.shape[1])
        for j in range(start, stop):
            whole[:, j] = (v[:, j] + 0.5).floor_()
            split = ((whole[:, j, :, None] + offset[:, j]) / divisor[:, j]).floor_().clamp_(-limit[:, j], limit[:, j])
            total = split.sum(-1)
            lost += factor[:, j, j, None] * ((total - v[:, j]) * exists[:, j]).square()
            error[:, j] = (total - u[:, j]) * exists[:, j]
            v[:, j + 1 : stop].baddbmm_(factor[:, j + 1 : stop, j, None], error[:, j, None], alpha=-1)
        v[:, stop:].baddbmm_(factor[:, stop:, start:stop], error[:, start:stop], alpha=-1)
    return whole, lost


def _moves(total: Tensor, u: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Choose what to subtract, -1, 0 or 1, from each sum [..., C, K] of a channel's integers."""
    error = (
        torch.nan_to_num((total.float() - u) * SQUANT_STEP, nan=SQUANT_LIMIT).clamp(-SQUANT_LIMIT, SQUANT_LIMIT).long()
    )

    def candidates(moves: Tensor, sign: Tensor) -> Tensor:
        """Compute the size of each element's error where it may move, else 0."""
        after = total - moves - sign
        return torch.where((error * sign > 0) & (after >= low) & (after <= high), error.abs(), 0)

    moves = torch.zeros_like(total)
    if total.shape[-1] > 1:
        of_filter = error.sum(-1)
        sign = of_filter.sign()[..., None]
        moves = (sign * _largest(candidates(moves, sign), of_filter)).to(total.dtype)
        error -= SQUANT_STEP * moves
    of_filter = error.sum(-1)
    of_row = of_filter.sum(-1)
    sign = of_row.sign()[..., None]
    size, first = (part[..., :1] for part in candidates(moves, sign[..., None]).sort(descending=True, stable=True))
    movable = (of_filter * sign > 0) & (size[..., 0] > 0)
    one_more = sign * _largest(torch.where(movable, of_filter.abs(), 0), of_row)
    return moves.scatter_add(-1, first, one_more[..., None].to(total.dtype))


def _largest(sizes: Tensor, error: Tensor) -> Tensor:
    """Tell which of sizes [..., n] are among the floor(|error| + 1/2) largest, the first on ties, and not 0."""
    order = sizes.sort(descending=True, stable=True)[1]
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(sizes.shape[-1], device=order.device).expand_as(order)
    )
    return (rank < ((error.abs() + SQUANT_STEP // 2) // SQUANT_STEP)[..., None]) & (sizes > 0)


@kernel(lambda ints, scale, source, groups, channels: _with_channels(ints, channels, torch.float32))
def fold(ints: Tensor, scale: Tensor, source: Tensor, groups: int, channels: int) -> Tensor:
    """Sum each channel's integers and its copies', times scale: float32 [O, channels, ...]."""
    _require(ints.dtype == torch.int8, "fold", "ints has the wrong dtype")
    _check_plan("fold", groups, channels, source)
    _check_scales("fold", scale, ints.shape[0])
    grouped = _grouped(ints.float(), groups)
    total = grouped.new_zeros((*grouped.shape[:2], channels, grouped.shape[3]))
    index = _within_group(source, groups, channels).reshape(groups, 1, -1, 1).expand(grouped.shape)
    folded = total.scatter_add(2, index, grouped).reshape(ints.shape[0], channels, *ints.shape[2:])
    return folded * _per_row(scale, folded)


@kernel(lambda w, *_: w.new_empty(2, dtype=torch.float64))
def weight_error(w: Tensor, ints: Tensor, scale: Tensor, source: Tensor, groups: int) -> Tensor:
    """Sum w^2 and (w - w_hat)^2, float64 [2]; the order of summation is the device's."""
    difference = _floats("weight_error", w) - fold(ints, scale, source, groups, w.shape[1])
    return torch.stack([w.double().square().sum(), difference.double().square().sum()])


@kernel(lambda w, *_: w.new_empty(w.shape[0], dtype=torch.float64))
def output_error(w: Tensor, ints: Tensor, scale: Tensor, source: Tensor, groups: int, gain: float) -> Tensor:
    """Estimate how far each output is off, float64 [O] (csrc/ocs.h); the order of summation is the device's."""
    v = _floats("output_error", w).double().reshape(*w.shape[:2], math.prod(w.shape[2:]))
    d = fold(ints, scale, source, groups, w.shape[1]).double().reshape(v.shape) - v
    power = v.square().sum((1, 2))
    of_gain = (d * v).sum((1, 2)) / (power + (power == 0))
    return _output_power(d) + gain * _output_power(v) * of_gain.square()


def _output_power(v: Tensor) -> Tensor:
    """Compute v H v^T for rows v [..., C, K], H the quadratic form of output_error."""
    of_filter = v.sum(2)
    return (v.square().sum((1, 2)) + of_filter.square().sum(1) + of_filter.sum(1).square()) / 3


@kernel(lambda x, scale, bits, signed: x.new_empty(x.shape, dtype=torch.int8 if signed else torch.uint8))
def quantize(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    """Compute clamp(round_half_even(x / scale)) as int8 or uint8; NaN gives 0."""
    return torch.nan_to_num(_to_grid(x, scale, bits, signed), nan=0.0).to(torch.int8 if signed else torch.uint8)


@kernel(lambda q, scale: q.new_empty(q.shape, dtype=torch.float32))
def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """Compute q * scale, with one scale or one per entry of the first axis."""
    _require(q.dtype in (torch.int8, torch.uint8), "dequantize", "q has the wrong dtype")
    _require(scale.dim() == 0 or scale.shape == q.shape[:1], "dequantize", "scale must have no dimension, or one")
    return q.float() * _per_row(scale, q)


@kernel(lambda x, *_: torch.empty_like(x))
def fake_quantize(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    """Compute scale * clamp(round_half_even(x / scale)) in the dtype of x; NaN stays, zero comes out as +0."""
    return ((_to_grid(x, scale, bits, signed) + 0.0) * scale.to(x.device, torch.float32).reshape(())).to(x.dtype)


@kernel(lambda ints, bits: ints.new_empty((ints.numel() * bits + 7) // 8, dtype=torch.uint8))
def pack(ints: Tensor, bits: int) -> Tensor:
    """Write the codes q + qmax bit after bit, low bits first, as bytes [ceil(N bits / 8)]."""
    qmax = grid(bits, True)[1]
    codes = ints.flatten().int() + qmax
    _require(ints.dtype == torch.int8 and _all((codes >= 0) & (codes <= 2 * qmax)), "pack", "an integer is outside")
    stream = (codes[:, None] >> torch.arange(bits, device=codes.device) & 1).flatten()
    stream = torch.nn.functional.pad(stream, (0, -stream.numel() % 8))
    return (stream.reshape(-1, 8) << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


@kernel(lambda packed, numel, bits: packed.new_empty(numel, dtype=torch.int8))
def unpack(packed: Tensor, numel: int, bits: int) -> Tensor:
    """Read the integers int8 [numel] that pack wrote."""
    qmax = grid(bits, True)[1]
    fits = packed.dtype == torch.uint8 and numel >= 0 and packed.dim() and (numel * bits + 7) // 8 == packed.numel()
    _require(bool(fits), "unpack", "packed has another size or dtype")
    stream = (packed.flatten().int()[:, None] >> torch.arange(8, device=packed.device) & 1).flatten()
    codes = (stream[: numel * bits].reshape(-1, bits) << torch.arange(bits, device=packed.device)).sum(1)
    _require(_all(codes <= 2 * qmax) and _all(stream[numel * bits :] == 0), "unpack", "an integer is outside")
    return (codes - qmax).to(torch.int8)


def grid(bits: int, signed: bool) -> tuple[int, int]:
    """Compute the smallest and largest integer of k bits, 2 to 8: -qmax .. qmax, or 0 .. 2^k - 1."""
    _require(constants.MIN_BITS <= bits <= constants.MAX_BITS, "grid", f"bits={bits}: bits must be 2 to 8")
    return constants.grid(bits, signed)


def _to_grid(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    """Compute clamp(round_half_even(x / scale)), float32."""
    _require(scale.numel() == 1, "quantize", "scale must be one number")
    on_device = scale.to(x.device, torch.float32).reshape(())
    return torch.round(_floats("quantize", x) / on_device).clamp(*grid(bits, signed))


def _per_row(scale: Tensor, w: Tensor) -> Tensor:
    """Shape scale [] or [O] so that it broadcasts over w [O, ...]."""
    scale = scale.to(w.device, torch.float32)
    return scale.reshape(-1, *[1] * (w.dim() - 1)) if scale.dim() else scale


def _grouped(w: Tensor, groups: int) -> Tensor:
    """View w as [groups, O / groups, C, K]."""
    _require(w.dim() >= 2, "weight", "at least 2 dimensions are needed")
    divides = groups == 1 or (1 < groups <= w.shape[0] and w.shape[0] % groups == 0)
    _require(divides, "weight", "groups must divide the output channels")
    return w.reshape(groups, w.shape[0] // groups, w.shape[1], math.prod(w.shape[2:]))


def _within_group(source: Tensor, groups: int, channels: int) -> Tensor:
    """Number source [groups, C + n] within each group."""
    return source.reshape(groups, -1) - torch.arange(groups, device=source.device)[:, None] * channels


def _divided(w: Tensor, source: Tensor, parts: Tensor, groups: int) -> Tensor:
    """Split the weight into w / parts: [groups, O / groups, C + n, K]."""
    return _gather(w, source, groups) / parts.float().reshape(groups, 1, -1, 1)


def _gather(w: Tensor, source: Tensor, groups: int) -> Tensor:
    """Gather each expanded channel's original weights: [groups, O / groups, C + n, K]."""
    grouped = _grouped(w, groups)
    index = _within_group(source, groups, w.shape[1]).reshape(groups, 1, -1, 1)
    return grouped.gather(2, index.expand(*grouped.shape[:2], -1, grouped.shape[3]))
