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

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray | Tensor
BLOCK = 128  # columns between updates of all that follow
DAMPING = 0.01  # added to H's diagonal, a share of its mean


class Compensation:
    """Of one weight under one split plan; its factorization serves many scales.

    Args:
        w: float32 [O, C, ...].
        source, depth, offset: the split plan [G (C + n)], see functional.SplitPlan.
        bits: 2 to 8.
        second: sum or mean of x x^T, [G, C K, C K], the K values of a filter side by side. Columns whose input is
            always 0 are rounded to nearest.

    Raises:
        ValueError: second has a direction in which it is clearly negative.
    """

    def __init__(self, w: Array, source: Array, depth: Array, offset: Array, bits: int, second: Tensor) -> None:
        G, N = second.shape[:2]
        self.w = as_tensor(w).float()
        self.second = second.to(self.w.device).double()
        self.order = self.second.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        self.factor = _factor(self.second, self.order)
        parts = _parts(*(as_tensor(part).view(G, -1) for part in (source, depth, offset)), w.shape[1], bits)
        self.parts = parts.take(self.order // max(N // max(w.shape[1], 1), 1))

    def __call__(self, scale: Array) -> Array:
        """The weight that nearest rounding takes to GPTQ's integers: whole multiples of scale, float32 like w."""
        G, N = self.order.shape
        by_output = as_tensor(scale).expand(self.w.shape[0]).view(-1, *[1] * (self.w.dim() - 1))
        if not self.w.numel():
            return _as(scale, self.w)
        u = (self.w / by_output).reshape(G, -1, N).transpose(1, 2).double()  # as the kernels divide; columns first
        to_order = self.order[:, :, None].expand_as(u)
        rounded = _round(u.gather(1, to_order), self.factor, self.parts)
        rounded = torch.empty_like(rounded).scatter_(1, to_order, rounded)
        return _as(scale, rounded.transpose(1, 2).reshape(self.w.shape).float() * by_output)

    def error(self, w_hat: Array, gain: float) -> Array:
        """How far the outputs are off with w_hat instead of w, float64 [O]: d H d^T + gain (d H w^T)^2 / w H w^T.

        For rows d = w_hat - w and w. The second part is the change of the outputs' gain, see functional.output_error.
        """
        H = self.second
        shape = len(H), len(self.w) // len(H), H.shape[1]
        v, given = (x.reshape(shape).double() for x in (self.w, as_tensor(w_hat)))
        d = given - v
        dH, power = d @ H, ((v @ H) * v).sum(-1)
        of_gain = (dH * v).sum(-1) ** 2 / (power + (power == 0))
        return _as(w_hat, ((dH * d).sum(-1) + gain * of_gain).flatten())


def as_tensor(x: Array) -> Tensor:
    """A tensor of the same values; of an array a copy, as it may be read-only or laid out backwards."""
    return x if isinstance(x, Tensor) else torch.from_numpy(np.array(x, order="C"))


def _as(like: Array, x: Tensor) -> Array:
    """The tensor as an array of the other's kind."""
    return x if isinstance(like, Tensor) else x.numpy()


def _factor(second: Tensor, order: Tensor) -> Tensor:
    """R_ij / R_jj, float64 [G, N, N], of the damped H with its columns in this order."""
    H = second.gather(1, order[:, :, None].expand_as(second)).gather(2, order[:, None].expand_as(second))
    mean = H.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    damping = DAMPING * mean + (mean == 0)
    for _ in range(3):  # what was summed up in float32 may be further off
        H.diagonal(dim1=1, dim2=2).add_(damping)
        lower, failed = torch.linalg.cholesky_ex(H.flip(1, 2))
        if not failed.any():
            upper = lower.flip(1, 2)
            return upper / upper.diagonal(dim1=1, dim2=2)[:, None]
        damping = damping * 10
    raise ValueError("the second moments are not positive semidefinite: they are no sums of x x^T")


def _round(u: Tensor, factor: Tensor, parts: _Parts) -> Tensor:
    """The integers whose parts' sums T are Q(v); both [G, N, O / G], like u."""
    v, error, rounded = u.clone(), torch.empty_like(u), torch.empty_like(u)
    split = (parts.limit[..., 1:] > 0).any(0).any(-1).tolist()
    for start in range(0, u.shape[1], BLOCK):
        stop = min(start + BLOCK, u.shape[1])
        for j in range(start, stop):
            rounded[:, j] = (v[:, j] + 0.5).floor()
            error[:, j] = parts.column(j, split[j]).sum(rounded[:, j]) - u[:, j]
            if j + 1 < stop:
                v[:, j + 1 : stop] -= factor[:, j, j + 1 : stop, None] * error[:, j, None]
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

    def column(self, j: int, split: bool) -> _Parts:
        """Of one column, for its O / G rows; the first part alone where no group splits it."""
        return _Parts(*(x[:, j, None, : None if split else 1] for x in self))

    def sum(self, whole: Tensor) -> Tensor:
        """T [G, O / G] of the whole numbers M of one column."""
        parts = ((whole[..., None] + self.offset) * self.shrink).floor()
        return parts.minimum(self.limit).maximum(-self.limit).sum(-1)


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
