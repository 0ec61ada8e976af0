"""The ranks of a torch.distributed group, each of which calibrates on data of its own."""

from __future__ import annotations

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
