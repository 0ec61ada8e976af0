"""Products with k-bit weights in torch operations, for devices without C kernels, and the shapes of their results.

Where rows are rounded, sums are whole numbers and exact, so that all devices give the same; of float rows the order of
sums is the device's own. A packed weight is six arguments: packed bytes, scale, copies, outputs O, group, bits.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ocs.kernels.composite import _all, _check_scales, _floats, _require, kernel
from ocs.kernels.constants import MAX_BITS, MIN_BITS, qmax

OUTPUTS, CHANNELS = 16, 32  # of a tile
SEGMENT = 32768  # channels whose products add up in 32 bits


def packed_bytes(outputs: int, channels: int, bits: int) -> int:
    """Count the bytes of a packed weight [outputs, channels]."""
    return -(-outputs // OUTPUTS) * -(-channels // CHANNELS) * 64 * bits


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
    padded = torch.nn.functional.pad(q, (0, -q.shape[1] % CHANNELS, 0, -q.shape[0] % OUTPUTS)).int() + qmax(bits)
    blocks, count = padded.shape[0] // OUTPUTS, padded.shape[1] // CHANNELS
    codes = padded.view(blocks, OUTPUTS, count, 8, 4).permute(0, 2, 3, 1, 4).reshape(blocks, count, 8, 64)
    planes, place = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            fields = ((codes >> place) & ((1 << width) - 1)).view(blocks, count, width, 8 // width, 64)
            weights = 2 ** (width * torch.arange(8 // width, device=q.device, dtype=torch.int32))
            planes.append((fields * weights[:, None]).sum(3))
            place += width
    return torch.cat(planes, 2).to(torch.uint8).flatten()


@kernel(lambda packed, outputs, channels, bits: packed.new_empty((outputs, channels), dtype=torch.int8))
def product_unpack(packed: Tensor, outputs: int, channels: int, bits: int) -> Tensor:
    """Unpack to q int8 [outputs, channels]."""
    _check_bits("product_unpack", bits)
    fits = packed.dtype == torch.uint8 and packed.numel() == packed_bytes(outputs, channels, bits)
    _require(outputs >= 0 and channels >= 0 and fits, "product_unpack", "packed has another size than such a weight")
    blocks, count = -(-outputs // OUTPUTS), -(-channels // CHANNELS)
    lines = packed.view(blocks, count, bits, 64).int()
    codes, place, first = 0, 0, 0
    for width in (8, 4, 2, 1):
        if bits & width:
            shifts = width * torch.arange(8 // width, device=packed.device, dtype=torch.int32)
            plane = lines[:, :, first : first + width, None]
            fields = (plane >> shifts[:, None]) & ((1 << width) - 1)
            codes = codes + (fields.reshape(blocks, count, 8, 64) << place)
            place, first = place + width, first + width
    _require(_all(codes <= 2 * qmax(bits)), "product_unpack", "an integer is outside -qmax .. qmax")
    ordered = codes.view(blocks, count, 8, OUTPUTS, 4).permute(0, 3, 1, 2, 4)
    whole = ordered.reshape(blocks * OUTPUTS, count * CHANNELS) - qmax(bits)
    return whole[:outputs, :channels].to(torch.int8).contiguous()


def _check_packed(op: str, scale: Tensor, copies: Tensor, outputs: int, group: int, channels: int) -> None:
    """Check what is beside the packed bytes: an index out of range would end a CUDA process."""
    _require(group >= 0 and group % CHANNELS == 0, op, "a group must be a multiple of 32 channels")
    valid = copies.dtype == torch.int32 and _all((copies >= 0) & (copies < channels))
    _require(valid, op, "source, parts and offset are no split plan of this shape")
    if group:
        groups = -(-(channels + copies.numel()) // group)
        _require(scale.shape == (groups, outputs), op, "scale must be [groups, outputs]")
        _check_scales(op, scale.flatten(), scale.numel())
    else:
        _check_scales(op, scale, outputs)


def _scales(scale: Tensor, outputs: int, group: int, expanded: int) -> Tensor:
    """Give each integer its scale, [outputs, expanded] or what broadcasts to it."""
    if group:
        return scale.repeat_interleave(group, 0)[:expanded].t()
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


def _round(x: Tensor, bits: int, scale: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Round rows [R, C] to integers, in double; give them and the scale of each row, NaN where it has none."""
    largest = x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    unknown = largest.isnan()
    if scale.numel() == 0:
        unknown = unknown | largest.isinf()
        scale = (largest / torch.full_like(largest, qmax(bits))).clamp(min=2.0**-149).masked_fill(largest == 0, 1.0)
    scale = scale.reshape(-1).expand_as(largest).masked_fill(unknown, torch.nan)
    least, most = (-qmax(bits), qmax(bits)) if signed else (0, 2**bits - 1)
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
    """Compute x w^T + bias in x's dtype; row_bits 0 leaves rows floats, an empty row_scale measures each."""
    _require(x.dim() > 0, "product", "x must have at least 1 dimension")
    channels = x.shape[-1]
    _check_packed("product", scale, copies, outputs, group, channels)
    _check_rows(bias, outputs, row_bits, row_scale, row_signed)
    rows = _floats("product", x).reshape(math.prod(x.shape[:-1]), channels)
    q = product_unpack(packed, outputs, channels + copies.numel(), bits).double()
    of_rows = None
    if row_bits:
        rows, of_rows = _round(rows, row_bits, row_scale, row_signed)
    rows = torch.cat([rows.double(), rows.double()[:, copies.long()]], 1)
    span = segment_channels(group)
    total = rows.new_zeros((rows.shape[0], outputs), dtype=torch.float32)
    for begin in range(0, rows.shape[1], span):
        sums = rows[:, begin : begin + span] @ q[:, begin : begin + span].t()
        total += sums.float() * (scale[begin // group] if group else scale)
    if of_rows is not None:
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
    _require(0 <= cell < len(_STEPS), "recurrent", "there is no such cell")
    _require(cell == 0 or not projection_outputs, "recurrent", "only an LSTM has a projection")
    _require(batch_sizes.dtype == torch.int64, "recurrent", "batch_sizes must be int64")
    none, sizes = from_x.new_empty(0), batch_sizes.tolist()
    falls = all(0 <= b <= a for a, b in zip([len(h), *sizes], sizes, strict=False)) and sum(sizes) == len(from_x)
    _require(falls, "recurrent", "batch_sizes must be those of N sequences, and fall")
    h, c, y = h.float().clone(), c.float().clone(), from_x.new_zeros((len(from_x), h.shape[1]), dtype=torch.float32)
    steps = list(zip(from_x.float().split(sizes), y.split(sizes), sizes, strict=True))
    for x, out, batch in steps[::-1] if reverse else steps:
        of_h = product(h[:batch], *hidden, bias, row_bits, none, True)
        unit, c[:batch] = _STEPS[cell](x, of_h, h[:batch], c[:batch])
        h[:batch] = product(unit, *projection, projection_bits, none, row_bits, none, True) if projection[3] else unit
        out.copy_(h[:batch])
    return y, h, c if cell == 0 else c.new_empty((0, 0))


def _lstm(x: Tensor, of_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (x + of_h).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, of_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, 1), of_h.chunk(3, 1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return n + z * (h - n), c


def _tanh(x: Tensor, of_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return (x + of_h).tanh(), c


def _relu(x: Tensor, of_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return (x + of_h).relu(), c


_STEPS = (_lstm, _gru, _tanh, _relu)
