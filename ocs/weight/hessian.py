"""The second moments of what a weight meets, E[x x^T], and their factorization."""

from functools import cached_property

import torch
from torch import Tensor

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


def _factor(second: Tensor, order: Tensor, share: float) -> Tensor:
    """Compute R_ij / R_jj, float64 [G, N, N]: of the damped H = R R^T, its columns in this order, R upper triangular.

    share: of the diagonal's mean, added to the diagonal.
    """
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
