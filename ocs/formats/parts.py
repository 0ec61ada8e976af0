"""A quantized model that is written piece by piece, and put together in shards when all pieces are there.

A part is what ocs.save would write of some layers, or of tensors that stay float, so that a reader can check it; its
metadata have a note of the writer's besides. Shards hold the tensors of consecutive parts, and each has the metadata of
the whole model, as save_pretrained of transformers writes them.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ocs.formats.contents import crc32
from ocs.formats.reader import Reader
from ocs.formats.shards import open_shards
from ocs.formats.source import INDEX, WEIGHTS, Region, regions_of
from ocs.formats.storage import sealed, stored_layers
from ocs.replace_file import replacing

_CHUNK = 1 << 24  # bytes that are copied at once


def write_part(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], note: Any) -> None:
    """Write a part beside its name, which it then gets; it may be damaged where the machine, not we, stopped meanwhile."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = sealed(header, {name: crc32(tensor) for name, tensor in tensors.items()})
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        save_file(dict(tensors), partial, metadata={**metadata, "note": json.dumps(note)})
        partial.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path}: it cannot be written ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


def is_complete(path: Path) -> bool:
    """Tell whether a part is there and undamaged."""
    from safetensors import SafetensorError

    try:
        with open_shards([path]) as file:
            reader = Reader(file)
            for name in reader.sums:
                reader.read(name, reader.shape(name))
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def merged(parts: Sequence[Path]) -> tuple[dict[str, Any], list[Any]]:
    """Put together the headers of parts, and list their notes."""
    header, sums, layers, notes = stored_layers({})[1], {}, {}, []
    for path in parts:
        with open_shards([path]) as file:
            metadata = file.metadata()
        own = json.loads(metadata["ocs"])
        header["format"] = max(header["format"], own["format"])
        layers |= own["layers"]
        sums |= own["tensors"]
        notes.append(json.loads(metadata["note"]))
    return {**header, "layers": layers, "tensors": sums}, notes


def cut(parts: Sequence[Path], most: int) -> list[list[Path]]:
    """Cut the parts into shards of so many bytes at most, but for a part that is larger."""
    shards, filled = [], most
    for path in parts:
        size = path.stat().st_size
        if filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(path)
        filled += size
    return shards


def shard_names(count: int) -> list[str]:
    """Name so many shards as transformers does."""
    return [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_shard(path: Path, parts: Sequence[Path], metadata: Mapping[str, str]) -> None:
    """Write what the parts hold to one file, a piece at a time; it gets its name when it is complete and on the disk."""
    regions = {name: region for part in parts for name, region in regions_of(part).items()}
    widths = {name: region.size // max(_numel(region), 1) for name, region in regions.items()}
    names = sorted(regions, key=lambda name: (-widths[name], name))  # as safetensors does, so that all are aligned
    header, end = {"__metadata__": dict(metadata)}, 0
    for name in names:
        region = regions[name]
        header[name] = {"dtype": region.dtype, "shape": region.shape, "data_offsets": [end, end + region.size]}
        end += region.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with replacing(path) as partial, open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                _copy(regions[name], file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) if error.errno else error from error


def _numel(region: Region) -> int:
    return int(torch.Size(region.shape).numel())


def _copy(region: Region, file: BinaryIO) -> None:
    with open(region.path, "rb") as part:
        part.seek(region.start)
        for start in range(0, region.size, _CHUNK):
            file.write(part.read(min(_CHUNK, region.size - start)))


def write_index(folder: Path, names: Iterable[str]) -> None:
    """Write the index of shards, which makes the folder complete."""
    held = {tensor: region for name in names for tensor, region in regions_of(folder / name).items()}
    index = {
        "metadata": {"total_size": sum(region.size for region in held.values())},
        "weight_map": {tensor: held[tensor].path.name for tensor in sorted(held)},
    }
    with replacing(folder / INDEX) as partial:
        partial.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
