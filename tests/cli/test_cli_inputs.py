"""Inputs of the command line: images, arrays, and what is made up where there are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ocs.cli.input_form import InputForm
from ocs.cli.inputs import Batches, holds_arrays, random_batch, read_image, with_shape
from ocs.cli.models import torchvision_module
from ocs.cli.say import UsageError

FORM = InputForm((1, 3, 8, 8), mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))


def test_images_are_prepared_as_by_torchvision(tmp_path: Path) -> None:
    presets = torchvision_module("torchvision.transforms._presets")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)
    smooth = Image.fromarray(pixels).resize((60, 90), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.png")
    form = InputForm((1, 3, 28, 28), mean=FORM.mean, std=FORM.std, share=28 / 32)
    theirs = presets.ImageClassification(crop_size=28, resize_size=32, mean=FORM.mean, std=FORM.std)(smooth)
    torch.testing.assert_close(read_image(tmp_path / "a.png", form), theirs, rtol=0, atol=0.05)


def test_grey_images_and_sizes(tmp_path: Path) -> None:
    Image.new("L", (3, 50), 128).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", FORM).shape == (3, 8, 8)
    grey = read_image(tmp_path / "a.png", InputForm((1, 1, 8, 12)))
    assert grey.shape == (1, 8, 12)
    assert float(grey.mean()) == pytest.approx((128 / 255 - 0.449) / 0.226, abs=1e-5)
    with pytest.raises(ValueError, match="images have 1 or 3 channels, and the model takes 4"):
        read_image(tmp_path / "a.png", InputForm((1, 4, 8, 8)))


def test_a_folder_of_images(tmp_path: Path) -> None:
    for kind in ("cats", "dogs"):
        (tmp_path / kind).mkdir()
        for i in range(5):
            Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / kind / f"{i}.jpg")
    (tmp_path / "labels.txt").write_text("cats")
    batches = Batches(FORM, str(tmp_path), 6, 4)
    assert [len(batch) for batch in batches] == [len(batch) for batch in batches] == [4, 2]
    assert len(batches) == 2
    assert sum("dogs" in str(path) for path in batches.files) == 3  # of both, where there are too many
    assert batches.said.startswith("6 images of ")


def test_arrays(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(10, 3, 4))
    np.save(tmp_path / "x.npy", x)
    found = list(Batches(FORM, str(tmp_path / "x.npy"), 7, 4))
    assert [len(batch) for batch in found] == [4, 3]
    torch.testing.assert_close(torch.cat(found), torch.tensor(x[:7], dtype=torch.float32))
    np.save(tmp_path / "y.npy", x)
    assert sum(len(batch) for batch in Batches(FORM, str(tmp_path), 15, 4)) == 15
    ids, mask = torch.arange(6).view(3, 2), torch.ones(3, 2, dtype=torch.bool)
    save_file({"input_ids": ids.int(), "attention_mask": mask}, tmp_path / "words.safetensors")
    (batch,) = Batches(FORM, str(tmp_path / "words.safetensors"), 8, 8)
    assert torch.equal(batch["input_ids"], ids)
    assert torch.equal(batch["attention_mask"], mask)
    assert holds_arrays(str(tmp_path / "x.npy"))
    named = InputForm((1, 2), ("input_ids",), words=9)
    np.save(tmp_path / "ids.npy", ids.numpy())
    (batch,) = Batches(named, str(tmp_path / "ids.npy"), 8, 8)
    assert torch.equal(batch["input_ids"], ids)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("no image")
    (tmp_path / "mixed").mkdir()
    Image.new("L", (3, 5)).save(tmp_path / "mixed" / "a.png")
    np.save(tmp_path / "mixed" / "b.npy", np.ones(3))
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.full((4, 4), 3000, np.uint16)).save(tmp_path / "deep" / "a.png")
    np.save(tmp_path / "bytes.npy", np.ones((2, 3), np.uint8))
    np.save(tmp_path / "complex.npy", np.ones((2, 3), np.complex64))
    np.save(tmp_path / "objects.npy", np.array([{}], object))
    np.save(tmp_path / "one.npy", np.float32(3))
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "cut.safetensors").write_bytes(b"")
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "rows.safetensors")
    for name, says in (
        ("empty", "none of its 0 files ends in .jpg"),
        ("text", "none of its 1 files ends in .jpg"),
        ("broken", r"a.png: it is no image that can be read"),
        ("deep", "a.png: .*more than 8 bits for a pixel"),
        ("mixed", "images as well as arrays"),
        ("bytes.npy", "it holds uint8"),
        ("complex.npy", "it holds complex numbers"),
        ("objects.npy", "it is no array of numbers"),
        ("one.npy", "it holds no rows"),
        ("cut.npy", "it is no array of numbers"),
        ("cut.safetensors", "it is no safetensors file"),
        ("rows.safetensors", r"different numbers of rows: \[2, 3\]"),
        ("none", "there is no such file or folder"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=says):
            list(Batches(FORM, str(tmp_path / name), 8, 8))
    with pytest.raises(ValueError, match="images do not fit a model that takes 1,32"):
        Batches(InputForm((1, 32), words=7), str(tmp_path / "broken"), 8, 8)


def test_random_inputs_are_said_to_be_random_and_repeat() -> None:
    batches = Batches(FORM, None, 5, 4)
    first, second = list(batches), list(batches)
    assert [len(batch) for batch in first] == [4, 1]
    assert all(map(torch.equal, first, second))
    assert "random" in batches.said
    assert "no data was given" in batches.said
    generator = torch.Generator()
    assert random_batch(InputForm((32, 1, 5)), 4, generator).shape == (32, 4, 5)
    words = random_batch(InputForm((1, 32), ("input_ids", "decoder_input_ids"), words=7), 2, generator)
    assert words["input_ids"].shape == words["decoder_input_ids"].shape == (2, 32)
    assert words["input_ids"].max() < 7


def test_shapes_that_users_give() -> None:
    assert with_shape(FORM, (1, 3, 16, 16), "m").shape == (1, 3, 16, 16)
    assert with_shape(FORM, (1, 3, 16, 16), "m").mean == FORM.mean
    assert with_shape(None, (1, 5), "m").shape == (1, 5)
    with pytest.raises(UsageError, match="--shape 3,16,16: give that of a batch of one, 1,3,16,16"):
        with_shape(FORM, (3, 16, 16), "m")
    with pytest.raises(UsageError, match="nothing says what m takes: give --shape"):
        with_shape(None, None, "m")
