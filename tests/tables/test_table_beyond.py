"""The tables beyond the paper: what their commands write, and that each option reaches what it is meant for."""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import bits
import calibrated
import command
import encoder
import groups
import learned
import networks
import pytest
import recipes
import rounding
import splits
import tasks
import together
import torch
from cells import Store
from language_model import ASSETS, LanguageModel, encode, load_model, read_words, save_model, vocabulary_of
from options import Table, parse
from ranks import Ranks
from sources import open_images, open_text
from torch import Tensor, nn

import ocs

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--limit", "24", "--calibration", "40", "--bits", "3"]


class Tiny(nn.Module):
    """ResNet-20's inputs and outputs, and what the options ask for: norms, and layers with and without a bias."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, 8, 5, 4, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 20, 3, 2, bias=False), nn.BatchNorm2d(20)
        self.fc = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in_channels, 32, 32] -> logits [N, 10]."""
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))


@pytest.fixture
def image_options(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """That ask for a tiny network, and few synthesized inputs."""
    monkeypatch.setattr(networks, "ResNet20", Tiny)
    monkeypatch.setattr(tasks, "SYNTHETIC", 8)
    return [*SMALL, "--weights", "random"]


@pytest.fixture
def text_options(tmp_path: Path) -> list[str]:
    """That ask for a tiny network on the first words of the Bible."""
    torch.manual_seed(0)
    vocabulary = vocabulary_of(read_words(ASSETS, "test")[:200])
    save_model(LanguageModel(len(vocabulary), hidden=8), vocabulary, tmp_path / "tiny.safetensors")
    return [*SMALL, "--dataset", "bible", "--streams", "4", "--weights", str(tmp_path / "tiny.safetensors")]


def opened(table: Table, arguments: list[str], rank: int = 0, world: int = 1) -> tasks.Evaluation:
    """What the command measures on this rank."""
    args, ranks = parse(table, arguments), Ranks("cpu")
    ranks.rank, ranks.world = rank, world
    open_task = open_text if args.dataset == "bible" else open_images
    return open_task(args, args.models[0], args.weights and args.weights[0], ranks)


def made(task: tasks.Evaluation, **options: Any) -> nn.Module:
    """The quantized copy, as a table's run makes it."""
    task.prepare(options)
    with torch.inference_mode():
        return task.quantized(dict(options))[0]


# --- The commands -----------------------------------------------------------------------------------------------------

SPLITS = ["max", "select error", "knapsack", "allocate error", "both error", "both, measured"]
BITS = ["uniform", "auto", "auto, measured"]
BOTH = ("paper", "best")
OF_NORMS = ["norms, synthetic", "norms, measured", "gptq, norms measured"]
ROUNDING = ["nearest, none", "nearest, mse", "nearest, auto", "squant, none", "squant, mse", "squant, auto"]
RECIPES = ["paper, r = 0", "paper, r = 0.1", "best, r = 0", "best, r = 0.1"]
ONE = ["--granularity", "channel"]
BASES = ["3 bits, per channel, nearest", "3 bits, per channel, squant"]


def check_files(table: ModuleType, folder: Path, rows: list[str], columns: list[str], printed: str) -> None:
    """The table in all its forms: every cell once, none of which failed."""
    name = table.TABLE.name
    assert {path.name for path in folder.iterdir()} == {"cells", f"{name}.md", f"{name}.csv", f"{name}.json"}
    lines = list(csv.DictReader((folder / f"{name}.csv").read_text().splitlines()))
    places = [(line["row"], line["column"]) for line in lines]
    assert places == [("float", "float"), *((row, column) for row in rows for column in columns)]
    assert not any(line["error"] for line in lines)
    assert printed.startswith(f"\n{name.capitalize()}. Beyond the paper: ")
    assert f"| {' | '.join(columns)} |" in " ".join(printed.splitlines()[5].split())


@pytest.mark.parametrize(
    ("table", "arguments", "rows", "columns"),
    [
        (splits, ONE, BASES, SPLITS),
        (
            bits,
            ["--r", "0", "0.1"],
            [f"{recipe}, size of 3 bits, r = {r}" for recipe in BOTH for r in ("0", "0.1")],
            [*BITS, *bits.OF_NORMS],
        ),
        (calibrated, ONE, BASES, list(calibrated.COLUMNS)),
        (recipes, ["--r", "0", "0.1"], ["3 bits"], [*RECIPES, *list(recipes.MORE)]),
        (rounding, [*ONE, "--r", "0.1"], ["3 bits, per channel, r = 0.1"], ROUNDING),
        (learned, [], ["3 bits"], ["gptq", "learned", "gptq, synthetic", "learned, synthetic"]),
        (together, [], ["3 bits, inputs of 3"], list(together.COLUMNS)),
    ],
)
def test_commands_on_images(
    table: ModuleType, arguments: list[str], rows: list[str], columns: list[str], image_options: list[str],
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = [*image_options, *arguments, "--out", str(tmp_path)]
    if table is rounding:  # nothing calibrates
        at = given.index("--calibration")
        del given[at : at + 2]
    command.main(table.TABLE, given)
    check_files(table, tmp_path, rows, columns, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("table", "arguments", "rows", "columns"),
    [
        (splits, ONE, BASES, SPLITS),
        (bits, ["--r", "0.1"], [f"{recipe}, size of 3 bits, r = 0.1" for recipe in BOTH], BITS),
        (calibrated, ONE, BASES, ["alone", "gptq"]),
        (recipes, ["--r", "0", "0.1"], ["3 bits"], [*RECIPES, "gptq"]),
        (learned, [], ["3 bits"], ["gptq", "learned"]),
    ],
)
def test_commands_on_text(
    table: ModuleType, arguments: list[str], rows: list[str], columns: list[str], text_options: list[str],
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command.main(table.TABLE, [*text_options, *arguments, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "**LSTM-8**; 24 words of the King James Bible" in printed
    check_files(table, tmp_path / "out", rows, columns, printed)


def test_the_transformer_has_no_norms_to_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, *ONE, "--models", "vit", "--weights", "random", "--out", str(tmp_path)]
    command.main(calibrated.TABLE, arguments)
    printed = capsys.readouterr().out
    assert "**ViT**; 24 images of Fashion-MNIST" in printed
    left = [column for column in calibrated.COLUMNS if column not in OF_NORMS]
    check_files(calibrated, tmp_path, BASES, left, printed)
    args = argparse.Namespace(dataset="fashion-mnist", bits=[3], r=[0.1])
    assert [cell.column for cell in recipes.cells(args, "ViT")] == ["paper, r = 0.1", "best, r = 0.1", "gptq"]


@pytest.mark.parametrize("table", [splits, bits, calibrated, recipes, rounding])
def test_several_ratios_are_several_cells(table: ModuleType) -> None:
    args = parse(table.TABLE, ["--r", "0", "0.02", "0.1"])
    found = table.cells(args, "ResNet-20")
    assert len({(cell.row, cell.column) for cell in found}) == len(found)


@pytest.mark.parametrize("table", [splits, bits, calibrated, recipes, rounding, groups, learned])
def test_help_shows_commands_that_work(table: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """The lines of the module's text are parsed."""
    with pytest.raises(SystemExit):
        parse(table.TABLE, ["--help"])
    text = capsys.readouterr().out
    assert "at most so many images or words" in " ".join(text.split())
    start = f"    python benchmarks/tables/{table.TABLE.name}.py "
    usage = [line.removeprefix(start).split() for line in text.splitlines() if line.startswith(start)]
    assert {parse(table.TABLE, arguments).dataset for arguments in usage} == {"fashion-mnist", "bible"}


def test_groups_on_text(
    text_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(groups, "GROUPS", (32,))
    command.main(groups.TABLE, [*text_options, "--out", str(tmp_path / "out")])
    rows = [f"3 bits, {method}, size of groups of 32" for method in groups.METHODS]
    check_files(groups, tmp_path / "out", rows, ["per channel + OCS", "groups of 32 + OCS"], capsys.readouterr().out)


def test_as_many_splits_as_fit_the_bytes_of_groups(text_options: list[str]) -> None:
    """Two scales more for each of 50 outputs are 400 bytes, which hold 17 copies of 50 3-bit weights and a source."""
    task = opened(groups.TABLE, text_options)
    task.model = nn.Sequential(nn.Linear(96, 50))
    for given, splits_that_fit in (({"granularity": "channel"}, 17), ({"granularity": "group", "group": 32}, 0)):
        model, details = task.quantized({"wbits": 3, "within_group": 32, **given})
        assert model[0].splits == splits_that_fit
        assert details["r"] == pytest.approx(splits_that_fit / 96, abs=0.001)


# --- What reaches the quantizer ---------------------------------------------------------------------------------------


def norms_of(model: nn.Module) -> list[Tensor]:
    norms = [model.bn1, model.bn2]
    return [each.clone() for norm in norms for each in (norm.running_mean, norm.running_var)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_norms_are_estimated_again(image_options: list[str]) -> None:
    task = opened(calibrated.TABLE, image_options)
    of_float = norms_of(task.model)
    assert same(norms_of(made(task, wbits=3)), of_float)
    measured, synthetic = (made(task, wbits=3, norms=how) for how in ("measured", "synthetic"))
    assert not same(norms_of(measured), of_float)
    assert not same(norms_of(synthetic), of_float)
    assert not same(norms_of(synthetic), norms_of(measured))
    assert same(norms_of(task.model), of_float)
    x = torch.cat(task.shown())
    assert len(x) == 40
    with torch.inference_mode():
        seen = measured.conv1(x)
    torch.testing.assert_close(measured.bn1.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_synthesized_inputs_are_measured_against_the_float_model(
    image_options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, calls = opened(calibrated.TABLE, image_options), []
    batches = [torch.randn(8, 1, 32, 32)]
    monkeypatch.setattr(ocs, "synthesize", lambda *args, **options: calls.append((args, options)) or batches)
    monkeypatch.setattr(ocs, "reestimate_batchnorm", lambda *args, **options: calls.append((args, options)))
    for _ in range(2):
        made(task, wbits=3, norms="synthetic")
    (synthesized, options), *estimated = calls
    assert synthesized == (task.model, (1, 32, 32))
    assert options["images"] == 8
    for args, options in estimated:
        assert args[1] is batches
        assert options["reference"] is task.model
    assert len(estimated) == 2


def test_synthesized_inputs_calibrate(image_options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    task, given = opened(recipes.TABLE, image_options), []
    calibrate = ocs.calibrate
    monkeypatch.setattr(ocs, "calibrate", lambda *args, **options: given.append(args[1]) or calibrate(*args, **options))
    common = {"wbits": 3, "rounding": "gptq"}
    synthetic, measured = (made(task, **common, calibrated=how) for how in ("synthetic", True))
    assert [sum(map(len, batches)) for batches in given] == [8, 40]
    assert not torch.equal(synthetic.conv2.weight_int, measured.conv2.weight_int)


def test_a_rank_without_test_images_knows_their_shape(image_options: list[str]) -> None:
    """24 images are one batch, which the first of two ranks has."""
    task = opened(calibrated.TABLE, image_options, rank=1, world=2)
    assert task.count == 0
    assert task.shape() == (1, 32, 32)
    assert not same(norms_of(made(task, wbits=3, norms="synthetic")), norms_of(task.model))


def test_calibrated_options_have_their_statistics(image_options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    task, passes = opened(calibrated.TABLE, image_options), []
    calibrate = ocs.calibrate
    monkeypatch.setattr(ocs, "calibrate", lambda *args, **options: passes.append(args) or calibrate(*args, **options))
    common = {"wbits": 3, "granularity": "channel"}
    squant, gptq = made(task, **common, rounding="squant"), made(task, **common, rounding="gptq", calibrated=True)
    assert gptq.conv2.settings["rounding"] == "gptq"
    assert not torch.equal(gptq.conv2.weight_int, squant.conv2.weight_int)
    plain, known, measured = (
        made(task, **common, **options)
        for options in ({}, {"correct_bias": True}, {"correct_bias": True, "calibrated": True})
    )
    assert plain.conv2.bias is None
    assert not torch.equal(known.conv2.bias, measured.conv2.bias)
    with torch.inference_mode():
        inputs = task.model.bn1(task.model.conv1(torch.cat(task.shown()))).relu()
        lost = (task.model.conv2(inputs) - plain.conv2(inputs)).mean((0, 2, 3))
    torch.testing.assert_close(measured.conv2.bias, lost, rtol=0.2, atol=0.02)  # but for pixels of uneven use
    assert len(passes) == 1  # for all of them


def test_sensitivities_are_measured_on_the_calibration_images(
    image_options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, given = opened(splits.TABLE, image_options), []
    quantize = ocs.quantize
    monkeypatch.setattr(ocs, "quantize", lambda *args, **options: given.append(options) or quantize(*args, **options))
    made(task, wbits=3, r=0.1, allocate="error", calibrated=True)
    made(task, wbits=3, r=0.1, allocate="error")
    assert [len(batch) for batch in given[0]["calibration"]] == [32, 8]
    assert "calibration" not in given[1]


@pytest.mark.parametrize("calibrate", [False, True])
def test_the_budget_is_what_uniform_bits_take(
    calibrate: bool, image_options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, reports = opened(bits.TABLE, image_options), []
    quantize = ocs.quantize
    monkeypatch.setattr(ocs, "quantize", lambda *args, **o: reports.append((o, quantize(*args, **o))) or reports[-1][1])
    common = {"recipe": "best", "r": 0.1}
    made(task, **common, wbits=3)
    made(task, **common, size_of=3, **({"calibrated": True} if calibrate else {}))
    (_, alone), (_, uniform), (options, automatic) = reports
    assert options["budget"] == uniform.packed_bytes == alone.packed_bytes
    assert automatic.packed_bytes <= uniform.packed_bytes
    assert ("calibration" in options) == calibrate


def test_other_calibration_is_another_cell(image_options: list[str], text_options: list[str], tmp_path: Path) -> None:
    store, options = Store(tmp_path), {"wbits": 3, "calibrated": True}

    def path(*arguments: str) -> Path:
        return store.path(opened(calibrated.TABLE, list(arguments)), options)

    assert path(*image_options) == path(*image_options)
    assert path(*image_options) != path(*image_options, "--calibration", "41")
    assert path(*image_options) != path(*image_options, "--seed", "1")
    assert path(*text_options) != path(*text_options, "--calibration", "41")


# --- Text that calibrates ---------------------------------------------------------------------------------------------


def test_text_that_calibrates_is_not_scored(text_options: list[str]) -> None:
    """Scored are the first words, shown the last."""
    all_words = read_words(ASSETS, "test")
    limit = len(all_words) - 40
    task = opened(calibrated.TABLE, [*text_options, "--limit", str(limit)])
    _, vocabulary = load_model(text_options[-1])
    scored = torch.cat([group.t().flatten() for group in task.batches])
    assert torch.equal(scored, encode(all_words[:limit], vocabulary)[: len(scored)])
    assert torch.equal(task.text.t().flatten(), encode(all_words[-40:], vocabulary))
    shown = []
    task.model.register_forward_pre_hook(lambda _, args: shown.append(args[0]))
    task.shown()(task.model)
    assert torch.equal(torch.cat(shown), task.text[:-1])


def test_more_text_than_is_left_is_refused(text_options: list[str], tmp_path: Path) -> None:
    count = len(read_words(ASSETS, "test"))
    message = r"--calibration 40: 39 words are left beside those scored; give a lower --limit"
    with pytest.raises(SystemExit, match=message):
        command.main(calibrated.TABLE, [*text_options, "--limit", str(count - 39), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="7 words cannot be read in 4 streams"):
        command.main(calibrated.TABLE, [*text_options, "--calibration", "7", "--out", str(tmp_path)])


def test_what_cannot_calibrate_is_said(image_options: list[str], text_options: list[str]) -> None:
    text, images = opened(calibrated.TABLE, text_options), opened(calibrated.TABLE, image_options)
    with pytest.raises(ValueError, match="LSTM-8: its inputs cannot be synthesized"):
        text.prepare({"norms": "synthetic"})
    text.text = images.calibration = None
    for task in (text, images):
        with pytest.raises(ValueError, match=r": there is nothing to calibrate with; give --calibration"):
            task.prepare({"calibrated": True})


# --- A sentence encoder -----------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """As transformers' are called and answer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(30, 24)
        self.layers = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> argparse.Namespace:
        x = self.words(input_ids)
        return argparse.Namespace(last_hidden_state=x + self.layers(x))


def tokenizer(sentences: list[str], padding: bool, return_tensors: str) -> dict[str, Tensor]:
    assert (padding, return_tensors) == (True, "pt")
    ids = [torch.tensor([len(word) for word in sentence.split()]) for sentence in sentences]
    mask = [torch.ones_like(each) for each in ids]
    padded = (nn.utils.rnn.pad_sequence(each, batch_first=True) for each in (ids, mask))
    return dict(zip(("input_ids", "attention_mask"), padded, strict=True))


def test_embeddings_do_not_depend_on_padding() -> None:
    sentences = encoder.verses(ASSETS / "test.txt")[:40]
    assert all(len(sentence.split()) >= 8 and "<unk>" not in sentence for sentence in sentences)
    model, batches = Encoder().eval(), encoder.tokens(tokenizer, sentences)
    assert [len(batch["input_ids"]) for batch in batches] == [32, 8]
    alone = torch.cat([encoder.embeddings(model, [tokenizer([s], True, "pt")]) for s in sorted(sentences, key=len)])
    torch.testing.assert_close(encoder.embeddings(model, batches), alone)
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(40))


def test_distances_fall_with_bits_and_by_what_was_calibrated() -> None:
    sentences = encoder.verses(ASSETS / "test.txt")
    batches, others = (encoder.tokens(tokenizer, part) for part in (sentences[:40], sentences[40:200]))
    columns = {"6 bits": {"wbits": 6}, "3 bits": {"wbits": 3}}
    found = encoder.distances(Encoder().eval(), batches, others, encoder.WEIGHTS, columns, 0.1)
    learned = {row for row in found if "learned" in row}
    assert all(0 < six < three for row, (six, three) in found.items() if row not in learned)
    assert all(math.isnan(six) and three > 0 for six, three in (found[row] for row in learned))
    assert found["recipe best, gptq"][1] < 0.8 * found["recipe best"][1]
    assert "| 6 bits | 3 bits |" in " ".join(encoder.table(found, list(columns)).split())


def test_a_scale_for_each_row_is_calibrated_where_channels_are_split() -> None:
    sentences = encoder.verses(ASSETS / "test.txt")
    batches, others = (encoder.tokens(tokenizer, part) for part in (sentences[:40], sentences[40:200]))
    of_rows = encoder.INPUTS["6 bits, a scale per row"]
    rows = {"nearest": of_rows, "gptq": of_rows | {"rounding": "gptq"}}
    found = encoder.distances(Encoder().eval(), batches, others, rows, encoder.SPLITS, 0.1)
    assert len(found) == 2
    for whole, *split in found.values():
        assert all(0 < each < 1 and each != whole for each in split)
