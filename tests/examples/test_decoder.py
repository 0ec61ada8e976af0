"""The decoder-only transformer, the script that trains it, and what the tables show on the bundled one."""

from __future__ import annotations

import copy
import json
from argparse import Namespace
from itertools import pairwise
from pathlib import Path

import pytest
import recipes
import torch
import train_decoder
from decoder import Decoder
from language_model import (
    ASSETS,
    DECODER_WEIGHTS,
    LanguageModel,
    encode,
    load_model,
    losses,
    perplexity,
    read_words,
    save_model,
    streams,
)
from options import parse
from ranks import Ranks
from sources import open_text
from torch import Tensor

import ocs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bundled() -> tuple[Decoder, Tensor]:
    model, vocabulary = load_model(DECODER_WEIGHTS)
    return model, encode(read_words(ASSETS, "test"), vocabulary)


@torch.inference_mode()
def test_each_word_sees_those_before_it_in_its_window_and_the_one_before(bundled: tuple[Decoder, Tensor]) -> None:
    """Two windows give what one pass gives, and later words change nothing of what came before."""
    model, words = bundled
    text = streams(words[:301], 3)[:100]
    whole, _ = model(text)
    first, state = model(text[:64])
    second, _ = model(text[64:], state)
    torch.testing.assert_close(torch.cat((first, second)), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(text[:50])[0], whole[:50], rtol=1e-4, atol=1e-4)
    other = text.clone()
    other[0] += 1
    assert not torch.allclose(model(other)[0][99], whole[99], atol=1e-3)
    assert sum(loss.numel() for loss in losses(model, text)) == 99 * 3


def test_the_bundled_one_is_small_and_as_good_as_its_log_says(bundled: tuple[Decoder, Tensor]) -> None:
    model, words = bundled
    assert DECODER_WEIGHTS.stat().st_size < 5_000_000
    assert model.config["words"] == 7060
    log = json.loads(DECODER_WEIGHTS.with_suffix(".json").read_text())
    assert train_decoder.count(model) == log["weights"]
    assert perplexity(model, words[:10_000]) == pytest.approx(log["perplexity"]["test"], rel=0.15)


def test_every_layer_but_the_tied_one_is_quantized_and_splits_help(bundled: tuple[Decoder, Tensor]) -> None:
    model, words = bundled

    def quantized(bits: int, r: float) -> float:
        ours = copy.deepcopy(model)
        with pytest.warns(UserWarning, match=r"its weight is shared with embedding.weight"):
            report = ocs.quantize(ours, wbits=bits, r=r, expand=False)
        layers = {layer.name for layer in report.layers if not layer.reason}
        assert len(layers) == 7 * model.config["layers"]
        return perplexity(ours, words[:4000])

    of_float = perplexity(model, words[:4000])
    assert quantized(8, 0.02) == pytest.approx(of_float, rel=0.005)
    found = [quantized(4, r) for r in (0.0, 0.05)]
    assert all(less < more for more, less in pairwise([*found, of_float]))


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load(tied: bool, tmp_path: Path) -> None:
    model = Decoder(7, width=8, heads=2, layers=1, inner=12, tied=tied).eval()
    save_model(model, list("abcdefg"), tmp_path / "x.safetensors")
    again, vocabulary = load_model(tmp_path / "x.safetensors")
    assert vocabulary == list("abcdefg")
    assert (again.decoder.weight is again.embedding.weight) == tied
    assert torch.equal(again(torch.arange(7)[:, None])[0], model(torch.arange(7)[:, None])[0])


def test_tables_open_it_by_name() -> None:
    arguments = ["--dataset", "bible", "--models", "Decoder", "--limit", "2000", "--calibration", "700", "--bits", "3"]
    args = parse(recipes.TABLE, [*arguments, "--r", "0.05"])
    with Ranks("cpu") as ranks:
        task = open_text(args, "Decoder", None, ranks)
    assert task.name == "Decoder-200"
    columns = [cell.column for cell in recipes.cells(args, task.name)]
    assert columns == ["paper, r = 0.05", "best, r = 0.05", "gptq"]
    settings = [None, *(cell.options for cell in recipes.cells(args, task.name))]
    found = []
    for options in settings:
        task.prepare(options)
        sums, _, _ = task.measure(options, lambda done: None)
        found.append(task.metric.estimate(sums.tolist())[0])
    of_float, paper, best, gptq = found
    assert of_float < gptq < best < paper


def test_training_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, or stopped after four steps and then asked for as many as the whole run."""
    monkeypatch.setattr(train_decoder, "EVERY", 2)
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(" ".join(f"word{i * i % 17}" for i in range(700)) + "\n")
    torch.manual_seed(0)
    vocabulary = ["<eos>", "<unk>", *(f"word{i}" for i in range(17))]
    save_model(LanguageModel(19, hidden=10, tied=True), vocabulary, tmp_path / "lstm.safetensors")

    def run(out: str, steps: int, rate: float = 0.01) -> list[float]:
        (tmp_path / out).mkdir(exist_ok=True)
        settings = {"rate": rate, "batch": 4, "seed": 0, "fall": 2, "steps": steps, "data": tmp_path}
        train_decoder.train(Namespace(**settings, embedding=tmp_path / "lstm.safetensors", out=tmp_path / out))
        return [line["train"] for line in json.loads((tmp_path / out / "decoder.json").read_text())["steps"]]

    whole = run("whole", 8)
    assert whole[-1] < whole[0]
    assert len(run("parts", 6)) == 3
    assert run("parts", 8) == whole
    with pytest.raises(SystemExit, match="of a run of another rate"):
        run("parts", 8, rate=0.02)
