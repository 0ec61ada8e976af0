"""Rounding by the inputs' second moments: Frantar et al., "GPTQ", ICLR 2023, arXiv 2210.17323, on top of splitting.

Column by column, those of the largest inputs first, the error of each is compensated in those not yet rounded, so that
outputs change least: for rows d = w_hat - w the error is d H d^T with H = E[x x^T]. With H = R R^T, R upper triangular,
it is the sum over columns j of

    R_jj^2 (T_j - v_j)^2,    v_j = u_j - sum_{i < j} (T_i - u_i) R_ij / R_jj

in grid units u = w / scale, so that T_j = Q(v_j) is what remains to be done (Chee et al., "QuIP", 2023, theorem 6, show
that this is GPTQ); one Cholesky factorization gives R. A column of a split channel becomes the parts of the whole
number M = Q(v_j), and T_j is their sum, which is what the layer computes with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ocs.kernels.constants import qmax
from ocs.weight.arrays import as_tensor
from ocs.weight.hessian import Hessian
from ocs.weight.types import Array

BLOCK = 128  # columns between updates of all that follow
ELEMENTS = 2**22  # of weights that are rounded side by side


class Compensation:
    """Rounds one weight under one split plan to integers, at any scale.

    Args:
        w: float32 [O, C, ...].
        source, depth, offset: the split plan [G (C + n)], see functional.SplitPlan.
        bits: 2 to 8.
        hessian: of what it meets. Columns whose input is always 0 are rounded to nearest.

    Raises:
        ValueError: the second moments have a direction in which they are clearly negative.
    """

    def __init__(self, w: Array, source: Array, depth: Array, offset: Array, bits: int, hessian: Hessian) -> None:
        self.w, self.tensors = as_tensor(w).float(), isinstance(w, Tensor)
        self.order, self.factor = hessian.order.to(self.w.device), hessian.factor.to(self.w.device)
        G, C, K = len(self.order), self.w.shape[1], math.prod(self.w.shape[2:])
        source, depth, offset = (as_tensor(part).view(G, -1) for part in (source, depth, offset))
        channel = source - C * torch.arange(G, device=source.device)[:, None]
        column = (channel[:, :, None] * K + torch.arange(K, device=channel.device)).flatten(1)
        self.position = self.order.argsort(1).gather(1, column)  # in `order`, of each expanded column
        self.shape = (len(self.w), channel.shape[1], *self.w.shape[2:])  # of the integers
        parts = _Parts(torch.exp2(-depth.double()), offset.double(), torch.full_like(depth, qmax(bits)).double())
        self.expanded = _Parts(*(x.repeat_interleave(K, 1)[:, :, None] for x in parts))
        self.parts = parts.by_channel(channel, C).take(self.order // max(K, 1))

    def integers(self, scales: Sequence[Array]) -> Iterator[Array]:
        """Round to int8 [O, C + n, ...] for each scale, float32 [] or [O], in turn; some run side by side."""
        at_once = max(1, ELEMENTS // max(self.w.numel(), 1))
        for first in range(0, len(scales), at_once):
            for ints in self._integers(scales[first : first + at_once]):
                yield ints if self.tensors else ints.numpy()

    def _integers(self, scales: Sequence[Array]) -> Tensor:
        """Round to int8 [S, O, C + n, ...] for S scales."""
        S, (G, N) = len(scales), self.order.shape
        if not self.w.numel():
            return self.w.new_zeros(S, *self.shape, dtype=torch.int8)
        of_row = torch.stack([as_tensor(scale).expand(len(self.w)).view(G, -1, 1) for scale in scales], 1)
        rows = self.w.reshape(G, 1, -1, N) / of_row  # as the kernels divide
        u = _columns(rows.flatten(1, 2).transpose(1, 2).double(), self.order)
        whole = _columns(_round(u, self.factor, self.parts), self.position)
        ints = self.expanded.of(whole).to(torch.int8)
        return ints.view(G, ints.shape[1], S, -1).permute(2, 0, 3, 1).reshape(S, *self.shape)


def _columns(x: Tensor, index: Tensor) -> Tensor:
    """Gather the columns index [G, M] of x [G, N, rows]."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def _round(u: Tensor, factor: Tensor, parts: _Parts) -> Tensor:
    """Round column by column to the whole numbers M = Q(v); both float64 [G, N, rows], like u."""
    v, error, whole = u.clone(), torch.empty_like(u), torch.empty_like(u)
    split = (parts.limit[..., 1:] > 0).any(0).any(-1).tolist()
    for start in range(0, u.shape[1], BLOCK):
        stop = min(start + BLOCK, u.shape[1])
        for j in range(start, stop):
            whole[:, j] = (v[:, j] + 0.5).floor_()
            error[:, j] = parts.sum(whole[:, j], j, split[j]) - u[:, j]
            v[:, j + 1 : stop].baddbmm_(factor[:, j, j + 1 : stop, None], error[:, j, None], alpha=-1)
        v[:, stop:].baddbmm_(factor[:, start:stop, stop:].transpose(1, 2), error[:, start:stop], alpha=-1)
    return whole


class _Parts(NamedTuple):
    """What channels and their copies get of a whole number M: part i of 2^m gets floor((M + i) / 2^m), within +-qmax.

    Each float64, all of one shape. A channel's parts add up to M where none saturates.
    """

    shrink: Tensor  # 2^-m
    offset: Tensor  # i
    limit: Tensor  # qmax; 0 where there is no part

    def of(self, whole: Tensor) -> Tensor:
        """Compute the parts of whole numbers, which broadcast with them."""
        return (whole + self.offset).mul_(self.shrink).floor_().clamp_(-self.limit, self.limit)

    def by_channel(self, channel: Tensor, channels: int) -> _Parts:
        """Collect parts [G, C + n] of these channels as [G, C, P], P the most parts that a channel has."""
        group = torch.arange(len(channel), device=channel.device)[:, None]
        ordered, at = channel.sort(dim=1, stable=True)
        counts = channel.new_zeros(len(channel), channels).scatter_add_(1, channel, torch.ones_like(channel))
        first = counts.cumsum(1) - counts
        place = torch.arange(channel.shape[1], device=channel.device) - first.gather(1, ordered)
        most = int(counts.max()) if counts.numel() else 0
        collected = _Parts(*(x.new_zeros(*counts.shape, most) for x in self))
        for x, ours in zip(collected, self, strict=True):
            x[group, ordered, place] = ours.gather(1, at)
        return collected

    def take(self, channel: Tensor) -> _Parts:
        """Repeat parts [G, C, P] for each of these channels [G, N]."""
        return _Parts(*(x.gather(1, channel[:, :, None].expand(-1, -1, x.shape[2])) for x in self))

    def sum(self, whole: Tensor, j: int, split: bool) -> Tensor:
        """Sum the parts of the whole numbers [G, rows] of column j; split: some group splits its channel."""
        if split:
            return _Parts(*(x[:, j, None] for x in self)).of(whole[..., None]).sum(-1)
        limit = self.limit[:, j, :1]
        return whole.minimum(limit).maximum(-limit)
