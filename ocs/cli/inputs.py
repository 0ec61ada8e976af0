"""Batches for calibration and comparison: a folder of images, arrays in files, or random inputs, said to be random."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ocs.cli.input_form import InputForm
from ocs.cli.say import UsageError
from ocs.cli.weights import read_safetensors, safetensors_metadata

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
ARRAYS = (".npy", ".safetensors")


class Batches:
    """Inputs as a model takes them, batch by batch, read anew each time.

    source: a folder of images or arrays (its folders too), an array's file, or None for random inputs. limit: how many
    inputs at most, evenly spaced over the images. batch: how many at once.
    """

    def __init__(self, form: InputForm, source: str | None, limit: int, batch: int) -> None:
        self.form, self.limit, self.batch, self.files = form, limit, batch, _files(source)
        self.of_images = bool(self.files) and _is_image(self.files[0])
        if self.of_images:
            self._check_images(str(source))
            self.files = _spread(self.files, limit)
        self.source = source

    def __len__(self) -> int:
        """Count the batches of images and of random inputs; of arrays there may be fewer."""
        count = len(self.files) if self.of_images else self.limit
        return math.ceil(count / self.batch)

    def __iter__(self) -> Iterator[Any]:
        """Give the batches."""
        if self.of_images:
            for start in range(0, len(self.files), self.batch):
                part = self.files[start : start + self.batch]
                yield _named(torch.stack([read_image(path, self.form) for path in part]), self.form)
        elif self.files:
            yield from self._arrays()
        else:
            yield from self._random()

    @property
    def said(self) -> str:
        """Say in a line what these inputs are."""
        shape = "x".join(map(str, self.form.shape[1:]))
        if self.of_images:
            mean, std = (", ".join(f"{each:g}" for each in values) for values in _norms(self.form))
            return f"{len(self.files)} images of {self.source}, cropped to {shape}, less {mean}, divided by {std}"
        if self.files:
            return f"at most {self.limit} inputs of {self.source}, as they are"
        words = f"numbers of words below {self.form.words}" if self.form.words else "normal"
        return f"{self.limit} random inputs {shape} ({words}): no data was given"

    def _check_images(self, source: str) -> None:
        if self.form.words or len(self.form.shape) != 4:
            raise ValueError(
                f"{source}: images do not fit a model that takes {shape_text(self.form.shape)}: give arrays"
            )

    def _random(self) -> Iterator[Any]:
        generator = torch.Generator("cpu").manual_seed(0)
        for start in range(0, self.limit, self.batch):
            yield random_batch(self.form, min(self.batch, self.limit - start), generator)

    def _arrays(self) -> Iterator[Any]:
        """Give the rows of arrays; several tensors of a safetensors file are arguments by name."""
        left = self.limit
        for path in self.files:
            tensors = _read_arrays(path)
            counts = {len(tensor) for tensor in tensors.values()}
            if len(counts) != 1:
                raise ValueError(f"{path}: its tensors have different numbers of rows: {sorted(counts)}")
            taken = min(left, *counts)
            left -= taken
            for start in range(0, taken, self.batch):
                parts = {name: tensor[start : min(start + self.batch, taken)] for name, tensor in tensors.items()}
                yield parts if len(parts) > 1 else _named(*parts.values(), self.form)


def random_batch(form: InputForm, count: int, generator: torch.Generator) -> Any:
    """Draw inputs: normal floats, or numbers of words."""
    shape = list(form.shape)
    if 1 in shape[:2]:  # a batch's axis, the second where time comes first
        shape[shape.index(1)] = count
    words = form.words
    x = torch.randint(words, shape, generator=generator) if words else torch.randn(shape, generator=generator)
    return _named(x, form)


def _named(x: Tensor, form: InputForm) -> Any:
    """Give an input to every argument that the model takes by name, or as it is where it takes none so."""
    return dict.fromkeys(form.names, x) if form.names else x


def with_shape(form: InputForm | None, shape: tuple[int, ...] | None, model: str) -> InputForm:
    """Take a shape that the user gave for the model's own."""
    if form is None and shape is None:
        raise UsageError(f"nothing says what {model} takes: give --shape, 1,3,224,224 say")
    if shape is None:
        return form
    if form is not None and len(shape) == len(form.shape) - 1 and not form.guess:
        raise UsageError(f"--shape {shape_text(shape)}: give that of a batch of one, 1,{shape_text(shape)}")
    return replace(form or InputForm(shape), shape=shape, guess="")


def shape_text(shape: tuple[int, ...]) -> str:
    """Write a shape as --shape takes it."""
    return ",".join(map(str, shape))


# --- Images -----------------------------------------------------------------------------------------------------------


def read_image(path: Path, form: InputForm) -> Tensor:
    """Read an image as float32 [C, H, W]: its shorter side resized, the middle cut out, normalized."""
    image_module = pillow()
    channels, height, width = form.shape[1:]
    mean, std = _norms(form)
    try:
        with image_module.open(path) as file:
            if file.mode[0] in "IF":
                raise ValueError(f"more than 8 bits for a pixel, mode {file.mode!r}")
            image = file.convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
        raise ValueError(f"{path}: it is no image that can be read ({error})") from error
    scale = max(height / image.height, width / image.width) / form.share
    size = [max(round(scale * length), least) for length, least in zip(image.size, (width, height), strict=True)]
    resampling = getattr(image_module.Resampling, form.interpolation.upper(), image_module.Resampling.BILINEAR)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    cut = image.resize(size, resampling).crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(cut, np.float32)).div_(255).view(height, width, channels).permute(2, 0, 1)
    return ((pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)).contiguous()


def _norms(form: InputForm) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Give mean and deviation of each channel; of one channel the averages of three."""
    channels = form.shape[1]
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, and the model takes {channels}: give arrays")
    mean, std = (values if len(values) == channels else (sum(values) / len(values),) * channels
                 for values in (form.mean, form.std))  # fmt: skip
    return mean, std


def pillow() -> Any:
    """Import Pillow's Image."""
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("images need Pillow: pip install torch-ocs[cli]") from None
    return Image


# --- Files ------------------------------------------------------------------------------------------------------------


def _files(source: str | None) -> list[Path]:
    """List the files of inputs, by name."""
    if source is None:
        return []
    path, known = Path(source), (*IMAGES, *ARRAYS)
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(each for each in path.rglob("*") if each.is_file())
    else:
        raise FileNotFoundError(f"{source}: there is no such file or folder")
    chosen = [each for each in found if each.suffix.lower() in known and not each.name.startswith(".")]
    if not chosen:
        raise ValueError(f"{source}: none of its {len(found)} files ends in {', '.join(known)}")
    if len({_is_image(each) for each in chosen}) > 1:
        raise ValueError(f"{source}: it holds images as well as arrays: give a folder of one kind")
    return chosen


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGES


def holds_arrays(source: str) -> bool:
    """Tell whether files hold arrays, which have a shape of their own."""
    return not _is_image(_files(source)[0])


def _spread(files: list[Path], limit: int) -> list[Path]:
    """Choose so many at even distances: folders may be classes."""
    return files if len(files) <= limit else [files[i * len(files) // limit] for i in range(limit)]


def _read_arrays(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file: float32, or whole numbers as int64."""
    if path.suffix.lower() == ".npy":
        try:
            found = {"": torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))}
        except (ValueError, TypeError, EOFError) as error:
            raise ValueError(f"{path}: it is no array of numbers ({error})") from error
    elif safetensors_metadata(path) is None:
        raise ValueError(f"{path}: it is no safetensors file")
    else:
        found = read_safetensors(path)
    if not found or any(tensor.dim() == 0 or not tensor.numel() for tensor in found.values()):
        raise ValueError(f"{path}: it holds no rows")
    if any(tensor.is_complex() for tensor in found.values()):
        raise ValueError(f"{path}: it holds complex numbers: give floats or whole numbers")
    if any(tensor.dtype == torch.uint8 for tensor in found.values()):
        raise ValueError(f"{path}: it holds uint8: give what the model takes, pixels as normalized floats")
    return {name: _plain(tensor) for name, tensor in found.items()}


def _plain(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.bool:
        return tensor
    return tensor.float() if tensor.is_floating_point() else tensor.long()
