"""The language model, its text, the script that trains it, and what Table 6 shows on the bundled one."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from language_model import (
    ASSETS,
    EOS,
    UNKNOWN,
    WEIGHTS,
    LanguageModel,
    encode,
    load_model,
    losses,
    perplexity,
    read_words,
    save_model,
    streams,
    vocabulary_of,
    windows,
)
from torch import Tensor

import ocs

ROOT = Path(__file__).resolve().parents[2]
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext-2"


# --- Text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wiki.test.tokens", "test.txt"])
def test_words_of_the_official_files(name: str, tmp_path: Path) -> None:
    """A title line, an empty line (one blank) and a paragraph, as WikiText-2 has them."""
    (tmp_path / name).write_text(" \n = A café = \n \n It is <unk> @-@ new . \n", encoding="utf-8")
    words = read_words(tmp_path, "test")
    assert words == [EOS, "=", "A", "café", "=", EOS, EOS, "It", "is", UNKNOWN, "@-@", "new", ".", EOS]
    vocabulary = vocabulary_of(words)
    assert vocabulary[:4] == [EOS, UNKNOWN, "=", "A"]
    assert encode(["A", "cat", EOS], vocabulary).tolist() == [3, 1, 0]


def test_what_is_not_there_or_no_text_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the train split should be here as wiki.train.tokens or train.txt"):
        read_words(tmp_path, "train")
    (tmp_path / "test.txt").write_bytes(b"PK\xff\xfe\0")
    with pytest.raises(ValueError, match=r"test.txt: text in UTF-8 expected"):
        read_words(tmp_path, "test")
    (tmp_path / "test.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="there are none"):
        read_words(tmp_path, "test")


def test_streams_and_windows_predict_every_word_but_the_first_of_each_stream() -> None:
    text = streams(torch.arange(103), 4)
    assert text.shape == (25, 4)
    assert text[:, 1].tolist() == list(range(25, 50))
    pairs = list(windows(text, 10))
    assert [len(inputs) for inputs, _ in pairs] == [10, 10, 4]
    assert torch.equal(torch.cat([targets for _, targets in pairs]), text[1:])
    assert all(torch.equal(inputs + 1, targets) for inputs, targets in pairs)
    with pytest.raises(ValueError, match="7 words cannot be read in 4 streams"):
        streams(torch.arange(7), 4)


# --- The network ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled() -> tuple[LanguageModel, Tensor]:
    model, vocabulary = load_model()
    return model, encode(read_words(ASSETS, "test"), vocabulary)


@torch.inference_mode()
def test_windows_carry_the_state_over(bundled: tuple[LanguageModel, Tensor]) -> None:
    """Window by window gives what one pass over the whole text gives."""
    model, words = bundled
    text = streams(words[:400], 4)
    logits, _ = model(text[:-1])
    whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[1:].flatten())
    assert torch.cat(list(losses(model, text))).mean() == pytest.approx(float(whole), rel=1e-5)
    assert perplexity(model, words[:400], 4) == pytest.approx(float(whole.exp()), rel=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load(tied: bool, tmp_path: Path) -> None:
    model = LanguageModel(7, hidden=4, tied=tied).eval()
    save_model(model, list("abcdefg"), tmp_path / "x.safetensors")
    again, vocabulary = load_model(tmp_path / "x.safetensors")
    assert vocabulary == list("abcdefg")
    assert (again.decoder.weight is again.embedding.weight) == tied
    assert torch.equal(again(torch.arange(7)[:, None])[0], model(torch.arange(7)[:, None])[0])
    (tmp_path / "y.safetensors").write_bytes(b"something else")
    for path in (tmp_path / "y.safetensors", ROOT / "assets" / "fashion-mnist" / "resnet20.safetensors"):
        with pytest.raises(ValueError, match=r"a file of examples/train_language_model.py expected"):
            load_model(path)


def test_training_goes_on_where_it_was(tmp_path: Path) -> None:
    text = " ".join(f"word{i * i % 17}" for i in range(400))
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(f"{text}\n")

    def line(out: str, epochs: int, *options: str) -> list[str | Path]:
        return [
            sys.executable, ROOT / "examples" / "train_language_model.py", "--data", tmp_path, "--out", tmp_path / out,
            "--epochs", str(epochs), "--hidden", "8", "--batch", "4", "--init", "0.1", "--rate", "0.1",
            *options,
        ]  # fmt: skip

    def run(out: str, epochs: int, half: bool = True) -> list[dict]:
        subprocess.run(line(out, epochs, *(["--half"] if half else [])), capture_output=True, check=True)
        epochs_run = json.loads((tmp_path / out / "lstm.json").read_text())["epochs"]
        return [{key: line[key] for key in ("epoch", "rate", "train")} for line in epochs_run]

    whole = run("whole", 3)
    assert whole[-1]["train"] < whole[0]["train"]
    run("parts", 1, half=False)
    assert run("parts", 3) == whole
    assert run("parts", 3) == whole  # nothing is left to do
    for epochs, options, reason in ((4, [], "a float16 model"), (3, ["--clip", "1"], "another clip")):
        done = subprocess.run(line("parts", epochs, *options), capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert f"there lies the run of {reason}" in done.stderr
    assert load_model(tmp_path / "parts" / "lstm.safetensors")[0].config["hidden"] == 8


# --- What is bundled, and what Table 6 shows on it --------------------------------------------------------------------


def test_assets(bundled: tuple[LanguageModel, Tensor]) -> None:
    model, words = bundled
    assert WEIGHTS.stat().st_size < 8_000_000
    assert model.config["hidden"] == 200
    assert words.numel() == len(read_words(ASSETS, "test"))
    assert (words == 1).float().mean() < 0.02  # <unk>


def test_perplexity_falls_as_channels_are_split(bundled: tuple[LanguageModel, Tensor]) -> None:
    """The order of the paper's Table 6, and four bits beside it."""
    model, words = bundled

    def quantized(bits: int, r: float) -> float:
        ours = copy.deepcopy(model)
        with pytest.warns(UserWarning, match="its weight is shared with embedding.weight"):
            report = ocs.quantize(ours, wbits=bits, r=r, expand=False)
        assert "shared" in next(layer.reason for layer in report.layers if layer.name == "decoder")
        return perplexity(ours, words[:10_000])

    of_float = perplexity(model, words[:10_000])
    for bits, most in ((5, 1.03), (4, 1.15)):
        found = [quantized(bits, r) for r in (0.0, 0.02, 0.1)]
        assert all(less < more for more, less in pairwise(found))
        assert of_float * 0.99 < found[-1] < found[0] < of_float * most
    assert quantized(6, 0.02) == pytest.approx(of_float, rel=0.005)


@pytest.mark.skipif(not WIKITEXT.is_dir(), reason="WikiText-2 is not at hand")
def test_wikitext_2(bundled: tuple[LanguageModel, Tensor]) -> None:
    """The counts that WikiText-2's authors give, and a short evaluation with what words the bundled model knows."""
    model, _ = bundled
    vocabulary = load_model()[1]
    eight = copy.deepcopy(model)
    ocs.quantize(eight, wbits=8, r=0.02, expand=False, skip="decoder")
    for split, count in (("valid", 217_646), ("test", 245_569)):
        words = read_words(WIKITEXT, split)
        assert len(words) == count
        some = encode(words[:4000], vocabulary)
        assert perplexity(eight, some) == pytest.approx(perplexity(model, some), rel=0.01)
