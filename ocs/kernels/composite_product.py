"""Products with k-bit weights in torch operations, for devices without C kernels, and the shapes of their results.

Sums are whole numbers and exact, so that all devices give the same. A packed weight is six arguments: packed bytes,
scale, copies, outputs O, group, bits.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ocs.kernels.composite import _all, _check_scales, _floats, _require, kernel
from ocs.kernels.constants import MAX_BITS, MIN_BITS, MOST_STEPS, SEGMENT, TILE_CHANNELS, TILE_OUTPUTS, grid, qmax
from ocs.kernels.recurrent_steps import STEPS, States, run_sequence


def packed_bytes(outputs: int, channels: int, bits: int) -> int:
    """Count the bytes of a packed weight [outputs, channels]."""
    lines = -(-channels // 4)
    return -(-outputs // TILE_OUTPUTS) * 64 * sum(-(-lines * width // 8) for width in (8, 4, 2, 1) if bits & width)


def _packed_lines(channels: int, bits: int, device: torch.device) -> Tensor:
    """List those lines of a block of whole tiles that are packed: not all of the last one's planes."""
    packed = torch.ones((-(-channels // TILE_CHANNELS), bits), dtype=torch.bool, device="cpu")
    lines, first = -(-(channels % TILE_CHANNELS) // 4) or 8, 0  # of the last tile
    for width in (8, 4, 2, 1):
        if bits & width:
            packed[-1:, first + -(-lines * width // 8) : first + width] = False
            first += width
    return packed.flatten().nonzero().flatten().to(device)


def tile_scales(scale: Tensor) -> Tensor:
    """Arrange scales [O, groups] as products read them, [ceil(O / 16), groups, 16]; those of no outputs are 1."""
    padded = torch.nn.functional.pad(scale, (0, 0, 0, -scale.shape[0] % TILE_OUTPUTS), value=1.0)
    return padded.view(-1, TILE_OUTPUTS, scale.shape[1]).transpose(1, 2).contiguous()


def untile_scales(scale: Tensor, outputs: int) -> Tensor:
    """Give back scales [outputs, groups]."""
    return scale.transpose(1, 2).reshape(-1, scale.shape[1])[:outputs].contiguous()


def segment_channels(group: int) -> int:
    """Count the channels whose products are added up before they are scaled: the largest part of a group that fits."""
    if group == 0 or group % SEGMENT == 0:
        return SEGMENT
    return group if group < SEGMENT else group & -group


def _check_bits(op: str, bits: int) -> None:
    _require(MIN_BITS <= bits <= MAX_BITS, op, "bits must be 2 to 8")


@kernel(lambda q, bits: q.new_empty(packed_bytes(*q.shape, bits), dtype=torch.uint8))
def product_pack(q: Tensor, bits: int) -> Tensor:
    """Pack q int8 [O, E] for products: uint8 [bytes]."""
    _check_bits("product_pack", bits)
    _require(q.dtype == torch.int8 and q.dim() == 2, "product_pack", "q must be int8 [O, E]")
    _require(_all(q.short().abs() <= qmax(bits)), "product_pack", "an integer is outside -qmax .. qmax")
    beyond = (0, -q.shape[1] % TILE_CHANNELS, 0, -q.shape[0] % TILE_OUTPUTS)
    padded = torch.nn.functional.pad(q, beyond).int() + qmax(bits)
    blocks, count = padded.shape[0] // TILE_OUTPUTS, padded.shape[1] // TILE_CHANNELS
    codes = padded.view(blocks, TILE_OUTPUTS, count, 8, 4).permute(0, 2, 3, 1, 4).reshape(blocks, count, 8, 64)
    planes, place = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            fields = ((codes >> place) & ((1 << width) - 1)).view(blocks, count, width, 8 // width, 64)
            weights = 2 ** (width * torch.arange(8 // width, device=q.device, dtype=torch.int32))
            planes.append((fields * weights[:, None]).sum(3))
            place += width
    whole = torch.cat(planes, 2).to(torch.uint8).view(blocks, count * bits, 64)
    return whole[:, _packed_lines(q.shape[1], bits, q.device)].flatten()


@kernel(lambda packed, outputs, channels, bits: packed.new_empty((outputs, channels), dtype=torch.int8))
def product_unpack(packed: Tensor, outputs: int, channels: int, bits: int) -> Tensor:
    """Unpack to q int8 [outputs, channels]."""
    _check_bits("product_unpack", bits)
    fits = packed.dtype == torch.uint8 and packed.numel() == packed_bytes(outputs, channels, bits)
    _require(outputs >= 0 and channels >= 0 and fits, "product_unpack", "packed has another size than such a weight")
    blocks, count = -(-outputs // TILE_OUTPUTS), -(-channels // TILE_CHANNELS)
    kept = _packed_lines(channels, bits, packed.device)
    whole = packed.new_zeros((blocks, count * bits, 64), dtype=torch.int32)
    whole[:, kept] = packed.view(blocks, len(kept), 64).int()
    lines = whole.view(blocks, count, bits, 64)
    codes, place, first = 0, 0, 0
    for width in (8, 4, 2, 1):
        if bits & width:
            shifts = width * torch.arange(8 // width, device=packed.device, dtype=torch.int32)
            plane = lines[:, :, first : first + width, None]
            fields = (plane >> shifts[:, None]) & ((1 << width) - 1)
            codes = codes + (fields.reshape(blocks, count, 8, 64) << place)
            place, first = place + width, first + width
    valid = codes.view(blocks, count * 8, 64)[:, : -(-channels // 4)] <= 2 * qmax(bits)
    _require(_all(valid), "product_unpack", "an integer is outside -qmax .. qmax")
    ordered = codes.view(blocks, count, 8, TILE_OUTPUTS, 4).permute(0, 3, 1, 2, 4)
    integers = ordered.reshape(blocks * TILE_OUTPUTS, count * TILE_CHANNELS) - qmax(bits)
    return integers[:outputs, :channels].to(torch.int8).contiguous()


def _check_packed(op: str, scale: Tensor, copies: Tensor, outputs: int, group: int, channels: int) -> None:
    """Check what is beside the packed bytes: an index out of range would end a CUDA process."""
    _require(group >= 0 and group % TILE_CHANNELS == 0, op, "a group must be a multiple of 32 channels")
    valid = copies.dtype == torch.int32 and _all((copies >= 0) & (copies < channels))
    _require(valid, op, "source, parts and offset are no split plan of this shape")
    if group:
        groups = -(-(channels + copies.numel()) // group)
        blocks = -(-outputs // TILE_OUTPUTS)
        _require(scale.shape == (blocks, groups, TILE_OUTPUTS), op, "scale must be [blocks, groups, 16]")
        _check_scales(op, scale.flatten(), scale.numel())
    else:
        _check_scales(op, scale, outputs)


def _scales(scale: Tensor, outputs: int, group: int, expanded: int) -> Tensor:
    """Give each integer its scale, [outputs, expanded] or what broadcasts to it."""
    if group:
        return untile_scales(scale, outputs).repeat_interleave(group, 1)[:, :expanded]
    return scale.expand(outputs)[:, None]


@kernel(lambda index, packed, scale, copies, outputs, group, bits, channels: scale.new_empty((index.numel(), channels)))
def product_rows(
    index: Tensor, packed: Tensor, scale: Tensor, copies: Tensor, outputs: int, group: int, bits: int, channels: int
) -> Tensor:
    """Give rows of what a packed weight stands for, float32 [R, channels], copies added to their channel."""
    _check_packed("product_rows", scale, copies, outputs, group, channels)
    valid = index.dtype == torch.int64 and _all((index >= 0) & (index < outputs))
    _require(valid, "product_rows", "an index is outside the rows of the weight")
    q = product_unpack(packed, outputs, channels + copies.numel(), bits)[index].float()
    scales = _scales(scale, outputs, group, q.shape[1])[index]
    w = q * scales if group else q
    rows = w[:, :channels].index_add(1, copies.long(), w[:, channels:])
    return rows if group else rows * scales


def _round(x: Tensor, least: int, most: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows [R, C] to whole numbers, in double; give them and the scale of each row, NaN where it has none."""
    largest = x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    unknown = largest.isnan()
    if scale.numel() == 0:
        unknown = unknown | largest.isinf()
        scale = (largest / torch.full_like(largest, most)).clamp(min=2.0**-149).masked_fill(largest == 0, 1.0)
    scale = scale.reshape(-1).expand_as(largest).masked_fill(unknown, torch.nan)
    q = torch.round(x / scale.masked_fill(unknown, 1.0)[:, None]).clamp(least, most)
    return torch.nan_to_num(q).double(), scale


def _check_rows(bias: Tensor, outputs: int, row_bits: int, row_scale: Tensor, row_signed: bool) -> None:
    """Check what a product has besides its weight."""
    fits = not bias.numel() or bias.shape == (outputs,)
    _require(fits, "product", "bias must be empty, or hold one number for each output")
    _require(row_scale.numel() <= 1, "product", "the scale of rows must be one number, or empty")
    if row_bits:
        _check_bits("product", row_bits)
        _require(row_scale.numel() == 1 or row_signed, "product", "rows that are measured are signed")
        _check_scales("product", row_scale.flatten(), row_scale.numel())


def _empty_product(x: Tensor, packed: Tensor, scale: Tensor, copies: Tensor, outputs: int, *others: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


@kernel(_empty_product)
def product(
    x: Tensor, packed: Tensor, scale: Tensor, copies: Tensor, outputs: int, group: int, bits: int, bias: Tensor,
    row_bits: int, row_scale: Tensor, row_signed: bool,
) -> Tensor:  # fmt: skip
    """Compute x w^T + bias in x's dtype; row_bits 0: rows in 2^23 - 2^16 steps; an empty row_scale measures each."""
    _require(x.dim() > 0, "product", "x must have at least 1 dimension")
    channels = x.shape[-1]
    _check_packed("product", scale, copies, outputs, group, channels)
    _check_rows(bias, outputs, row_bits, row_scale, row_signed)
    rows = _floats("product", x).reshape(math.prod(x.shape[:-1]), channels)
    q = product_unpack(packed, outputs, channels + copies.numel(), bits).double()
    if row_bits:
        least, most = grid(row_bits, row_signed)
    else:
        least, most, row_scale = -MOST_STEPS, MOST_STEPS, row_scale.flatten()[:0]
    rows, of_rows = _round(rows, least, most, row_scale)
    rows = torch.cat([rows, rows[:, copies.long()]], 1)
    span = segment_channels(group)
    total = rows.new_zeros((rows.shape[0], outputs), dtype=torch.float32)
    for begin in range(0, rows.shape[1], span):
        sums = rows[:, begin : begin + span] @ q[:, begin : begin + span].t()  # exact in double
        total += sums.float() * (scale[:, begin // group].flatten()[:outputs] if group else scale)
    total *= of_rows[:, None]
    if bias.numel():
        total += bias.float()
    return total.view(*x.shape[:-1], outputs).to(x.dtype)


# --- Recurrent layers -------------------------------------------------------------------------------------------------


def _empty_recurrent(from_x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    h, c, _, _, cell, _ = arguments[13:]
    last = c if cell == 0 else c.new_empty((0, 0))
    y = from_x.new_empty((from_x.shape[0], h.shape[1]), dtype=torch.float32)
    return y, h.new_empty(h.shape, dtype=torch.float32), last.new_empty(last.shape, dtype=torch.float32)


@kernel(_empty_recurrent)
def recurrent(
    from_x: Tensor,
    hidden_packed: Tensor, hidden_scale: Tensor, hidden_copies: Tensor, hidden_outputs: int, hidden_group: int,
    hidden_bits: int,
    bias: Tensor,
    projection_packed: Tensor, projection_scale: Tensor, projection_copies: Tensor, projection_outputs: int,
    projection_group: int, projection_bits: int,
    h: Tensor, c: Tensor, batch_sizes: Tensor, row_bits: int, cell: int, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run all steps of a layer: (y [steps, P], h [N, P], c [N, H])."""
    hidden = (hidden_packed, hidden_scale, hidden_copies, hidden_outputs, hidden_group, hidden_bits)
    projection = (projection_packed, projection_scale, projection_copies, projection_outputs, projection_group)
    _require(0 <= cell < len(STEPS), "recurrent", "there is no such cell")
    _require(cell == 0 or not projection_outputs, "recurrent", "only an LSTM has a projection")
    _require(projection_outputs in (0, h.shape[1]), "recurrent", "a projection must give the numbers of h")
    _require(batch_sizes.dtype == torch.int64, "recurrent", "batch_sizes must be int64")
    none, sizes = from_x.new_empty(0), batch_sizes.tolist()
    falls = all(0 <= b <= a for a, b in zip([len(h), *sizes], sizes, strict=False)) and sum(sizes) == len(from_x)
    _require(falls, "recurrent", "batch_sizes must be those of N sequences, and fall")

    def step(x: Tensor, states: States) -> States:
        of_h = product(states[0], *hidden, bias, row_bits, none, True)
        unit, *cells = cell_step(x, of_h, states)
        if projection_outputs:
            unit = product(unit, *projection, projection_bits, none, row_bits, none, True)
        return unit, *cells

    cell_step, states = list(STEPS.values())[cell], (h.float(), c.float()) if cell == 0 else (h.float(),)
    y, last = from_x.new_zeros((0, h.shape[1]), dtype=torch.float32), states
    if sizes:
        y, last = run_sequence(from_x.float(), sizes, states, step, reverse=reverse)
    return y, last[0].clone(), last[1].clone() if cell == 0 else c.new_empty((0, 0), dtype=torch.float32)
