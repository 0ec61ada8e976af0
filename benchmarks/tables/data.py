"""Where the images of the paper's tables come from: ImageNet, CIFAR-10 and Fashion-MNIST, read from the user's disk.

Images stay the uint8 crops that were decoded, so that a set fits in memory, and are normalized on the device. Whatever
is wrong with the files is a DataError of one line that says what was expected and where to get it.
"""

from __future__ import annotations

import copy
import functools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import paths  # noqa: F401

# isort: split
import cifar
import numpy as np
import torch
from fashion_mnist import ASSETS, MEAN, STD, load
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from zoo import torchvision_models

IMAGE_SUFFIXES = {".jpeg", ".jpg", ".png"}
NAMES = {"imagenet": "ImageNet", "cifar10": "CIFAR-10", "fashion-mnist": "Fashion-MNIST"}
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR_FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


class DataError(ValueError):
    """The images are missing or broken; the message is one line and names the way out."""


@dataclass(frozen=True)
class Preset:
    """What becomes of an image before a network sees it.

    resize: pixels of the shorter side; crop: of the square cut from the centre; interpolation: torchvision's name;
    mean, std: per channel, of pixels in [0, 1].
    """

    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"


CIFAR10 = Preset(32, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
FASHION_MNIST = Preset(32, 32, (MEAN,), (STD,))


def normalize(x: Tensor, preset: Preset) -> Tensor:
    """uint8 [N, C, H, W] -> float32 on the same device; floating-point images are taken as normalized already."""
    if x.is_floating_point():
        return x
    # 255 as a tensor: CUDA multiplies by the reciprocal of a Python number, which is not what a CPU computes.
    full, mean, std = (torch.tensor(v, device=x.device) for v in (255.0, preset.mean, preset.std))
    return x.float().div_(full).sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


@dataclass(frozen=True)
class Crops(Dataset):
    """(uint8 [3, crop, crop], label) of image files; nothing here is torchvision's, so that any worker unpickles it."""

    samples: list[tuple[str, int]]
    preset: Preset

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return read_crop(path, self.preset), label


def read_crop(path: str | Path, preset: Preset) -> Tensor:
    """uint8 [3, crop, crop]: an image resized and cropped as torchvision's ImageClassification preset does.

    Raises:
        DataError: The file is missing, truncated or no image.
    """
    torchvision_models()
    from PIL import Image
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as TF

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable image ({error}); fetch it again") from error
    image = TF.resize(image, [preset.resize], InterpolationMode(preset.interpolation))
    return TF.pil_to_tensor(TF.center_crop(image, [preset.crop]))


def imagenet(folder: str | Path, split: str, preset: Preset, classes: int = 1000) -> Crops:
    """The images folder/split/<wnid>/*.JPEG; a label is the place of its wnid in sorted order.

    split: "val" or "train". classes: how many outputs the network has, which is how many class folders there must be.

    Raises:
        DataError: Folders or images are missing, archives not extracted, images not sorted into class folders.
    """
    return Crops(_samples(Path(folder), split, classes), preset)


@functools.cache  # a million files are listed once, whatever number of networks is to see them
def _samples(folder: Path, split: str, classes: int) -> list[tuple[str, int]]:
    """The path and label of every image."""
    root = _class_folders(folder, split, classes)
    torchvision_models()
    from torchvision.datasets import ImageFolder

    found = ImageFolder(root, allow_empty=True)
    if empty := set(range(classes)) - set(found.targets):
        raise DataError(f"{root / found.classes[min(empty)]}: no images ({len(empty)} such class folders)")
    return found.samples


def _class_folders(folder: Path, split: str, classes: int) -> Path:
    """folder/split, once exactly `classes` wnid folders are in it."""
    root = folder / split
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; ImageNet is expected there, as {split}/<wnid>/*.JPEG")
    entries = sorted(root.iterdir()) if root.is_dir() else []
    names = [entry.name for entry in entries if entry.is_dir()]
    if not names:
        raise DataError(_no_classes(root, entries))
    if stray := [name for name in names if not re.fullmatch(r"n\d{8}", name)]:
        raise DataError(f"{root / stray[0]}: not named by a wnid such as n01440764, whose order gives the labels")
    if len(names) != classes:
        raise DataError(f"{root}: {len(names)} class folders, but the network has {classes} outputs")
    return root


def _no_classes(root: Path, entries: list[Path]) -> str:
    """What is wrong with a split folder that is missing or has no folders in it."""
    if any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in entries):
        return f"{root}: images lie flat in it; sort them into class folders {root.name}/<wnid>/*.JPEG"
    whole = root.parent / f"ILSVRC2012_img_{root.name}.tar"
    if archives := [path for path in (whole, *entries) if path.suffix == ".tar" and path.is_file()]:
        call = f"torchvision.datasets.ImageNet({str(root.parent)!r}, {root.name!r})"
        return f"{archives[0]}: not extracted; {call} does so, with ILSVRC2012_devkit_t12.tar.gz in {root.parent} too"
    return f"{root}: {'no class folders in it' if root.is_dir() else 'no such folder'}; expected <wnid>/*.JPEG there"


def cifar10(folder: str | Path, split: str) -> TensorDataset:
    """(uint8 [3, 32, 32], int64 label) of CIFAR-10's own files, pickled or binary; nothing that is pickled is run.

    folder: cifar-10-batches-py, cifar-10-batches-bin, or the folder around one of them. split: "train" or "test".

    Raises:
        DataError: Files are missing, not extracted, or hold something else.
    """
    parts = []
    for path in _cifar_files(Path(folder), split):
        try:
            parts.append(cifar.read(path))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a file of CIFAR-10 ({error}); extract {CIFAR_URL} again") from error
    return TensorDataset(*(torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True)))


def _cifar_files(folder: Path, split: str) -> list[Path]:
    """The files of a split, all of them present."""
    if split not in CIFAR_FILES:
        raise DataError(f"CIFAR-10 has no split {split!r}, only {' and '.join(CIFAR_FILES)}")
    for base in (folder, folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin"):
        for suffix in ("", ".bin"):
            if any((base / (name + suffix)).is_file() for names in CIFAR_FILES.values() for name in names):
                paths = [base / (name + suffix) for name in CIFAR_FILES[split]]
                if missing := [path for path in paths if not path.is_file()]:
                    raise DataError(f"{missing[0]}: no such file; extract {CIFAR_URL} again")
                return paths
    if archives := sorted(folder.glob("cifar-10-*.tar.gz")):
        raise DataError(f"{archives[0]}: not extracted; run tar -xzf {archives[0]} -C {folder}")
    what = "no CIFAR-10 in it" if folder.is_dir() else "no such folder"
    raise DataError(f"{folder}: {what}; extract {CIFAR_URL} there, which makes cifar-10-batches-py")


def fashion_mnist(split: str, folder: Path = ASSETS) -> TensorDataset:
    """(normalized float32 [1, 32, 32], int64 label), bundled: "t10k" (test) or "calibration" (512 of training).

    folder: of the whole data set's idx files, for "train".
    """
    if split not in ("t10k", "calibration") and folder == ASSETS:
        raise DataError(f"Fashion-MNIST has no split {split!r} here, only t10k and calibration")
    try:
        return TensorDataset(*load(split, folder))
    except (OSError, ValueError) as error:
        raise DataError(str(error)) from None


def pick(count: int, limit: int | None) -> list[int]:
    """`limit` of `count` indices, evenly spaced, so that a set sorted by class gives of each; None: all."""
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}, expected 1 image or more")
    limit = count if limit is None else min(limit, count)
    return [i * count // limit for i in range(limit)]


def pick_random(count: int, number: int, seed: int) -> list[int]:
    """`number` of `count` indices, the same for the same seed, in order."""
    if not 1 <= number <= count:
        raise DataError(f"{number} training images are asked for (--calibration), there are {count}")
    return sorted(random.Random(seed).sample(range(count), number))


@dataclass(frozen=True)
class _Batched(Dataset):
    """A whole batch for each index; a DataError is returned, as one that a worker raises loses its message."""

    dataset: Dataset
    batches: list[list[int]]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | DataError:
        try:
            images, labels = zip(*(self.dataset[i] for i in self.batches[index]), strict=True)
        except DataError as error:
            return error
        return torch.stack(images), torch.tensor([int(label) for label in labels])


def _as_is(batch: object) -> object:
    return batch


class Batches:
    """Batches (x [b, C, H, W] as the data set has it, y int64 [b]) of some of its images in order, as often as wanted.

    Args:
        dataset: Of (tensor [C, H, W], label) pairs.
        indices: Which of them.
        size: Images in a batch; the last may be smaller.
        workers: Processes that decode, of torch's DataLoader; 0: this one.
        memory: Bytes of batches kept after the first whole pass for those that follow; if all together are larger, each
            pass decodes again. Kept batches are handed out as they are: don't change them in place.
    """

    def __init__(
        self, dataset: Dataset, indices: Sequence[int], size: int, *, workers: int = 0, memory: int = 0
    ) -> None:
        if size < 1 or workers < 0 or memory < 0:
            raise DataError(f"batches of {size}, {workers} workers, {memory} bytes: expected 1, 0 and 0 or more")
        if outside := [i for i in indices if not 0 <= i < len(dataset)]:
            raise DataError(f"image {outside[0]} is asked for, there are {len(dataset)}")
        batches = [list(indices[i : i + size]) for i in range(0, len(indices), size)]
        self._data, self._workers, self._memory = _Batched(dataset, batches), workers, memory
        self._kept: list[tuple[Tensor, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self._data)

    @property
    def images(self) -> int:
        """How many images all batches have together."""
        return sum(map(len, self._data.batches))

    def share(self, rank: int, world: int) -> Batches:
        """Every world-th batch from the rank-th on: all shares together are the batches of one process, unchanged."""
        if not 0 <= rank < world:
            raise DataError(f"rank is {rank}, expected 0 to {world - 1}")
        share = copy.copy(self)
        share._data = _Batched(self._data.dataset, self._data.batches[rank::world])
        share._kept = None if self._kept is None else self._kept[rank::world]
        return share

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._kept is not None:
            yield from self._kept
            return
        kept, total = [], 0
        for batch in DataLoader(self._data, batch_size=None, num_workers=self._workers, collate_fn=_as_is):
            if isinstance(batch, DataError):
                raise batch
            total += sum(part.nbytes for part in batch)
            if total <= self._memory:  # copies, as what comes from a worker holds a file descriptor for each tensor
                kept.append(tuple(part.clone() for part in batch))
            else:
                kept.clear()
            yield batch
        if total <= self._memory:
            self._kept = kept
