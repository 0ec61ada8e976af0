"""Files of quantized models: what they are of, and what a command writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ocs.cli.models import FORMS, RANDOM, Loaded, is_model, load_model
from ocs.cli.say import Notes, UsageError
from ocs.cli.weights import check_file, safetensors_metadata
from ocs.formats.storage import load, write_model

_KEY = "made_of"  # in a file's metadata: MODEL, where its weights were from, and the shape of an input
_BY_NAME = ("torchvision", "timm", "hf")  # what a file may name: building them runs no code but the library's


def save_quantized(path: str, loaded: Loaded, shape: tuple[int, ...] | None) -> None:
    """Write a model that has been quantized, with a note of what it was made of, and the shape that the user gave."""
    known = loaded.form.shape if loaded.form and not loaded.form.guess else None
    made_of = {"model": loaded.model, "weights": loaded.weights, "shape": shape or known}
    write_model(loaded.module, path, {_KEY: json.dumps(made_of)})


def made_of(path: str) -> dict[str, Any]:
    """Read what a quantized file says that it was made of, {} where it says nothing; a ValueError where it is none."""
    check_file(path)
    metadata = safetensors_metadata(path)
    if metadata is None or "ocs" not in metadata:
        raise ValueError(f"{path}: it holds no quantized model, which ocs quantize -o writes")
    try:
        found = json.loads(str(metadata.get(_KEY, "{}")))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("model"), str) else {}


def saved_shape(path: str) -> tuple[int, ...] | None:
    """Give the shape of an input that a quantized file names, None where it names none."""
    shape = made_of(path).get("shape")
    valid = isinstance(shape, list) and shape and all(type(size) is int and size > 0 for size in shape)
    return tuple(shape) if valid else None


def is_quantized(path: str) -> bool:
    """Tell whether a file holds a quantized model."""
    return "ocs" in (safetensors_metadata(path) or {})


def load_quantized(path: str, model: str | None) -> Loaded:
    """Load a quantized file into the MODEL that the user or the file names."""
    said = made_of(path)
    architecture = load_model(model or model_of(path), RANDOM, Notes(shown=False))
    module, form = load(path, architecture.module), architecture.form
    return Loaded(architecture.model, module.eval(), form, str(said.get("weights", "")))


def model_of(path: str) -> str:
    """Give the MODEL that a file names, where that is one of a library: a file must not choose what code runs."""
    said = made_of(path)
    if not said:
        raise UsageError(f"{path}: it does not say which model it is of: give --model MODEL ({FORMS})")
    name = said["model"]
    if not is_model(name):
        raise ValueError(f"{path}: the model that it names is none: give --model MODEL ({FORMS})")
    if name.partition(":")[0] not in _BY_NAME:
        raise UsageError(f"{path}: it is of {name!r}, code that runs only where you name it: give --model {name}")
    return name


def onnx_model(path: str) -> Callable[..., Any]:
    """Open an ONNX file with ONNX Runtime, as a callable that takes tensors and gives them."""
    check_file(path)
    try:
        import onnxruntime
    except ImportError:
        raise ImportError("ONNX files run in ONNX Runtime: pip install torch-ocs[onnxruntime]") from None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*args: torch.Tensor, **kwargs: torch.Tensor) -> list[torch.Tensor]:
        given = dict(zip(names, args, strict=False)) | kwargs
        found = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        return [torch.from_numpy(each) for each in found]

    return run


# --- What commands write ----------------------------------------------------------------------------------------------


def check_output(path: str | None, switch: str, endings: tuple[str, ...] = (), inputs: tuple[Any, ...] = ()) -> None:
    """Refuse, before any work is done, a path that could not be written or would overwrite what is read."""
    if path is None:
        return
    target = Path(path)
    if endings and target.suffix not in endings:
        raise UsageError(f"{switch} {path}: end it in {' or '.join(endings)}")
    if target.is_dir():
        raise IsADirectoryError(f"{switch} {path}: it is a folder")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{switch} {path}: there is no folder {target.parent}")
    for other in filter(None, inputs):
        if target.exists() and Path(other).exists() and target.samefile(other):
            raise UsageError(f"{switch} {path}: it is read, too: give another name")
