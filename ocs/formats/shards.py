"""Several safetensors files that hold one model, read as one."""

import json
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO

import torch


def header_of(file: BinaryIO) -> tuple[int, dict[str, Any]]:
    """Read what a safetensors file begins with, and how many bytes that takes besides the eight that say so."""
    size = int.from_bytes(file.read(8), "little")
    return size, json.loads(file.read(size))


class Shards:
    """Open safetensors files with one set of names, as one of them looks."""

    def __init__(self, files: Collection[Any]) -> None:
        self._files = list(files)
        self._of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 - not a dict
        if len(self._of) != sum(len(file.keys()) for file in self._files):
            raise ValueError("two of the files have a tensor of the same name")

    def metadata(self) -> dict[str, str] | None:
        """Give the metadata of all files; a ValueError where one has others, as it is of another model then."""
        first = self._files[0].metadata()
        if any(file.metadata() != first for file in self._files):
            raise ValueError("the files are of different models")
        return first

    def quantized(self) -> bool:
        """Tell whether one of the files holds a quantized model."""
        return any("ocs" in (file.metadata() or {}) for file in self._files)

    def keys(self) -> Collection[str]:
        """Name all tensors."""
        return self._of.keys()

    def get_slice(self, name: str) -> Any:
        """Look at a tensor without reading it."""
        return self._of[name].get_slice(name)

    def get_tensor(self, name: str) -> Any:
        """Read a tensor."""
        return self._of[name].get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """Tell the dtype of a tensor without reading it."""
        found = self.get_slice(name)
        return (found[:0] if found.get_shape() else self.get_tensor(name)).dtype


@contextmanager
def open_shards(paths: Collection[str | os.PathLike[str]]) -> Iterator[Shards]:
    """Open safetensors files as one; each stays the one that it is, whoever replaces it meanwhile."""
    with ExitStack() as stack:
        yield Shards([stack.enter_context(_opened(path)) for path in paths])


def _opened(path: str | os.PathLike[str]) -> Any:
    """Open a safetensors file by a name of its own: safetensors opens what it is given twice, as UTF-8."""
    from safetensors import safe_open

    with open(path, "rb") as file:
        own = f"/proc/self/fd/{file.fileno()}"
        return safe_open(own if os.path.exists(own) else path, framework="pt")
