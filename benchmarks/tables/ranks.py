"""One process, or the ranks that torchrun started: the same results on all of them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """rank of world; one process is rank 0 of 1. Use as a context."""

    def __init__(self, device: str) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = torch.device(device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    def __enter__(self) -> Ranks:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # float is float32
        if self.world > 1:
            importlib.import_module("torch._dynamo")  # later, it would keep the group's threads: they may abort us
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        return self

    def __exit__(self, *_: object) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, on the CPU."""
        if self.world > 1:
            x = x.to(self.device)
            dist.all_reduce(x)
        return x.cpu()

    def first(self, make: Callable[[], T]) -> T:
        """What make() gives on rank 0."""
        if self.world == 1:
            return make()
        box = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def any(self, error: str | None) -> str | None:
        """The first rank's error that has one."""
        if self.world == 1:
            return error
        errors: list[str | None] = [None] * self.world
        dist.all_gather_object(errors, error)
        return next((f"rank {rank}: {text}" for rank, text in enumerate(errors) if text), None)
