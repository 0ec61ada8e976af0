"""A quantized weight in k bits for each integer: what a packed layer holds of it, and what it multiplies.

Weights [O, C + n] are in the tiles that products read (csrc/tiles.c), those of convolutions the gapless codes of files
(csrc/pack.c). Where that takes less, the two halves of each split channel are added up, in one bit more. Where a
group of input channels has its own scale, products count groups over all columns: columns of zeros fill up the last one
of the original channels, lest copies lie in it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ocs.kernels.composite_product import packed_bytes, tile_scales, untile_scales
from ocs.kernels.constants import MAX_BITS, TILE_OUTPUTS, qmax
from ocs.nn.state import with_originals
from ocs.weight.blocks import fold_weight


class Form(NamedTuple):
    """How the integers of a weight are packed."""

    shape: tuple[int, ...]  # of the integers [O, C + n, ...]
    groups: int
    channels: int  # C, the original input channels of one group
    bits: int  # of each code
    added_up: bool = False  # whether codes are of sums over a channel and its copy
    group: int = 0  # the input channels that share a scale, where scales are [O, B], or tile_scales of them

    @property
    def tiled(self) -> bool:
        """Whether products read it as it is."""
        return len(self.shape) == 2

    @property
    def held_channels(self) -> int:
        """The columns that a tiled weight has codes of."""
        return self.channels if self.added_up else self.shape[1] + self.padding

    @property
    def padding(self) -> int:
        """The columns of zeros between the original channels of a tiled weight and its copies."""
        return -self.channels % self.group if self.group and self.tiled and self.shape[1] > self.channels else 0

    def packed_bytes(self) -> int:
        """Count the bytes of the codes."""
        if self.tiled:
            return packed_bytes(self.shape[0], self.held_channels, self.bits)
        return (math.prod(self.shape) * self.bits + 7) // 8


class RowGrid(NamedTuple):
    """How a product rounds the rows of its input."""

    bits: int = 0  # 0: not at all
    scale: Tensor | None = None  # None: each row has its own, as it arrives
    signed: bool = True


FLOAT_ROWS = RowGrid()


class PackedWeight(NamedTuple):
    """A weight in k bits for each integer."""

    codes: Tensor  # uint8 [form.packed_bytes()]
    scale: Tensor  # float32 [], [O], or see Form.group
    copies: Tensor  # int32 [groups n]: the original channel of each copy, group by group, those of zeros before them
    form: Form

    @staticmethod
    def of(
        ints: Tensor, scale: Tensor, source: Tensor, bits: int, groups: int, channels: int, group: int = 0
    ) -> PackedWeight:
        """Pack integers int8 [O, C + n, ...]; source [groups (C + n)] is the original channel of each column."""
        if ints.is_meta:
            raise ValueError("its weight holds no values yet: load them first (it is on the meta device)")
        copies = source.view(groups, -1)[:, channels:].flatten().int()
        form = Form(tuple(ints.shape), groups, channels, bits, group=group)
        if not form.tiled:
            return PackedWeight(torch.ops.ocs.pack(ints, bits), scale, copies, form)
        if group:
            own, copied = ints.tensor_split([channels], 1)
            padded = torch.cat([own, own.new_zeros(len(ints), form.padding), copied], 1)
            copies = torch.nn.functional.pad(copies, (form.padding, 0))
            return PackedWeight(torch.ops.ocs.product_pack(padded, bits), tile_scales(scale), copies, form)
        smaller = form._replace(bits=bits + 1, added_up=True)
        if bits < MAX_BITS and smaller.packed_bytes() < form.packed_bytes() and _are_halves(ints, copies, channels):
            sums = ints[:, :channels].index_add(1, copies, ints[:, channels:])
            return PackedWeight(torch.ops.ocs.product_pack(sums, bits + 1), scale, copies, smaller)
        return PackedWeight(torch.ops.ocs.product_pack(ints, bits), scale, copies, form)

    @staticmethod
    def state(codes: Tensor, scale: Tensor, copies: Tensor, form: Form) -> tuple[Tensor, Tensor, Tensor]:
        """Unpack integers int8 [O, C + n, ...], and give scale and source of these."""
        weight = PackedWeight(codes, scale, copies, form)
        of_groups = form.group and form.tiled
        return weight.integers(), untile_scales(scale, form.shape[0]) if of_groups else scale, weight.source()

    def integers(self) -> Tensor:
        """Unpack the integers, int8 [O, C + n, ...]."""
        form = self.form
        if not form.tiled:
            return torch.ops.ocs.unpack(self.codes, math.prod(form.shape), form.bits).view(form.shape)
        held = torch.ops.ocs.product_unpack(self.codes, form.shape[0], form.held_channels, form.bits)
        if form.padding:
            held = torch.cat([held[:, : form.channels], held[:, form.channels + form.padding :]], 1)
        return _halves(held, self.copies.long()) if form.added_up else held

    def source(self) -> Tensor:
        """Give the original channel of each column, int64 [groups (C + n)]."""
        return with_originals(self.copies[self.form.padding :].long(), self.form.groups, self.form.channels)

    def operands(self) -> tuple[Tensor, Tensor, Tensor, int, int, int]:
        """Give the six arguments that stand for a tiled weight in torch.ops.ocs.product and its like."""
        copies = self.copies[:0] if self.form.added_up else self.copies
        return self.codes, self.scale, copies, self.form.shape[0], self.form.group, self.form.bits

    def multiply(self, x: Tensor, bias: Tensor | None, grid: RowGrid = FLOAT_ROWS) -> Tensor:
        """Compute x w^T + bias, x [..., C], in the dtype that torch's products have: x's, or that of autocast."""
        y = self.product(x, bias, grid)
        return y.to(torch.get_autocast_dtype(x.device.type)) if is_autocast(x) else y

    def product(self, x: Tensor, bias: Tensor | None, grid: RowGrid = FLOAT_ROWS) -> Tensor:
        """Compute x w^T + bias, x [..., C], in x's dtype."""
        if x.shape[-1:] != (self.form.channels,):  # the codes are padded: they fit other numbers of channels, too
            raise RuntimeError(f"a packed weight expects {self.form.channels} input channels, not {list(x.shape)}")
        none = self.scale.new_empty(0)
        bias, scale = (none if each is None else each.detach() for each in (bias, grid.scale))
        return torch.ops.ocs.product.default(x, *self.operands(), bias, grid.bits, scale, grid.signed)

    def part(self, begin: int, end: int) -> PackedWeight | None:
        """Give outputs begin .. end - 1 of a tiled weight, without a copy; None where they share a tile with others."""
        if begin % TILE_OUTPUTS or (end % TILE_OUTPUTS and end != self.form.shape[0]):
            return None
        block = self.form.packed_bytes() // -(-self.form.shape[0] // TILE_OUTPUTS)
        codes = self.codes[begin // TILE_OUTPUTS * block : -(-end // TILE_OUTPUTS) * block]
        form = self.form._replace(shape=(end - begin, self.form.shape[1]))
        scale = self.scale
        if scale.dim():
            scale = scale[begin // TILE_OUTPUTS : -(-end // TILE_OUTPUTS)] if self.form.group else scale[begin:end]
        return PackedWeight(codes, scale, self.copies, form)

    def rows(self, index: Tensor) -> Tensor:
        """Dequantize the rows [..., C] that an index asks for, float32."""
        rows = torch.ops.ocs.product_rows(index.reshape(-1).long(), *self.operands(), self.form.channels)
        return rows.view(*index.shape, self.form.channels)

    def folded(self) -> Tensor:
        """Dequantize to float32 [O, C, ...], with the copies added back onto their source channel."""
        if self.form.tiled:
            return self.rows(torch.arange(self.form.shape[0], device=self.codes.device))
        form = self.form
        return fold_weight(self.integers(), self.scale, self.source(), form.groups, form.channels, form.group)

    def problem(self, codes: str) -> str:
        """Say why this, from a stranger's state, is no such weight, or ""; codes: the name of those."""
        try:
            self.integers()
        except RuntimeError:
            return f"{codes} is not of {self.form.bits}-bit integers"
        scale, copies = self.scale.float(), self.copies
        if not bool((scale.isfinite() & (scale > 0)).all()):
            return f"{codes} has a scale that is not positive and finite (in float32)"
        channels = self.form.channels
        first = channels * torch.arange(self.form.groups, device=copies.device)[:, None]
        within = copies.long().view(self.form.groups, -1) - first
        if copies.is_floating_point() or not bool(((within >= 0) & (within < channels)).all()):
            return f"{codes} has copies that are none of its channels"
        return ""


def is_autocast(x: Tensor) -> bool:
    """Tell whether autocast is on for products of such a tensor."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def _halves(sums: Tensor, copies: Tensor) -> Tensor:
    """Cut the channels that are split once into floor(M / 2) and, appended, floor((M + 1) / 2)."""
    halved = sums.index_select(1, copies)
    return torch.cat([sums.index_copy(1, copies, halved >> 1), (halved + 1) >> 1], 1)


def _are_halves(ints: Tensor, copies: Tensor, channels: int) -> bool:
    """Tell whether these are the halves of sums that fit int8, each channel being split once at most."""
    if copies.unique().numel() < copies.numel():
        return False
    sums = ints[:, :channels].short().index_add(1, copies, ints[:, channels:].short())
    fits = bool((sums.abs() <= qmax(MAX_BITS)).all())
    return fits and torch.equal(_halves(sums.to(torch.int8), copies.long()), ints)
