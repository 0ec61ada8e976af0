"""The paper's tables as commands: numbers, layout, resuming, failures, ranks, and what each table must show."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import command
import pytest
import table1
import table2
import table3
import table4
import table5
import table6
import torch
from cells import FLOAT, Cell, Run, Store
from layout import Block, aligned, as_csv, markdown, records
from ranks import Ranks
from results import fill
from tasks import PERPLEXITY, TOP1, perplexity, wilson

import ocs

ROOT = Path(__file__).resolve().parents[2]
FASHION = ["--dataset", "fashion-mnist"]


# --- Numbers ----------------------------------------------------------------------------------------------------------


def test_wilson_interval_holds_what_it_promises() -> None:
    value, low, high = wilson([2000, 1890])
    assert value == 94.5
    for bound in (low, high):  # the bounds solve |p - bound| = z sqrt(bound (1 - bound) / n)
        p = bound / 100
        assert math.isclose(abs(0.945 - p), 1.959964 * math.sqrt(p * (1 - p) / 2000), rel_tol=1e-6)
    assert wilson([10, 10])[2] == pytest.approx(100)
    assert wilson([10, 0])[1] == pytest.approx(0)


def test_perplexity_and_its_interval() -> None:
    losses = torch.rand(35, 400, dtype=torch.float64).add(4)
    s, t = losses.sum(0), torch.full((400,), 35.0, dtype=torch.float64)
    value, low, high = perplexity([float(x) for x in (s.sum(), (s * s).sum(), (s * t).sum(), t.sum(), t @ t, 400)])
    assert math.isclose(value, math.exp(losses.mean()), rel_tol=1e-9)
    half = 1.959964 * float((s / 35).std()) / math.sqrt(400)
    assert math.isclose(math.log(high / value), half, rel_tol=1e-6)
    assert math.isclose(math.log(value / low), half, rel_tol=1e-6)


def test_the_papers_numbers_are_all_there() -> None:
    def leaves(tree: object) -> int:
        return sum(map(leaves, tree.values())) if isinstance(tree, dict) else isinstance(tree, float | int)

    counted = {name: leaves(part) for name, part in command.PAPER.items()}
    assert counted == {
        "source": 0, "table1": 32, "table2": 4 * (1 + 5 * 11), "table3": 4 * (1 + 5 * 8), "table4": 6 * 2 + 2 + 2,
        "table5": 8, "table6": 1 + 2 * 4 * 4,
    }  # fmt: skip


@pytest.mark.parametrize("table", [table1, table2, table3, table4, table5, table6])
def test_every_number_of_the_paper_has_its_cell(table: ModuleType) -> None:
    for model in table.TABLE.models:
        args = command.parse(table.TABLE, [])
        cells = table.cells(args, model)
        theirs = [cell for cell in cells if cell.paper is not None]
        expected = {"table1": 32, "table2": 55, "table3": 40, "table4": 8, "table5": 8, "table6": 32}[table.TABLE.name]
        assert len(theirs) == expected
        assert len({(cell.row, cell.column) for cell in cells}) == len(cells)


# --- Running ----------------------------------------------------------------------------------------------------------


class FakeTask:
    """Right answers by options; what it was asked for is noted."""

    name, what, identity, metric, unit, count = "net", "4 images", ["net"], TOP1, "image", 4

    def __init__(self, answers: dict[str, int]) -> None:
        self.answers, self.asked = answers, []

    def prepare(self, options: object) -> None:
        pass

    def measure(self, options: dict | None, advance: object) -> tuple[torch.Tensor, dict, dict]:
        name = "float" if options is None else f"{options.get('clip', 'none')}, {options.get('r', 0.0):g}"
        self.asked.append(name)
        if name not in self.answers:
            raise RuntimeError("out of luck")
        advance(4)
        return torch.tensor([4, self.answers[name]]).double(), {}, {"planning": 0.0, "data": 0.0, "forward": 1e-3}


def grid() -> list[Cell]:
    arguments = argparse.Namespace(bits=[5], r=[0.02], clip=["none", "mse", "kl"], abits=8)
    return table2.cells(arguments, "ResNet-50")


ANSWERS = {"float": 4, "none, 0": 3, "mse, 0": 2, "kl, 0": 1, "none, 0.02": 3, "mse, 0.02": 4}


def run_of(folder: Path, **options: bool) -> Run:
    return Run(Store(folder, **options), Ranks("cpu"))


def test_best_clip_and_its_combination_with_ocs(tmp_path: Path) -> None:
    task = FakeTask(ANSWERS)
    found = run_of(tmp_path).measure(task, grid())
    assert found["5 bits", "best"] == found["5 bits", "clip none"]  # the best of all
    assert found["5 bits", "OCS 0.02 + best clip"]["options"]["clip"] == "mse"  # of those that clip
    assert found["5 bits", "OCS 0.02 + best clip"]["value"] == 100
    assert task.asked == ["float", "none, 0", "mse, 0", "kl, 0", "none, 0.02", "mse, 0.02"]


def test_clip_columns_as_published(tmp_path: Path) -> None:
    """--clip-as release: mse, aciq and kl are the release's, of weights and inputs; columns keep their names."""
    arguments = [*FASHION, "--limit", "8", "--bits", "4", "--r", "0.05", "--clip", "none", "kl", "--batch-size", "4"]
    for table, option in ((table2, "clip"), (table3, "act_clip")):
        command.main(table.TABLE, [*arguments, "--clip-as", "release", "--calibration", "8", "--out", str(tmp_path)])
        content = json.loads((tmp_path / f"{table.TABLE.name}.json").read_text())
        asked = {cell["column"]: cell["options"].get(option) for cell in content["cells"]}
        assert (asked["clip none"], asked["clip kl"]) == ("none", "kl-release")
        assert content["settings"]["clip_as"] == "release"
        if table is table2:
            assert asked["OCS 0.05 + best clip"] == "kl-release"
    assert Cell("row", "best", best_of=("clip kl",)).clipped_as_released().options is None


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    first = FakeTask(ANSWERS)
    run_of(tmp_path).measure(first, grid()[:2])
    second, run = FakeTask(ANSWERS), run_of(tmp_path)
    found = run.measure(second, grid())
    assert second.asked == ["kl, 0", "none, 0.02", "mse, 0.02"]
    assert (run.measured, run.store.reused) == (3, 3)
    fresh = FakeTask(ANSWERS)
    assert run_of(tmp_path, fresh=True).measure(fresh, grid()).keys() == found.keys()
    assert len(fresh.asked) == 6
    next(tmp_path.iterdir()).write_text('{"value": 1')  # cut off
    third = FakeTask(ANSWERS)
    assert run_of(tmp_path).measure(third, grid())["float", "float"]["value"] == 100
    assert len(third.asked) == 1


def test_other_weights_or_data_are_other_cells(tmp_path: Path) -> None:
    run_of(tmp_path).measure(FakeTask(ANSWERS), grid())
    other = FakeTask(ANSWERS)
    other.identity = ["net", "other images"]
    run_of(tmp_path).measure(other, grid())
    assert len(other.asked) == 6


def test_a_failing_cell_does_not_lose_the_others(tmp_path: Path) -> None:
    task = FakeTask({name: right for name, right in ANSWERS.items() if name != "mse, 0"})
    found = run_of(tmp_path).measure(task, grid())
    assert found["5 bits", "clip mse"]["error"] == "RuntimeError: out of luck"
    assert found["5 bits", "OCS 0.02 + best clip"]["error"].endswith("out of luck")  # with kl, the best that is left
    assert found["5 bits", "OCS 0.02"]["value"] == 75
    block = Block("net", "", TOP1, grid(), found, "ResNet-50 on ImageNet", 76.1)
    assert markdown([block]).count("failed") == 2
    again = FakeTask(ANSWERS)
    run_of(tmp_path).measure(again, grid())
    assert again.asked == ["mse, 0", "mse, 0.02"]  # failures are tried again


def test_a_perplexity_without_bound_is_a_failure(tmp_path: Path) -> None:
    class Diverging(FakeTask):
        metric = PERPLEXITY

        def measure(self, options: dict | None, advance: object) -> tuple[torch.Tensor, dict, dict]:
            return torch.tensor([1e5, 1e9, 1e6, 100, 100, 10]).double(), {}, {}

    run = run_of(tmp_path)
    found = run.measure(Diverging({}), [])
    assert found["float", "float"]["error"] == "perplexity is inf"
    assert run.failed == 1


# --- Layout -----------------------------------------------------------------------------------------------------------


def block(**options: object) -> Block:
    cells = [
        Cell("5 bits", "a", {}, paper=70.0, axes={"bits": 5, "r": 0.0}, curve="OCS"),
        Cell("5 bits", "b", {}, paper=72.0, axes={"bits": 5, "r": 0.1}, curve="OCS"),
        Cell("4 bits", "a", {}, axes={"bits": 4, "r": 0.0}, curve="OCS"),
        Cell("4 bits", "b", {}, axes={"bits": 4, "r": 0.1}, curve="OCS"),
    ]
    values = [80.04, 80.01, 60.0, 61.0]
    results = {(c.row, c.column): {"value": v, "low": v - 1, "high": v + 1} for c, v in zip(cells, values, strict=True)}
    results[FLOAT.row, FLOAT.column] = {"value": 90.0, "low": 89.0, "high": 91.0}
    return Block("net", "8 images", TOP1, cells, results, "ResNet-50 on ImageNet", 76.0, **options)


def test_ours_beside_the_papers_and_the_difference() -> None:
    lines = markdown([block(same=True)]).splitlines()
    assert lines[0] == (
        "**net**; 8 images; top-1 %; float 90.0 (89.0 to 91.0); 95 % interval of a cell ± 1.0 to 1.0; "
        "the paper's: ResNet-50 on ImageNet, float 76"
    )
    cells = [[text.strip() for text in line.strip("|").split("|")] for line in lines[4:]]
    assert cells == [
        ["5 bits", "ours", "**80.0**", "**80.0**"],  # they show the same
        ["", "paper", "70.0", "**72.0**"],
        ["", "difference", "+10.0", "+8.0"],
        ["4 bits", "ours", "60.0", "**61.0**"],
    ]
    assert len({len(line) for line in lines[2:]}) == 1


def test_on_other_data_the_changes_from_float_are_compared() -> None:
    first = block().cells[0]
    assert math.isclose(block().difference(first), (80.04 - 90) - (70 - 76))
    assert "difference of changes" in markdown([block()])
    results = {(FLOAT.row, FLOAT.column): {"value": 40.0}, (first.row, first.column): {"value": 44.0}}
    lstm = Block("LSTM", "", PERPLEXITY, [first], results, "LSTM", 56.0)
    assert math.isclose(lstm.difference(first), 10 - 25)  # percent: 44 / 40, 70 / 56


def test_csv_and_records_hold_every_cell() -> None:
    rows = list(csv.DictReader(as_csv([block()]).splitlines()))
    assert [row["value"] for row in rows] == ["90.0", "80.04", "80.01", "60.0", "61.0"]
    assert rows[2]["r"] == "0.1"
    assert rows[2]["paper"] == "72.0"
    json.dumps(list(records([block()])), allow_nan=False)


def test_results_page_takes_new_tables_and_keeps_the_rest(tmp_path: Path) -> None:
    (tmp_path / "table1.md").write_text("NEW\n")
    (tmp_path / "table1.png").write_bytes(b"png")
    page = "text\n<!-- table1 -->\nold\n<!-- /table1 -->\nmore\n<!-- lstm/table6 -->\nkept\n<!-- /lstm/table6 -->\n"
    docs = tmp_path / "docs"
    docs.mkdir()
    filled, missing = fill(page, tmp_path, docs)
    assert "old" not in filled
    assert "NEW\n\n![table1](table1.png)\n\n<!-- /table1 -->\nmore" in filled
    assert (docs / "table1.png").exists()
    assert missing == ["lstm/table6"]
    assert "kept" in filled
    described = filled.replace("![table1]", "![what it shows]")
    for page in (filled, described):
        assert fill(page, tmp_path, docs)[0] == page


def test_aligned_is_markdown() -> None:
    assert aligned([["", "x"], ["a", "1.0"]]) == "|     |   x |\n| --- | --: |\n| a   | 1.0 |"


# --- The commands -----------------------------------------------------------------------------------------------------


def sums(folder: Path, number: int) -> dict[str, list[float]]:
    """What every cell counted."""
    content = json.loads((folder / f"table{number}.json").read_text())
    return {f"{cell['row']}, {cell['column']}": cell["sums"] for cell in content["cells"]}


def ranks_run(number: int, arguments: list[str], folder: Path, ranks: int) -> subprocess.CompletedProcess[str]:
    """A command as a user runs it; with ranks through torchrun."""
    runner = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--"] if ranks > 1 else []
    line = [sys.executable, *runner, ROOT / "benchmarks" / "tables" / f"table{number}.py", *arguments, "--out", folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    return done


IMAGES = [*FASHION, "--limit", "138", "--batch-size", "32", "--calibration", "160"]
IMAGES += ["--bits", "4", "--r", "0.05", "--clip", "none", "mse"]
WORDS = ["--dataset", "bible", "--limit", "3000", "--batch-size", "3", "--bits", "5", "--r", "0.05", "--clip", "mse"]


@pytest.mark.parametrize(("number", "arguments"), [(2, IMAGES), (6, WORDS)])
def test_two_ranks_count_what_one_process_counts(number: int, arguments: list[str], tmp_path: Path) -> None:
    """Batches of 32, 32, 32, 32 and 10 images, statistics of inputs from both ranks; 3, 3, 3 and 1 streams of text."""
    ranks_run(number, arguments, tmp_path / "one", 1)
    done = ranks_run(number, arguments, tmp_path / "two", 2)
    assert done.stdout.count(f"Table {number}.") == 1  # rank 0 alone prints
    one, two = sums(tmp_path / "one", number), sums(tmp_path / "two", number)
    assert one.keys() == two.keys()
    for name, theirs in two.items():  # float64 sums of losses come in another order
        assert theirs == (one[name] if number == 2 else pytest.approx(one[name], rel=1e-12))
    if number == 2:
        assert {count for count, _ in one.values()} == {138}
        again = ranks_run(number, arguments, tmp_path / "two", 2)
        assert "cells were on disk" in again.stderr


ONE_FAILS = """
import os, sys
import command, table2
weights = "nowhere" if os.environ["RANK"] == "1" else {good!r}
command.main(table2.TABLE, ["--models", "ResNet-20", "resnet20", "--weights", weights, {good!r}, *{arguments}])
"""


def test_a_model_that_one_rank_cannot_open_is_left_out_by_all(tmp_path: Path) -> None:
    """Else rank 0 would add the first model's counts to rank 1's of the second."""
    good = str(ROOT / "assets" / "fashion-mnist" / "resnet20.safetensors")
    arguments = [*FASHION, "--limit", "8", "--bits", "4", "--r", "0.05", "--clip", "none", "--batch-size", "4"]
    script = tmp_path / "run.py"
    script.write_text(ONE_FAILS.format(good=good, arguments=[*arguments, "--out", str(tmp_path / "out")]))
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "benchmarks" / "tables")}
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode != 0
    assert "table2: ResNet-20: rank 1: nowhere: not readable as weights" in done.stderr
    assert [count for count, _ in sums(tmp_path / "out", 2).values()] == [8] * 4  # float, clip none, best, OCS


def test_command_writes_all_forms_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*FASHION, "--limit", "60", "--bits", "5", "4", "--r", "0.05", "--out", str(tmp_path)]
    command.main(table1.TABLE, arguments)
    first = capsys.readouterr()
    assert "| 4 bits |" in first.out
    assert "% outside forward passes" in first.err
    assert {path.name for path in tmp_path.iterdir()} == {
        "cells",
        *(f"table1.{x}" for x in ("md", "csv", "json", "png")),
    }
    content = json.loads((tmp_path / "table1.json").read_text())
    assert content["command"].startswith("python benchmarks/tables/table1.py --dataset fashion-mnist --limit 60")
    assert content["settings"]["limit"] == 60
    assert {"torch", "numpy", "ocs", "cpu", "date"} <= content["machine"].keys()
    command.main(table1.TABLE, [*arguments, "--json"])
    again = capsys.readouterr()
    assert "all 7 cells were on disk" in again.err
    assert json.loads(again.out)["cells"] == content["cells"]


def test_a_failing_setting_is_reported_and_the_rest_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = ocs.quantize

    def out_of_luck(model: object, **options: object) -> object:
        if options.get("clip") == "mse":
            raise RuntimeError("out of luck")
        return quantize(model, **options)

    monkeypatch.setattr(ocs, "quantize", out_of_luck)
    arguments = [*FASHION, "--limit", "20", "--bits", "5", "--r", "0.05", "--clip", "none", "mse"]
    with pytest.raises(SystemExit, match="table2: 1 cells failed"):  # OCS + best clip is not tried, no clip being left
        command.main(table2.TABLE, [*arguments, "--out", str(tmp_path)])
    assert "FAILED: ResNet-20, 5 bits, clip mse: RuntimeError: out of luck" in capsys.readouterr().err
    found = sums(tmp_path, 2)
    assert found["5 bits, OCS 0.05"][0] == 20
    assert found["5 bits, clip mse"] is found["5 bits, OCS 0.05 + best clip"] is None
    assert "failed" in (tmp_path / "table2.md").read_text()


def test_a_failing_model_does_not_lose_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--models", "ResNet-51", "resnet18", "--r", "0.01", "--size", "64", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="table5: ResNet-51: no network 'ResNet-51'"):
        command.main(table5.TABLE, arguments)
    done = capsys.readouterr()
    assert "**resnet18**" in done.out


@pytest.mark.parametrize(
    ("table", "arguments", "message"),
    [
        (table2, [], "--data is missing"),
        (table1, ["--data", "/nowhere"], "--weights FILE"),
        (table2, ["--data", "/nowhere", "--weights", "random", "--models", "ResNet-50"], "/nowhere: no such folder"),
        (table6, [], "--weights, a file of examples/train_language_model.py"),
        (table6, ["--dataset", "bible", "--data", "/nowhere"], "the test split should be here"),
        (table6, ["--dataset", "bible", "--weights", str(ROOT / "README.md")], "train_language_model.py expected"),
        (table6, ["--dataset", "bible", "--models", "GPT-9"], "only LSTM and decoder; give its --weights"),
        (table6, ["--dataset", "bible", "--limit", "15"], "15 words cannot be read in 10 streams"),
        (table2, [*FASHION, "--models", "ResNet-21"], "ResNet-21"),
        (table2, [*FASHION, "--weights", "a", "b"], "2 for 1 models"),
        (table3, [*FASHION, "--limit", "0"], "--limit 0"),
        (table2, ["--bits", "9"], "--bits=9"),
        (table2, ["--r", "1.5"], "--r=1.5"),
        (table2, ["--clip", "best-of-luck"], "--clip='best-of-luck'"),
        (
            table3,
            [*FASHION, "--calibration", "600"],
            "600 training images are asked for (--calibration), there are 512",
        ),
        (table4, [*FASHION, "--batch-size", "12", "--batches", "8"], "--batches 8: give numbers that divide"),
        (table1, [*FASHION, "--mean", "0.1"], "leave out --mean and --std"),
        (table1, ["--dataset", "cifar10", "--data", "x", "--weights", "random", "--std", "0", "1", "1"], "--std"),
        (table1, [*FASHION, "--device", "tpu"], "--device"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    table: ModuleType, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        command.main(table.TABLE, [*arguments, "--out", str(tmp_path)])
    assert message in f"{exit_.value} {capsys.readouterr().err}"
    assert [path.name for path in tmp_path.rglob("*")] in ([], ["cells"])


# --- What the tables must show ----------------------------------------------------------------------------------------


def test_table_5_is_the_papers(tmp_path: Path) -> None:
    command.main(table5.TABLE, ["--out", str(tmp_path)])
    cells = json.loads((tmp_path / "table5.json").read_text())["cells"]
    differences = {
        row: [cell["difference"] for cell in cells if cell["row"] == row] for row in ("weights", "activations")
    }
    assert len(differences["weights"]) == len(differences["activations"]) == 4
    assert max(map(abs, differences["weights"])) < 0.01
    assert max(map(abs, differences["activations"])) < 0.01
