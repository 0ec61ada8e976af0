"""The images of the paper's tables: tiny sets in the official formats, what may be wrong in them, and their batches."""

from __future__ import annotations

import gc
import gzip
import math
import os
import pickle
import struct
from pathlib import Path

import cifar
import data
import numpy as np
import pytest
import torch
from data import CIFAR10, Batches, DataError, Preset, normalize, pick, pick_random
from torch.utils.data import TensorDataset
from zoo import torchvision_models

torchvision_models()  # before anything of torchvision is imported
from PIL import Image  # noqa: E402
from torchvision.transforms import InterpolationMode  # noqa: E402
from torchvision.transforms._presets import ImageClassification  # noqa: E402

WNIDS = ("n01440764", "n01443537", "n01484850", "n01491361")
SMALL = Preset(36, 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Python 3.12 warns of every fork in a process with threads, which torch has; its DataLoader forks all the same.
forks = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """ImageNet in short: four classes of two validation and three training images."""
    for split, count in (("val", 2), ("train", 3)):
        for c, wnid in enumerate(WNIDS):
            (tmp_path / split / wnid).mkdir(parents=True)
            for i in range(count):
                write_jpeg(tmp_path / split / wnid / f"ILSVRC2012_{i}.JPEG", seed=10 * c + i)
    return tmp_path


def write_jpeg(path: Path, seed: int, mode: str = "RGB") -> None:
    """A picture of a size of its own, smooth enough for resizing to matter."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    small.resize((50 + seed, 90 - seed), Image.Resampling.BICUBIC).convert(mode).save(path, "JPEG")


def open_val(folder: Path, classes: int = 4) -> data.Crops:
    return data.imagenet(folder, "val", SMALL, classes)


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


# ImageNet


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_and_normalize_equal_the_torchvision_preset(folder: Path, interpolation: str) -> None:
    write_jpeg(folder / "val" / WNIDS[2] / "grey.JPEG", 3, "L")
    write_jpeg(folder / "val" / WNIDS[2] / "printed.JPEG", 4, "CMYK")
    preset = Preset(SMALL.resize, SMALL.crop, SMALL.mean, SMALL.std, interpolation)
    theirs = ImageClassification(crop_size=32, resize_size=36, interpolation=InterpolationMode(interpolation))
    crops = data.imagenet(folder, "val", preset, 4)
    assert [label for _, label in crops] == [0, 0, 1, 1, 2, 2, 2, 2, 3, 3]
    for (x, _), (path, _) in zip(crops, crops.samples, strict=True):
        assert (x.shape, x.dtype) == ((3, 32, 32), torch.uint8)
        with Image.open(path) as image:
            assert torch.equal(normalize(x[None], preset)[0], theirs(image.convert("RGB")))


def test_every_pixel_value_is_normalized_as_by_torchvision() -> None:
    x = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)
    theirs = ImageClassification(crop_size=16, resize_size=16)(x)
    assert torch.equal(normalize(x, SMALL), theirs)
    assert normalize(theirs, SMALL) is theirs


def test_train_and_val_are_different_folders(folder: Path) -> None:
    assert len(open_val(folder)) == 8
    assert len(data.imagenet(folder, "train", SMALL, 4)) == 12


def test_imagenet_folders_that_are_missing_or_of_another_shape(folder: Path) -> None:
    def message(classes: int = 4) -> str:
        with pytest.raises(DataError) as error:
            open_val(folder, classes)
        return one_line(error)

    with pytest.raises(DataError, match="no such folder; ImageNet is expected there, as val/<wnid>"):
        open_val(folder / "nowhere")
    assert "val: 4 class folders, but the network has 1000 outputs" in message(1000)
    (folder / "val" / "cache").mkdir()
    assert "cache: not named by a wnid" in message()
    (folder / "val" / "cache").rmdir()
    images = list((folder / "val" / WNIDS[1]).iterdir())
    for path in images:
        path.rename(path.with_suffix(".txt"))
    assert f"{WNIDS[1]}: no images (1 such class folders)" in message()


def test_imagenet_not_extracted_or_not_sorted(tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(DataError) as error:
            open_val(tmp_path)
        return one_line(error)

    assert "val: no such folder; expected <wnid>/*.JPEG there" in message()
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").touch()
    (tmp_path / "ILSVRC2012_img_train.tar").touch()
    assert "val: no such folder; expected <wnid>/*.JPEG there" in message()
    (tmp_path / "ILSVRC2012_img_val.tar").touch()
    assert "ILSVRC2012_img_val.tar: not extracted; torchvision.datasets.ImageNet(" in message()
    (tmp_path / "ILSVRC2012_img_val.tar").unlink()
    (tmp_path / "val").mkdir()
    assert "val: no class folders in it" in message()
    (tmp_path / "val" / "n01440764.tar").touch()
    assert "n01440764.tar: not extracted" in message()
    write_jpeg(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG", 0)
    assert "images lie flat in it; sort them into class folders val/<wnid>" in message()


@forks
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "not an image", "missing"])
def test_broken_image_is_one_line_that_names_it(folder: Path, damage: str, workers: int) -> None:
    crops, path = open_val(folder), folder / "val" / WNIDS[2] / "ILSVRC2012_1.JPEG"
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"<html>404</html>")
    batches = Batches(crops, range(8), 2, workers=workers, memory=10**9)
    seen = []
    with pytest.raises(DataError) as error:
        seen.extend(y.tolist() for _, y in batches)
    assert one_line(error).startswith(f"{path}: not a readable image (")
    assert one_line(error).endswith("); fetch it again")
    assert seen == [[0, 0], [1, 1]]
    path.write_bytes(whole)
    assert [y.tolist() for _, y in batches] == [[0, 0], [1, 1], [2, 2], [3, 3]]  # nothing was kept of the broken pass


# CIFAR-10


def records(count: int, seed: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), dtype=np.uint8), [int(i) for i in rng.integers(0, 10, count)]


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2's cPickle wrote the official files with: byte strings, numpy under its old name."""

    def save_string(self, text: str | bytes) -> None:
        raw = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(text)

    dispatch = {**pickle._Pickler.dispatch, str: save_string, bytes: save_string}  # noqa: RUF012


def write_pickle(path: Path, content: object, python: int = 2) -> None:
    with path.open("wb") as file:
        if python == 2:
            Python2Pickler(file, 2).dump(content)
        else:
            pickle.dump(content, file, 2)
    raw = path.read_bytes()
    if python == 2:
        path.write_bytes(raw.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


def official(images: np.ndarray, labels: list[int]) -> dict[bytes, object]:
    names = [b"name_s_000001.png"] * len(labels)
    return {b"batch_label": b"training batch 1 of 5", b"labels": labels, b"data": images, b"filenames": names}


def write_cifar(folder: Path, form: str) -> Path:
    """All six files, with a record more in each: 1 to 5, and 6 in the test file."""
    folder.mkdir()
    for i, name in enumerate((*data.CIFAR_FILES["train"], "test_batch")):
        images, labels = records(i + 1, seed=i)
        if form == "bin":
            rows = np.concatenate([np.array(labels, np.uint8)[:, None], images], 1)
            rows.tofile(folder / f"{name}.bin")
        else:
            write_pickle(folder / name, official(images, labels), python=int(form[-1]))
    return folder


@pytest.mark.parametrize("form", ["python2", "python3", "bin"])
@pytest.mark.parametrize("around", [True, False])
def test_cifar10_in_each_official_form(tmp_path: Path, form: str, around: bool) -> None:
    folder = write_cifar(tmp_path / f"cifar-10-batches-{'bin' if form == 'bin' else 'py'}", form)
    for split, seeds in (("train", range(5)), ("test", [5])):
        ours = data.cifar10(tmp_path if around else folder, split)
        parts = [records(seed + 1, seed) for seed in seeds]
        expected = np.concatenate([images for images, _ in parts]).reshape(-1, 3, 32, 32)
        assert torch.equal(ours.tensors[0], torch.from_numpy(expected))
        assert ours.tensors[1].tolist() == [label for _, labels in parts for label in labels]
        assert (ours[0][0].dtype, ours[0][1].dtype) == (torch.uint8, torch.int64)
    assert normalize(ours.tensors[0], CIFAR10).mean().abs() < 0.2


def test_python2_pickle_is_what_it_claims_to_be(tmp_path: Path) -> None:
    write_pickle(tmp_path / "x", official(*records(2, 0)))
    raw = (tmp_path / "x").read_bytes()
    assert raw.startswith(b"\x80\x02}")
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in raw
    assert b"_codecs" not in raw
    assert pickle.loads(raw, encoding="bytes").keys() == official(*records(2, 0)).keys()


@pytest.mark.parametrize("order", ["C", "F"])
def test_cifar10_in_either_memory_order(tmp_path: Path, order: str) -> None:
    images, labels = records(3, 0)
    write_pickle(tmp_path / "test_batch", official(np.array(images, order=order), labels))
    assert np.array_equal(cifar.read(tmp_path / "test_batch")[0].reshape(3, -1), images)


def test_cifar10_files_that_are_missing(tmp_path: Path) -> None:
    def message(split: str = "train") -> str:
        with pytest.raises(DataError) as error:
            data.cifar10(tmp_path / "set", split)
        return one_line(error)

    assert "set: no such folder; extract https://" in message()
    write_cifar(tmp_path / "set", "bin")
    assert "no split 'val', only train and test" in message("val")
    (tmp_path / "set" / "data_batch_3.bin").unlink()
    assert len(data.cifar10(tmp_path / "set", "test")) == 6
    assert "data_batch_3.bin: no such file; extract https://" in message()
    for path in (tmp_path / "set").iterdir():
        path.unlink()
    assert "set: no CIFAR-10 in it; extract https://" in message()
    (tmp_path / "set" / "cifar-10-python.tar.gz").touch()
    assert "cifar-10-python.tar.gz: not extracted; run tar -xzf" in message()


IMAGES, LABELS = records(4, 0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({b"data": IMAGES, b"labels": [0, 1, 2]}, "data [4, 3072] and 3 labels"),
        ({b"data": IMAGES[:, :3000], b"labels": LABELS}, "data [4, 3000] and 4 labels"),
        ({b"data": IMAGES, b"labels": []}, "not uint8 pixels and a list of integer labels"),
        ({b"data": IMAGES, b"labels": [0, 1, 2, 10]}, "labels from 0 to 10"),
        ({b"data": IMAGES, b"labels": [0, 1, -2, 9]}, "labels from -2 to 9"),
        ({b"data": IMAGES, b"labels": [0.0, 1.0, 2.0, 3.0]}, "not uint8 pixels and a list of integer labels"),
        ({b"data": IMAGES.astype(np.int64), b"labels": LABELS}, "not uint8 pixels"),
        ({b"data": IMAGES.tobytes(), b"labels": LABELS}, "AttributeError"),
        ({b"data": IMAGES, b"fine_labels": LABELS}, "KeyError: b'labels'"),
        ([1, 2, 3], "TypeError"),
    ],
)
@pytest.mark.parametrize("python", [2, 3])
def test_pickle_of_other_content(tmp_path: Path, content: object, reason: str, python: int) -> None:
    write_pickle(tmp_path / "test_batch", content, python)
    with pytest.raises(DataError) as error:
        data.cifar10(tmp_path, "test")
    assert one_line(error).startswith(f"{tmp_path / 'test_batch'}: not a file of CIFAR-10 (")
    assert reason in one_line(error)


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call[0], self.call[1:]


def test_malicious_pickle_is_not_run(tmp_path: Path) -> None:
    path, mark = tmp_path / "test_batch", tmp_path / "mark"
    for attack in (Malicious(os.mkdir, str(mark)), Malicious(eval, f"open({str(mark)!r}, 'w').close()")):
        path.write_bytes(pickle.dumps({b"data": IMAGES, b"labels": LABELS, b"more": attack}, 2))
        with pytest.raises(DataError, match="which no file of CIFAR-10 does"):
            data.cifar10(tmp_path, "test")
        assert not mark.exists()
        pickle.loads(path.read_bytes())  # it works where one trusts it
        assert mark.exists()
        mark.rmdir() if mark.is_dir() else mark.unlink()


def test_numpy_does_not_see_what_a_pickle_says_of_arrays(tmp_path: Path) -> None:
    write_pickle(tmp_path / "test_batch", official(IMAGES, LABELS))
    raw = (tmp_path / "test_batch").read_bytes()
    shape = b"K\x04M\x00\x0c"  # 4, 3072
    assert raw.count(shape) == 1
    (tmp_path / "test_batch").write_bytes(raw.replace(shape, b"J\xff\xff\xff\x7fM\x00\x0c"))
    with pytest.raises(DataError, match="cannot reshape array of size 12288"):
        data.cifar10(tmp_path, "test")


@pytest.mark.parametrize("cut", [0, 1, 7, 60, 400, 5000, -1])
def test_truncated_cifar10(tmp_path: Path, cut: int) -> None:
    write_pickle(tmp_path / "test_batch", official(IMAGES, LABELS))
    raw = (tmp_path / "test_batch").read_bytes()
    (tmp_path / "test_batch").write_bytes(raw[:cut])
    with pytest.raises(DataError, match="not a file of CIFAR-10"):
        data.cifar10(tmp_path, "test")


@pytest.mark.parametrize(
    ("size", "label", "reason"),
    [
        (3072, 0, "no whole number of records"),
        (2 * 3073 + 1, 0, "no whole number"),
        (0, 0, "0 labels"),
        (3073, 10, "10"),
    ],
)
def test_broken_binary_file(tmp_path: Path, size: int, label: int, reason: str) -> None:
    (tmp_path / "test_batch.bin").write_bytes(bytes([label] * size))
    with pytest.raises(DataError, match=reason):
        data.cifar10(tmp_path, "test")


# Fashion-MNIST, choice and batches


def test_fashion_mnist_is_normalized_already() -> None:
    ours = data.fashion_mnist("calibration")
    x, y = next(iter(Batches(ours, range(512), 512)))
    assert (x.shape, x.dtype, y.shape) == ((512, 1, 32, 32), torch.float32, (512,))
    assert normalize(x, data.FASHION_MNIST) is x
    assert torch.equal(x, ours.tensors[0])
    with pytest.raises(DataError, match="no split 'train' here"):
        data.fashion_mnist("train")


def test_fashion_mnist_calibrates_with_others(tmp_path: Path) -> None:
    for kind, rank, size in (("images", 3, (3, 28, 28)), ("labels", 1, (3,))):
        header = struct.pack(f">i{rank}i", 0x800 | rank, *size)
        packed = gzip.compress(header + bytes(range(3)) * (math.prod(size) // 3))
        (tmp_path / f"train-{kind}-idx{rank}-ubyte.gz").write_bytes(packed)
    images, labels = data.fashion_mnist("train", tmp_path).tensors
    assert (images.shape, labels.tolist()) == ((3, 1, 32, 32), [0, 1, 2])
    with pytest.raises(DataError, match="No such file"):
        data.fashion_mnist("train", tmp_path / "missing")


def test_pick_takes_every_class_evenly() -> None:
    labels = np.repeat(np.arange(100), 50)
    for limit in (100, 200, 1000, 5000):
        assert np.bincount(labels[pick(5000, limit)]).tolist() == [limit // 100] * 100
    assert np.ptp(np.bincount(labels[pick(5000, 333)])) == 1
    assert pick(7, None) == pick(7, 7) == pick(7, 100) == list(range(7))
    assert pick(10, 1) == [0]
    with pytest.raises(DataError, match="limit is 0"):
        pick(7, 0)


def test_pick_random_depends_on_the_seed_alone() -> None:
    chosen = pick_random(1_281_167, 512, seed=0)
    assert chosen == sorted(set(chosen)) == pick_random(1_281_167, 512, seed=0) != pick_random(1_281_167, 512, seed=1)
    assert len(chosen) == 512
    assert np.mean(chosen) == pytest.approx(1_281_167 / 2, rel=0.1)
    assert chosen[:3] == [145, 504, 2396]  # also under other versions of Python
    for number in (0, 6):
        with pytest.raises(DataError, match=f"{number} training images are asked for"):
            pick_random(5, number, 0)


class Counting(TensorDataset):
    """Ten images [1, 2, 2] of uint8, in one more list each time one is read."""

    def __init__(self) -> None:
        super().__init__(torch.arange(40, dtype=torch.uint8).view(10, 1, 2, 2), torch.arange(10))
        self.read: list[int] = []

    def __getitem__(self, index: int) -> tuple:
        self.read.append(index)
        return super().__getitem__(index)


def contents(batches: Batches) -> list[tuple[list, list]]:
    return [(x.tolist(), y.tolist()) for x, y in batches]


PASS = 8 * (4 + 8)  # bytes of eight images and their labels


def test_batches_are_in_order_and_whole() -> None:
    chosen = [9, 1, 2, 3, 4, 5, 6, 7]
    batches = Batches(Counting(), chosen, 3)
    assert (len(batches), batches.images) == (3, 8)
    assert [y.tolist() for _, y in batches] == [[9, 1, 2], [3, 4, 5], [6, 7]]
    for x, y in batches:
        assert (x.dtype, x.shape[1:], y.dtype) == (torch.uint8, (1, 2, 2), torch.int64)
        assert torch.equal(x[:, 0, 0, 0], y.to(torch.uint8) * 4)


@pytest.mark.parametrize(("memory", "reads"), [(PASS, 8), (PASS - 1, 16), (0, 16)])
def test_batches_are_kept_when_all_fit(memory: int, reads: int) -> None:
    images = Counting()
    batches = Batches(images, range(8), 3, memory=memory)
    assert contents(batches) == contents(batches)
    assert len(images.read) == reads


@pytest.mark.parametrize(("memory", "copies"), [(PASS, 2), (PASS // 2, 0)])
def test_what_does_not_fit_is_let_go_at_once(memory: int, copies: int) -> None:
    iterator = iter(Batches(Counting(), range(8), 3, memory=memory))
    held = [next(iterator), next(iterator)]
    images = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.shape == (3, 1, 2, 2)]
    assert len(images) == len(held) + copies


def test_broken_off_pass_keeps_nothing() -> None:
    images = Counting()
    batches = Batches(images, range(8), 3, memory=PASS)
    next(iter(batches))
    assert len(contents(batches)) == 3
    assert images.read == [0, 1, 2, *range(8)]
    next(iter(batches))
    assert len(contents(batches)) == 3
    assert len(images.read) == 11


def test_first_pass_may_be_changed_by_its_user() -> None:
    batches = Batches(Counting(), range(8), 3, memory=PASS)
    for x, _ in batches:
        x.zero_()
    assert contents(batches) == contents(Batches(Counting(), range(8), 3))


@forks
def test_workers_read_the_same(folder: Path) -> None:
    crops = open_val(folder)
    ours, theirs = Batches(crops, range(8), 3, memory=10**9), Batches(crops, range(8), 3, workers=1, memory=10**9)
    assert contents(ours) == contents(theirs)
    for path, _ in crops.samples:
        Path(path).unlink()
    assert contents(ours) == contents(theirs)
    assert not any(x.is_shared() or y.is_shared() for x, y in theirs)  # no file descriptors are held


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("cached", [True, False])
def test_shares_are_the_batches_of_one_process(world: int, cached: bool) -> None:
    images = Counting()
    batches = Batches(images, range(8), 2, memory=PASS)
    whole = contents(batches) if cached else contents(Batches(Counting(), range(8), 2))
    images.read.clear()
    shares = [batches.share(rank, world) for rank in range(world)]
    assert [len(share) for share in shares] == [len(whole[rank::world]) for rank in range(world)]
    assert sum(share.images for share in shares) == batches.images == 8
    for _ in range(2):
        assert [contents(share) for share in shares] == [whole[rank::world] for rank in range(world)]
    assert len(images.read) == (0 if cached else 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda images: Batches(images, [0, 10], 2), "image 10 is asked for, there are 10"),
        (lambda images: Batches(images, [-1], 2), "image -1 is asked for"),
        (lambda images: Batches(images, [0], 0), "batches of 0"),
        (lambda images: Batches(images, [0], 1, workers=-1), "-1 workers"),
        (lambda images: Batches(images, [0], 1).share(2, 2), "rank is 2, expected 0 to 1"),
        (lambda images: Batches(images, [0], 1).share(-1, 2), "rank is -1"),
    ],
)
def test_batches_refuse(make: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(Counting())
