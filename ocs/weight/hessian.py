"""The second moments of what a weight meets, E[x x^T], and their factorization.

Frantar et al., "GPTQ", ICLR 2023, arXiv 2210.17323, round column by column, those of the largest inputs first; the
error of each is compensated in those not yet rounded, so that outputs change least: for rows d = w_hat - w the error is
d H d^T with H = E[x x^T]. With H = R R^T, R upper triangular, it is the sum over columns j of

    R_jj^2 (T_j - v_j)^2,    v_j = u_j - sum_{i < j} (T_i - u_i) R_ij / R_jj

in grid units u = w / scale, so that T_j = Q(v_j) is what remains to be done (Chee et al., "QuIP", 2023, theorem 6, show
that this is GPTQ); one Cholesky factorization gives R. A column of a split channel becomes the parts of the whole
number M = Q(v_j), and T_j is their sum, which is what the layer computes with (csrc/gptq.c).

What many columns have in common takes memory by the square of their number. Where that is too much, H is kept in blocks
of neighbouring columns, as if those of one block had nothing in common with others.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

DAMPING, SHRINKAGE = 0.03, 0.1  # see Hessian
ROWS = 256  # that are copied at a time
ELEMENTS = 2**20  # of blocks that are factorized side by side


def blocks_of(columns: int, width: int) -> int:
    """Count the blocks of so many columns each, the last of which may be cut short."""
    return -(-columns // width) if width else 0


def in_blocks(rows: Tensor, width: int) -> Tensor:
    """View the columns of rows [G, R, N] in blocks of so many, zeros after the last: [G B, R, width]."""
    blocks = blocks_of(rows.shape[2], width)
    if blocks <= 1:
        return rows
    padded = F.pad(rows, (0, blocks * width - rows.shape[2]))
    return padded.unflatten(2, (blocks, width)).transpose(1, 2).flatten(0, 1)


class Hessian:
    """H of what one weight meets, and its factorization, which is made once and takes as much memory.

    second: sum or mean of x x^T, [G, C K, C K], the K values of a filter side by side; or in B blocks of L columns,
    [G B, L, L], zeros where the last has none. count: over so many vectors x; 0 where that is not known. What few
    vectors seem to have in common is mostly chance: a share of the diagonal's mean is added to the diagonal, DAMPING
    and SHRINKAGE for each column per vector. order: of rounding, if not the one below.
    """

    def __init__(self, second: Tensor, count: int = 0, order: Tensor | None = None) -> None:
        self.second, self.count = second, count
        if order is not None:
            self.order = order

    def of_group(self, g: int, groups: int) -> Hessian:
        """Give that of one of so many groups."""
        return Hessian(self.second.chunk(groups)[g], self.count) if groups > 1 else self

    @cached_property
    def order(self) -> Tensor:
        """int64 [G B, L]: the columns of each block, those of the largest inputs first."""
        return self.second.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)

    @cached_property
    def factor(self) -> Tensor:
        """R_ij / R_jj at [j, i], R_jj^2 at [j, j], float32 [G B, L, L]; a ValueError where H is clearly negative."""
        shrinkage = SHRINKAGE * self.second.shape[1] / self.count if self.count else 0.0
        factor = self.second.new_empty(self.second.shape, dtype=torch.float32)
        at_once = max(1, ELEMENTS // max(self.second[:1].numel(), 1))
        each = zip(*(x.split(at_once) for x in (factor, self.second, self.order.flip(1))), strict=True)
        for of_blocks, second, backwards in each:
            _factor(of_blocks, second, backwards, DAMPING + shrinkage)
        return factor

    def factored(self, groups: int) -> tuple[Tensor, Tensor]:
        """Give the columns of each group in the order of rounding, int64 [G, B L], and the factor."""
        width = self.order.shape[1]
        by_block = self.order.view(groups, len(self.order) // groups, width)
        first = width * torch.arange(by_block.shape[1], device=self.order.device)[:, None]
        return (by_block + first).flatten(1), self.factor


def _factor(factor: Tensor, second: Tensor, backwards: Tensor, share: float) -> None:
    """Write R_ij / R_jj at [j, i], R_jj^2 at [j, j], float32 [G, N, N]: of damped H = R R^T, columns in order.

    backwards: the columns, the last first. share: of the diagonal's mean, added to the diagonal. Needs 8 G N^2 bytes.
    """
    block, N = torch.arange(len(second), device=second.device)[:, None, None], second.shape[1]
    mean = second.diagonal(dim1=1, dim2=2).double().mean(1, keepdim=True)
    damping = share * mean + (mean == 0)
    H, failed = second.new_empty(second.shape, dtype=torch.float64), backwards.new_empty(len(second), dtype=torch.int32)
    for times in (1, 11, 111):  # what was summed up in float32 may be further off
        for start in range(0, N, ROWS):
            rows = slice(start, start + ROWS)
            H[:, rows] = second[block, backwards[:, rows, None], backwards[:, None]].double()
        H.diagonal(dim1=1, dim2=2).add_(times * damping)
        torch.linalg.cholesky_ex(H.mT, out=(H.mT, failed))  # in place: H is upper triangular now
        if not failed.any():
            break
    else:
        raise ValueError("the second moments are not positive semidefinite: they are no sums of x x^T")
    diagonal = H.diagonal(dim1=1, dim2=2)[:, :, None].clone()
    for start in range(0, N, ROWS):
        rows, stop = slice(start, start + ROWS), N - start
        factor[:, max(stop - ROWS, 0) : stop] = (H[:, rows] / diagonal[:, rows]).flip(1, 2)
    factor.diagonal(dim1=1, dim2=2).copy_(diagonal[..., 0].square().flip(1))
