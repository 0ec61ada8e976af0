"""Float weights from files: safetensors, or what torch.load(weights_only=True) takes. Nothing else is read."""

import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ocs.cli.say import Notes
from ocs.formats.shards import open_shards
from ocs.formats.source import check_regular

_INSIDE = ("state_dict", "model_state_dict", "model")  # under which checkpoints keep a state_dict
_LARGEST_HEADER = 100_000_000  # as safetensors has it


def safetensors_metadata(path: str | Path) -> dict[str, str] | None:
    """Read the metadata of a safetensors file; None where it is none."""
    with open(path, "rb") as file:
        start = file.read(9)
        if len(start) < 9 or start[8:] != b"{" or struct.unpack("<Q", start[:8])[0] > _LARGEST_HEADER:
            return None
        file.seek(8)
        header = file.read(struct.unpack("<Q", start[:8])[0])
    try:
        metadata = json.loads(header).get("__metadata__", {})
    except (ValueError, RecursionError):
        return None
    return metadata if isinstance(metadata, dict) else {}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, or of a pickled state_dict that holds nothing else."""
    check_file(path)
    metadata = safetensors_metadata(path)
    if metadata is not None:
        if "ocs" in metadata:
            raise ValueError(f"{path}: it holds a quantized model: give the float weights that it was made of")
        return read_safetensors(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_refused(path, str(error))) from error
    except Exception as error:
        raise ValueError(f"{path}: it is neither a safetensors file nor one of torch.save") from error
    return _state_dict(path, found)


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file."""
    try:
        from safetensors import SafetensorError
    except ImportError:
        raise ImportError("safetensors files need safetensors: pip install torch-ocs[files]") from None
    try:
        with open_shards([path]) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path}: it is no complete safetensors file ({error})") from error


def check_file(path: str | Path) -> None:
    """Refuse what is no file."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path}: it is a folder")
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    check_regular(path)


def put_weights(module: nn.Module, path: str | Path, notes: Notes) -> None:
    """Load a file into a model, all of it and nothing else; the errors name what does not fit."""
    state = read_weights(path)
    own = module.state_dict()
    if own.keys().isdisjoint(state) and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        notes.add(f"{path}: names without the 'module.' of DataParallel")
    shared = {tensor.data_ptr() for name, tensor in own.items() if name in state and tensor.numel()}
    missing = [
        name for name, tensor in own.items()
        if name not in state and not name.endswith("num_batches_tracked") and tensor.data_ptr() not in shared
    ]  # fmt: skip
    unknown = [name for name in state if name not in own]
    if missing or unknown:
        of_model, of_file = _some("lacks", missing), _some("has no place for", unknown)
        parts = [part for part in (of_model and f"the file {of_model}", of_file and f"the model {of_file}") if part]
        raise ValueError(f"{path}: it is of another model: {'; '.join(parts)}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{path}: {name} is {list(tensor.shape)}, in the model {list(own[name].shape)}")
    module.load_state_dict(state, strict=False)


def _some(verb: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{verb} {', '.join(names[:3])}{more}" if names else ""


def _state_dict(path: str | Path, found: Any) -> dict[str, Tensor]:
    """Find the state_dict in what a file holds."""
    found = found if isinstance(found, Mapping) else {}
    inside = next((found[key] for key in _INSIDE if isinstance(found.get(key), Mapping)), found)
    state = {name: each for name, each in inside.items() if isinstance(name, str) and isinstance(each, Tensor)}
    if not state or len(state) < len(inside):
        raise ValueError(f"{path}: it holds no state_dict, tensors by name: write model.state_dict() with torch.save")
    return state


def _refused(path: str | Path, message: str) -> str:
    """Say why a pickle is not loaded, and what to do."""
    words = [word.rstrip(".,") for word in message.replace("`", " ").split()]
    named = next((words[i + 1] for i, word in enumerate(words[:-1]) if word == "GLOBAL"), None)
    if named is None:
        return f"{path}: it is neither a safetensors file nor a state_dict of torch.save; other pickles could run code"
    return (
        f"{path}: a pickle that holds more than tensors ({named}), and loading it could run any code: refused. If you"
        " trust it, write its weights once in Python:"
        " torch.save(torch.load(path, weights_only=False).state_dict(), 'w.pt')"
    )
