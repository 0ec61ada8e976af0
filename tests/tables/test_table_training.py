"""The study of splits in training: its runs, sizes and table."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import training
from fashion_mnist import ASSETS

pytestmark = pytest.mark.usefixtures("one_thread")
SETTING = {"network": "ResNet-20", "seed": 0, "bits": 2, "epochs": 0.5, "granularity": "tensor"}


def test_a_run_trains_and_says_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("images-idx3", "labels-idx1"):
        shutil.copy(ASSETS / f"calibration-{kind}-ubyte.gz", tmp_path / f"train-{kind}-ubyte.gz")
    whole = training.load
    monkeypatch.setattr(training, "load", lambda split: tuple(part[:100] for part in whole(split)))
    run = training.measure({**SETTING, "column": "r = 0.05"}, tmp_path)
    assert 0 < run["value"] <= 100
    assert 0 < run["loss"] < 3
    assert run["bytes"] == 71410


def test_more_bits_take_the_bytes_of_splits() -> None:
    study = training.STUDIES["ResNet-20"]
    options = training.options_of({**SETTING, "column": "more bits"})
    names = [*options["overrides"]]
    assert names[:2] == ["layer1.0.conv1", "layer1.0.conv2"]
    assert {each["wbits"] for each in options["overrides"].values()} == {3}
    sizes = [training.ocs.quantize(study.load(), **given).packed_bytes for given in (options, {**options, "r": 0.0})]
    split = training.options_of({**SETTING, "column": "r = 0.05"})
    assert sizes[0] <= training.ocs.quantize(study.load(), **split).packed_bytes < sizes[0] + 2500


def test_the_table_compares_seed_by_seed() -> None:
    values = {("r = 0", 0): 90.0, ("r = 0", 1): 91.0, ("r = 0.05", 0): 90.5, ("r = 0.05", 1): 91.7}
    found = [
        {**SETTING, "column": column, "seed": seed, "value": value, "bytes": 7}
        for (column, seed), value in values.items()
    ]
    assert training.table(found) == [
        ["", "r = 0", "r = 0.05", "r = 0.05, gain", "bytes"],
        ["2 bits, 0.5 epochs, per tensor", "90.50 ± 6.35", "91.10 ± 7.62", "0.60 ± 1.27", "7 / 7"],
    ]
