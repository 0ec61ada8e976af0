"""The ranks of a torch.distributed group, each of which calibrates on data of its own."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_count() -> int:
    """Count the ranks: 1 where torch.distributed is not initialized."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_rank() -> int:
    """Tell which of the ranks this one is, from 0 on."""
    return dist.get_rank() if rank_count() > 1 else 0


def reduced(x: Tensor, op: Any) -> Tensor:
    """Put together what all ranks hold, so that each has the same."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else x.device
    moved = x.to(device, copy=True)
    dist.all_reduce(moved, op)
    return moved.to(x.device)


def sum_over_ranks(measure: Callable[[], list[float]], count: int, what: str = "calibration") -> list[float]:
    """Measure so many values on each rank and add them up; where one rank fails, all do, and say that this did."""
    if rank_count() == 1:
        return measure()
    failure, values = None, [0.0] * count
    try:
        values = measure()
    except Exception as error:  # noqa: BLE001 - other ranks must hear of it, or they would wait for this one
        failure = error
    failed, *sums = reduced(
        torch.tensor([float(failure is not None), *values], dtype=torch.float64, device="cpu"), dist.ReduceOp.SUM
    ).tolist()
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError(f"{what} failed on {failed:.0f} other rank{'' if failed == 1 else 's'}")
    return sums


def mean_over_ranks(measure: Callable[[], list[float]], count: int) -> list[float]:
    """Measure so many values on each rank and take their means; where one rank fails, all do."""
    return [each / rank_count() for each in sum_over_ranks(measure, count)]
