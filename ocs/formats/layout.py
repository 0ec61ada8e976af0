"""Files of a quantized model that are filled piece by piece: each tensor's place is known before any has a value.

What a file's header says beside the CRC-32 of each tensor follows from the options, so that the room for it is known,
too. It is written last; then the file, which until then is in a folder of its own, gets its name.
"""

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ocs.formats.contents import crc32
from ocs.formats.source import INDEX, WEIGHTS
from ocs.formats.storage import dtype_name, sealed
from ocs.replace_file import naming, replacing, sync

_CHUNK = 1 << 24  # bytes that are written or read at once


class Place(NamedTuple):
    """Where a tensor goes."""

    shard: int
    start: int  # in the data, which follow the header
    size: int  # bytes
    like: Tensor  # of this dtype and shape


class Layout:
    """The shards of a model, each with a header of the whole, as save_pretrained of transformers writes them.

    Args:
        header: what stored_layers() says of all its layers.
        tensors: those of all files by name, in the model's order; they may be on the meta device.
        most: bytes of a shard, but for a single larger tensor.
    """

    def __init__(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor], most: int) -> None:
        self.header, self.places = header, {}
        for number, names in enumerate(_cut(tensors, most)):
            end = 0
            for name in sorted(names, key=lambda name: (-tensors[name].element_size(), name)):  # so all are aligned
                size = tensors[name].numel() * tensors[name].element_size()
                self.places[name] = Place(number, end, size, tensors[name].to("meta"))
                end += size
        count = 1 + max(place.shard for place in self.places.values())
        shards = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        self.files = shards if count > 1 else [WEIGHTS]
        longest = dict.fromkeys(self.places, 2**32 - 1)
        self._room = [-(-len(self._header(i, longest)) // 8) * 8 + 8 for i in range(count)]

    def _header(self, shard: int, sums: Mapping[str, int]) -> bytes:
        """Write the header of a shard; it is longest where all sums are."""
        entries = {
            name: {
                "dtype": dtype_name(p.like.dtype),
                "shape": [*p.like.shape],
                "data_offsets": [p.start, p.start + p.size],
            }
            for name, p in self.places.items()
            if p.shard == shard
        }
        ordered = {name: sums[name] for name in self.places}
        metadata = {"format": "pt", **sealed(self.header, ordered)}
        return json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()

    def size(self, shard: int) -> int:
        """Tell the bytes of a shard."""
        return 8 + self._room[shard] + sum(place.size for place in self.places.values() if place.shard == shard)

    def begin(self, folder: Path) -> None:
        """Make the files as they will be, without values yet."""
        needed, free = sum(map(self.size, range(len(self.files)))), shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(f"{folder}: {needed / 1e9:.3g} GB are to be written, the disk has {free / 1e9:.3g} GB left")
        for number, name in enumerate(self.files):
            with naming(folder / name), open(folder / name, "ab") as file:
                file.truncate(self.size(number))

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """Write tensors to their places, and give their sums; a RuntimeError where one is not as it was foretold."""
        for name, tensor in tensors.items():
            place = self.places[name]
            if tensor.dtype != place.like.dtype or tensor.shape != place.like.shape:
                raise RuntimeError(f"{name} is {tensor.dtype} {[*tensor.shape]}, planned was {place.like}")
            path = folder / self.files[place.shard]
            with open(path, "r+b", buffering=0) as file:
                _write(file, 8 + self._room[place.shard] + place.start, _bytes_of(tensor), path)
        return {name: crc32(tensor) for name, tensor in tensors.items()}

    def holds(self, folder: Path, sums: Mapping[str, int]) -> bool:
        """Tell whether tensors with these sums are in their places."""
        for name, expected in sums.items():
            place, crc = self.places[name], 0
            with open(folder / self.files[place.shard], "rb") as file:
                file.seek(8 + self._room[place.shard] + place.start)
                for start in range(0, place.size, _CHUNK):
                    crc = zlib.crc32(file.read(min(_CHUNK, place.size - start)), crc)
            if crc != expected:
                return False
        return True

    def finish(self, shard: int, folder: Path, target: Path, sums: Mapping[str, int]) -> None:
        """Write a shard's header, and give it its name once all is on the disk."""
        path = folder / self.files[shard]
        text = self._header(shard, sums).ljust(self._room[shard])
        with open(path, "r+b", buffering=0) as file:
            _write(file, 0, memoryview(len(text).to_bytes(8, "little") + text), path)
        sync(path)
        path.replace(target / self.files[shard])
        sync(target)

    def write_index(self, folder: Path) -> None:
        """Write the index of shards, which makes the folder complete; one file alone needs none."""
        if len(self.files) == 1:
            return
        index = {
            "metadata": {"total_size": sum(place.size for place in self.places.values())},
            "weight_map": {name: self.files[self.places[name].shard] for name in sorted(self.places)},
        }
        with replacing(folder / INDEX) as partial:
            partial.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _cut(tensors: Mapping[str, Tensor], most: int) -> list[list[str]]:
    shards: list[list[str]] = []
    filled = most
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if not shards or filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")


def _write(file: Any, start: int, data: memoryview, path: Path) -> None:
    """Write all of some bytes; the error names the file."""
    try:
        while data:
            count = os.pwrite(file.fileno(), data[:_CHUNK], start)
            data, start = data[count:], start + count
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
