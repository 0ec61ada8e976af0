"""Float weights in safetensors files, as Hugging Face lays them out, read one tensor at a time."""

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from ocs.formats.contents import Entry
from ocs.formats.shards import header_of, open_shards

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_CHUNK = 1 << 20  # numbers that are read and cast at once


class Region(NamedTuple):
    """Where a tensor is in a safetensors file."""

    path: Path
    start: int
    size: int  # bytes
    dtype: str  # as safetensors calls it
    shape: list[int]


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse a pipe and the like, which whoever opens it may wait for without end."""
    if not Path(path).is_file():
        raise OSError(f"{path}: it is no regular file but a device, pipe or socket")


def weight_files(path: str | os.PathLike[str]) -> list[Path]:
    """List the safetensors files of a folder, those that its index names or the one that there is; a file is itself.

    Raises:
        OSError: there is no such file or folder, it is a pipe, say, or a file that the index names is missing.
        ValueError: the index is damaged.
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    if not folder.is_dir():
        check_regular(path)
        return [folder]
    if not (folder / INDEX).is_file():
        if not (folder / WEIGHTS).is_file():
            raise IsADirectoryError(f"{path}: it is a folder, in which there is neither {INDEX} nor {WEIGHTS}")
        return [folder / WEIGHTS]
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or any(type(name) is not str or name != os.path.basename(name) for name in names):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / INDEX}: it is no index of safetensors files") from error
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: there is no such file, and {INDEX} names it")
    return [folder / name for name in names]


def regions_of(path: Path) -> dict[str, Region]:
    """Find the tensors of a file that safetensors has opened without complaint."""
    with open(path, "rb") as file:
        length, header = header_of(file)
    header.pop("__metadata__", None)
    bounds = {name: said["data_offsets"] for name, said in header.items()}
    return {
        name: Region(
            path, 8 + length + bounds[name][0], bounds[name][1] - bounds[name][0], said["dtype"], said["shape"]
        )
        for name, said in header.items()
    }


class Source:
    """Float weights in files, none of which is mapped or held in memory.

    Raises:
        OSError, ValueError: a file is missing, incomplete or holds a quantized model, or two have the same tensor.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from safetensors import SafetensorError

        self.path, self.files = Path(path), weight_files(path)
        try:
            with open_shards(self.files) as shards:
                if shards.quantized():
                    raise ValueError(f"{path}: it holds a quantized model: give the float weights that it was made of")
                self.dtypes = {name: shards.dtype(name) for name in shards.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ValueError(f"{path}: it is no complete safetensors file ({error})") from error
        self.regions: dict[str, Region] = {}
        for file in self.files:
            self.regions |= regions_of(file)

    def stamp(self) -> dict[str, list[int]]:
        """Say of each file how large it is and when it was written, by which others with its name are told from it."""
        return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in self.files}

    def read(self, name: str, like: torch.dtype, result: Tensor | None = None) -> Tensor:
        """Read a tensor, cast to the dtype `like` that it has in the model; into another and its dtype where given."""
        region = self.regions[name]
        if result is None:
            result = torch.empty(region.shape, dtype=like, device="cpu")
        flat = result.view(-1)
        buffer = torch.empty(min(_CHUNK, max(flat.numel(), 1)), dtype=self.dtypes[name], device="cpu")
        with open(region.path, "rb", buffering=0) as file:
            file.seek(region.start)
            for part in flat.split(_CHUNK):
                read = buffer[: part.numel()]
                _fill(file, read, name)
                part.copy_(read.to(like))
        return result

    def expect(self, name: str) -> None:
        """Let the system read a tensor ahead, where it can."""
        region = self.regions[name]
        if hasattr(os, "posix_fadvise"):
            with open(region.path, "rb") as file:
                os.posix_fadvise(file.fileno(), region.start, region.size, os.POSIX_FADV_WILLNEED)


def _fill(file: BinaryIO, tensor: Tensor, name: str) -> None:
    """Read a tensor's bytes."""
    wanted = memoryview(tensor.view(torch.uint8).numpy())
    while wanted:
        count = file.readinto(wanted)
        if not count:
            raise ValueError(f"{file.name}: it ends before {name} does: it was changed while it was read")
        wanted = wanted[count:]


def sources_of(
    source: Source, names: Mapping[str, Collection[str]], entries: Collection[Entry], model: Any
) -> dict[str, str]:
    """Map the tensors of a model, by their first names, to those of the files.

    names: every name of each tensor, as tied ones have several. A model of transformers says which tensors of files it
    ignores, and under which prefix a base model's stand in it.

    Raises:
        ValueError: a tensor is missing, is one too many, or has another shape or kind of dtype; it names it.
    """
    own = {name for all_names in names.values() for name in all_names}
    files = _renamed(source.regions, own, getattr(model, "base_model_prefix", ""))
    found = {entry.name: next((name for name in names[entry.name] if name in files), None) for entry in entries}
    missing = [name for name, of_file in found.items() if of_file is None]
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    besides = [name for name in files if name not in own and not any(re.search(each, name) for each in ignored)]
    for what, which in (("has no", missing), ("has besides", besides)):
        if which:
            more = f" and {len(which) - 3} more" if len(which) > 3 else ""
            raise ValueError(f"{source.path}: it is of another model: it {what} {', '.join(which[:3])}{more}")
    found = {name: files[of_file] for name, of_file in found.items()}
    for entry in entries:
        of_file, tensor = found[entry.name], entry.tensor
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"{entry.name}: it is of a lazy layer, which has no shape yet: use one that has")
        shape, dtype = source.regions[of_file].shape, source.dtypes[of_file]
        if shape != list(tensor.shape):
            raise ValueError(f"{source.path}: {of_file} is {shape}, the model needs {list(tensor.shape)}")
        if dtype != tensor.dtype and not (dtype.is_floating_point and tensor.is_floating_point()):
            raise ValueError(f"{source.path}: {of_file} is {dtype}, the model has {tensor.dtype}")
    return found


def _renamed(files: Collection[str], own: Collection[str], prefix: str) -> dict[str, str]:
    """Map the names that a model has for them to names in files, with a base model's prefix or without."""
    renamed = {}
    for name in files:
        forms = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        renamed[next((form for form in forms if form in own), name)] = name
    return renamed
