"""The ranks of a torch.distributed group, each of which calibrates on data of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def several_ranks() -> bool:
    """Whether there are others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def reduced(x: Tensor, op: Any) -> Tensor:
    """What all ranks hold, put together; the same on each."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else x.device
    moved = x.to(device, copy=True)
    dist.all_reduce(moved, op)
    return moved.to(x.device)


def mean_over_ranks(measure: Callable[[], list[float]], count: int) -> list[float]:
    """So many values, the mean over the ranks of torch.distributed; where one rank fails, all do."""
    failure, values = None, [0.0] * count
    try:
        values = measure()
    except Exception as error:
        if not several_ranks():
            raise
        failure = error
    if not several_ranks():
        return values
    failed, *sums = reduced(
        torch.tensor([float(failure is not None), *values], dtype=torch.float64), dist.ReduceOp.SUM
    ).tolist()
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError(f"calibration failed on {failed:.0f} other rank{'s' * (failed > 1)}")
    return [each / dist.get_world_size() for each in sums]
