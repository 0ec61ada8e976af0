"""The definition of products with k-bit weights, in numpy: csrc/tiles.c and csrc/product.c compute the same.

A packed weight is six arguments: packed bytes, scale, copies, outputs O, group, bits. Its integers are [O, C + S].
"""

import math

import numpy as np

from ocs.kernels.constants import MOST_STEPS, SEGMENT, TILE_CHANNELS, TILE_OUTPUTS, qmax


def _codes_to_tiles(codes: np.ndarray) -> np.ndarray:
    """Order codes [O, E], both whole tiles, as tiles do: [blocks, tiles, 8 lines, 64]."""
    tiles = codes.reshape(codes.shape[0] // TILE_OUTPUTS, TILE_OUTPUTS, codes.shape[1] // TILE_CHANNELS, 8, 4)
    return tiles.transpose(0, 2, 3, 1, 4).reshape(*tiles.shape[:3:2], 8, 64)


def _tiles_to_codes(tiles: np.ndarray) -> np.ndarray:
    """Order them the other way round."""
    blocks, count = tiles.shape[:2]
    codes = tiles.reshape(blocks, count, 8, TILE_OUTPUTS, 4).transpose(0, 3, 1, 2, 4)
    return codes.reshape(blocks * TILE_OUTPUTS, count * TILE_CHANNELS)


def _packed_lines(channels: int, bits: int) -> np.ndarray:
    """List those lines of a block of whole tiles that are packed: not all of the last one's planes."""
    packed = np.ones((-(-channels // TILE_CHANNELS), bits), bool)
    lines, first = -(-(channels % TILE_CHANNELS) // 4) or 8, 0  # of the last tile
    for width in (8, 4, 2, 1):
        if bits & width:
            packed[-1:, first + -(-lines * width // 8) : first + width] = False
            first += width
    return np.flatnonzero(packed)


def product_pack(q: np.ndarray, bits: int) -> np.ndarray:
    """Pack q int8 [O, E] for products: uint8 [bytes]."""
    padded = np.pad(q, [(0, -q.shape[0] % TILE_OUTPUTS), (0, -q.shape[1] % TILE_CHANNELS)])
    codes = _codes_to_tiles((padded + qmax(bits)).astype(np.uint8))
    planes, place = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            fields = (codes >> place & (1 << width) - 1).reshape(*codes.shape[:2], width, 8 // width, 64)
            planes.append(sum(fields[..., i, :] << i * width for i in range(8 // width)))
            place += width
    whole = np.concatenate(planes, axis=2).astype(np.uint8)
    return whole.reshape(len(codes), codes.shape[1] * bits, 64)[:, _packed_lines(q.shape[1], bits)].ravel()


def product_unpack(packed: np.ndarray, outputs: int, channels: int, bits: int) -> np.ndarray:
    """Unpack to q int8 [outputs, channels]."""
    kept, blocks, tiles = _packed_lines(channels, bits), -(-outputs // TILE_OUTPUTS), -(-channels // TILE_CHANNELS)
    whole = np.zeros((blocks, tiles * bits, 64), np.uint8)
    whole[:, kept] = packed.reshape(blocks, kept.size, 64)
    lines = whole.reshape(blocks, tiles, bits, 64)
    codes, place, first = np.uint8(0), 0, 0
    for width in (8, 4, 2, 1):
        if bits & width:
            plane = lines[:, :, first : first + width, None]
            fields = [plane[..., 0, :] >> i * width & (1 << width) - 1 for i in range(8 // width)]
            codes = codes | np.stack(fields, axis=3).reshape(blocks, tiles, 8, 64) << place
            place, first = place + width, first + width
    return (_tiles_to_codes(codes)[:outputs, :channels].astype(np.int16) - qmax(bits)).astype(np.int8)


def _scales(scale: np.ndarray, outputs: int, group: int, expanded: int) -> np.ndarray:
    """Give each integer its scale, [outputs, expanded] or what broadcasts to it."""
    if group:
        return np.repeat(scale.transpose(0, 2, 1).reshape(-1, scale.shape[1])[:outputs], group, axis=1)[:, :expanded]
    return np.broadcast_to(scale.reshape(-1, 1), (outputs, 1))


def product_rows(
    index: np.ndarray,
    packed: np.ndarray,
    scale: np.ndarray,
    copies: np.ndarray,
    outputs: int,
    group: int,
    bits: int,
    channels: int,
) -> np.ndarray:
    """Give rows of what a packed weight stands for, float32 [R, channels], copies added to their channel."""
    q = product_unpack(packed, outputs, channels + copies.size, bits)[index].astype(np.float32)
    scales = np.broadcast_to(_scales(scale, outputs, group, q.shape[1]), (outputs, q.shape[1]))[index]
    w = q * scales if group else q
    rows = w[:, :channels].copy()
    for i, channel in enumerate(copies):
        rows[:, channel] += w[:, channels + i]
    return rows if group else rows * scales[:, :channels]


def _scale_of_rows(x: np.ndarray, most: np.float32, given: np.ndarray) -> np.ndarray:
    """Give each row [R, C] its scale, max |x| / most where none is given; NaN where it cannot have one."""
    largest, own = np.abs(x).max(axis=1, initial=0), given.size == 0
    scale = np.maximum(largest / most, np.float32(2.0**-149))
    scale = np.where(largest == 0, np.float32(1), scale) if own else np.broadcast_to(given.ravel(), largest.shape)
    return np.where(np.isnan(largest) | (own & np.isinf(largest)), np.nan, scale).astype(np.float32)


def round_rows(x: np.ndarray, scale: np.ndarray, least: int, most: int) -> np.ndarray:
    """Round rows [R, C] to whole numbers in steps of their scales [R]; 0 where that is NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        q = np.clip(np.rint(x / np.where(np.isnan(scale), np.float32(1), scale)[:, None]), least, most)
    return np.where(np.isnan(scale)[:, None], 0, np.nan_to_num(q)).astype(np.int64)


def product(
    x: np.ndarray,
    packed: np.ndarray,
    scale: np.ndarray,
    copies: np.ndarray,
    outputs: int,
    group: int,
    bits: int,
    bias: np.ndarray,
    row_bits: int,
    row_scale: np.ndarray,
    row_signed: bool,
) -> np.ndarray:
    """Compute x w^T + bias, float32 [..., outputs]; an empty row_scale is each row's own.

    row_bits 0: rows are whole numbers in steps of max |row| / (2^23 - 2^16), as exact as floats.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    q = product_unpack(packed, outputs, rows.shape[1] + copies.size, bits)
    least, most = (-qmax(row_bits), qmax(row_bits)) if row_bits and row_signed else (0, 2**row_bits - 1)
    if not row_bits:
        least, most, row_scale = -MOST_STEPS, MOST_STEPS, np.zeros(0, np.float32)
    scales = _scale_of_rows(rows, np.float32(most), row_scale)
    rows = round_rows(rows, scales, least, most)
    rows = np.concatenate([rows, rows[:, copies]], axis=1)
    total = np.zeros((len(rows), outputs), np.float32)
    span = SEGMENT if group == 0 or group % SEGMENT == 0 else group if group < SEGMENT else group & -group
    for begin in range(0, rows.shape[1], span):
        sums = rows[:, begin : begin + span] @ q[:, begin : begin + span].T.astype(np.int64)
        total += sums.astype(np.float32) * (scale[:, begin // group].ravel()[:outputs] if group else scale)
    total *= scales[:, None]
    if bias.size:
        total += bias
    return total.reshape(*x.shape[:-1], outputs)
