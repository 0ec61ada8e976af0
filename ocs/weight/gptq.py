"""Rounding by the inputs' second moments: Frantar et al., "GPTQ", ICLR 2023, arXiv 2210.17323, on top of splitting.

Column by column, those of the largest inputs first, the error of each is compensated in those not yet rounded, so that
outputs change least: for rows d = w_hat - w the error is d H d^T with H = E[x x^T]. With H = R R^T, R upper triangular,
it is the sum over columns j of

    R_jj^2 (T_j - v_j)^2,    v_j = u_j - sum_{i < j} (T_i - u_i) R_ij / R_jj

in grid units u = w / scale, so that T_j = Q(v_j) is what remains to be done (Chee et al., "QuIP", 2023, theorem 6, show
that this is GPTQ); one Cholesky factorization gives R. What is rounded is the sum T of a channel's integers and its
copies', which is what the layer computes with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ocs.weight.arguments import as_tensor
from ocs.weight.types import Array

BLOCK = 128  # columns between updates of all that follow
ELEMENTS = 2**22  # of weights that are rounded side by side
DAMPING, SHRINKAGE = 0.03, 0.1  # see Hessian


class Hessian:
    """H of what one weight meets, and its factorization, which is made once and takes twice the memory.

    second: sum or mean of x x^T, [G, C K, C K], the K values of a filter side by side. count: over so many vectors x;
    0 where that is not known. What few vectors seem to have in common is mostly chance: a share of the diagonal's mean
    is added to the diagonal, DAMPING and SHRINKAGE for each column per vector.
    """

    def __init__(self, second: Tensor, count: int = 0) -> None:
        self.second, self.count = second, count

    @cached_property
    def order(self) -> Tensor:
        """int64 [G, C K]: the columns, those of the largest inputs first."""
        return self.second.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)

    @cached_property
    def factor(self) -> Tensor:
        """R_ij / R_jj in that order, float64 [G, C K, C K]; a ValueError where H is clearly negative somewhere."""
        shrinkage = SHRINKAGE * self.second.shape[1] / self.count if self.count else 0.0
        return _factor(self.second, self.order, DAMPING + shrinkage)


class OutputErrors:
    """What the outputs of one weight are off by.

    Args:
        w: float32 [O, C, ...].
        hessian: of what it meets.
    """

    def __init__(self, w: Array, hessian: Hessian) -> None:
        self.w = as_tensor(w).float()
        self.second = hessian.second.to(self.w.device)
        G, N = self.second.shape[:2]
        self.rows = self.w.reshape(G, len(self.w) // G, N)

    @property
    def power(self) -> Tensor:
        """w H w^T, float64 [G, O / G]."""
        return self._of_outputs[1]

    @cached_property
    def _of_outputs(self) -> tuple[Tensor, Tensor]:
        """w H [G, O / G, C K], and the outputs' power, w H w^T."""
        product = self.rows @ self.second.to(self.rows)
        return product, (product * self.rows).sum(-1, dtype=torch.float64)

    def error(self, w_hat: Array, gain: float) -> Array:
        """How far the outputs are off with w_hat instead of w, float64 [O]: d H d^T + gain (d H w^T)^2 / w H w^T.

        For rows d = w_hat - w and w. The second part is the change of the outputs' gain, see functional.output_error.
        """
        product, power = self._of_outputs
        d = as_tensor(w_hat).reshape(self.rows.shape) - self.rows
        of_outputs = ((d @ self.second.to(d)) * d).sum(-1, dtype=torch.float64)
        of_gain = (product * d).sum(-1, dtype=torch.float64) ** 2 / (power + (power == 0))
        error = (of_outputs + gain * of_gain).flatten()
        return error if isinstance(w_hat, Tensor) else error.numpy()


class Compensation(OutputErrors):
    """Of one weight under one split plan.

    Args:
        w: float32 [O, C, ...].
        source, depth, offset: the split plan [G (C + n)], see functional.SplitPlan.
        bits: 2 to 8.
        hessian: of what it meets. Columns whose input is always 0 are rounded to nearest.

    Raises:
        ValueError: the second moments have a direction in which they are clearly negative.
    """

    def __init__(self, w: Array, source: Array, depth: Array, offset: Array, bits: int, hessian: Hessian) -> None:
        super().__init__(w, hessian)
        G, N = self.second.shape[:2]
        self.order, self.factor = hessian.order.to(self.w.device), hessian.factor.to(self.w.device)
        parts = _parts(*(as_tensor(part).view(G, -1) for part in (source, depth, offset)), w.shape[1], bits)
        self.parts = parts.take(self.order // max(N // max(w.shape[1], 1), 1))

    def on_grids(self, scales: Sequence[Array]) -> Iterator[Array]:
        """For each scale the weight that nearest rounding takes to GPTQ's integers: whole multiples of it, like w.

        scales: float32 [] or [O]. Some run side by side.
        """
        at_once = max(1, ELEMENTS // max(self.w.numel(), 1))
        for first in range(0, len(scales), at_once):
            for w, like in zip(self._on_grids(scales[first : first + at_once]), scales, strict=False):
                yield w if isinstance(like, Tensor) else w.numpy()

    def _on_grids(self, scales: Sequence[Array]) -> Tensor:
        G, R, N = self.rows.shape
        if not self.w.numel():
            return self.w.expand(len(scales), *self.w.shape)
        of_row = torch.stack([as_tensor(scale).expand(len(self.w)).view(G, R, 1) for scale in scales], 1)
        u = (self.rows[:, None] / of_row).flatten(1, 2).transpose(1, 2).double()  # as the kernels divide; columns first
        to_order = self.order[:, :, None].expand_as(u)
        rounded = _round(u.gather(1, to_order), self.factor, self.parts)
        rounded = torch.empty_like(rounded).scatter_(1, to_order, rounded).transpose(1, 2).float()
        return (rounded.view(G, -1, R, N) * of_row).transpose(0, 1).reshape(-1, *self.w.shape)


def _factor(second: Tensor, order: Tensor, share: float) -> Tensor:
    """R_ij / R_jj, float64 [G, N, N], of the damped H with its columns in this order."""
    backwards = order.flip(1)
    group = torch.arange(len(order), device=order.device)[:, None, None]
    H = second[group, backwards[:, :, None], backwards[:, None]].double()
    mean = H.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    damping = share * mean + (mean == 0)
    for _ in range(3):  # what was summed up in float32 may be further off
        H.diagonal(dim1=1, dim2=2).add_(damping)
        lower, failed = torch.linalg.cholesky_ex(H)
        if not failed.any():
            return (lower / lower.diagonal(dim1=1, dim2=2)[:, None]).flip(1, 2)
        damping = damping * 10
    raise ValueError("the second moments are not positive semidefinite: they are no sums of x x^T")


def _round(u: Tensor, factor: Tensor, parts: _Parts) -> Tensor:
    """The whole numbers whose parts' sums T are Q(v); both [G, N, rows], like u."""
    v, error, rounded = u.clone(), torch.empty_like(u), torch.empty_like(u)
    split = (parts.limit[..., 1:] > 0).any(0).any(-1).tolist()
    for start in range(0, u.shape[1], BLOCK):
        stop = min(start + BLOCK, u.shape[1])
        for j in range(start, stop):
            rounded[:, j] = (v[:, j] + 0.5).floor_()
            error[:, j] = parts.sum(rounded[:, j], j, split[j]) - u[:, j]
            v[:, j + 1 : stop].baddbmm_(factor[:, j, j + 1 : stop, None], error[:, j, None], alpha=-1)
        v[:, stop:].baddbmm_(factor[:, start:stop, stop:].transpose(1, 2), error[:, start:stop], alpha=-1)
    return rounded


class _Parts(NamedTuple):
    """A channel and its copies: of the whole number M, part i of 2^m gets floor((M + i) / 2^m), within +-qmax.

    Together that is M where none saturates. Each float64 [G, N, P], P the most parts that a channel has; limit is 0
    where there are fewer.
    """

    shrink: Tensor  # 2^-m
    offset: Tensor  # i
    limit: Tensor  # qmax

    def take(self, channel: Tensor) -> _Parts:
        """Of these channels [G, N]."""
        return _Parts(*(x.gather(1, channel[:, :, None].expand(-1, -1, x.shape[2])) for x in self))

    def sum(self, whole: Tensor, j: int, split: bool) -> Tensor:
        """T [G, rows] of the whole numbers of column j, which some group splits or none."""
        if not split:
            return whole.minimum(self.limit[:, j, :1]).maximum(-self.limit[:, j, :1])
        shrink, offset, limit = (x[:, j, None] for x in self)
        return ((whole[..., None] + offset) * shrink).floor_().minimum(limit).maximum(-limit).sum(-1)


def _parts(source: Tensor, depth: Tensor, offset: Tensor, channels: int, bits: int) -> _Parts:
    """Of the channels [G, C] of a plan [G, C + n]."""
    groups = torch.arange(source.shape[0], device=source.device)[:, None]
    channel, at = (source - channels * groups).sort(dim=1, stable=True)
    counts = torch.zeros(len(groups), channels, dtype=torch.int64, device=source.device)
    counts.scatter_add_(1, channel, torch.ones_like(channel))
    place = torch.arange(source.shape[1], device=source.device) - (counts.cumsum(1) - counts).gather(1, channel)
    parts = _Parts(
        *(
            counts.new_zeros(*counts.shape, int(counts.max()) if counts.numel() else 0, dtype=torch.float64)
            for _ in range(3)
        )
    )
    values = (torch.exp2(-depth.double()), offset.double(), torch.full(depth.shape, 2.0 ** (bits - 1) - 1))
    for part, value in zip(parts, values, strict=True):
        part[groups, channel, place] = value.to(part).gather(1, at)
    return parts
