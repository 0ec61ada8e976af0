"""Cells of a table: what each asks for, finished ones on disk, and all of them measured one after the other.

A cell is one setting of ocs.quantize on one float model. Its result is a file named by everything that decides it: the
package, the weights, the data, the setting. So a run that was stopped goes on where it was, tables share what they have
in common, and nothing stale is ever shown.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from data import DataError
from ranks import Ranks
from tasks import Task
from tqdm import tqdm

import ocs

Result = dict[str, Any]
PARTS = ("planning", "data", "forward")


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    With `best_of` and no options it is the best of these cells of the same row; with options, the first of `best_of`
    that is best gives its clip method, which is how the paper combines OCS with the best clip.
    """

    row: str
    column: str
    options: Mapping[str, Any] | None = None  # of ocs.quantize, and `batch`; None: the float model
    best_of: tuple[str, ...] = ()
    paper: float | None = None
    axes: Mapping[str, float] = field(default_factory=dict)  # for the plots: where it stands, by bits, r, batch size
    curve: str = ""  # and on which curve

    @property
    def is_picked(self) -> bool:
        """Nothing is measured for it."""
        return bool(self.best_of) and self.options is None


FLOAT = Cell("float", "float")


class Store:
    """Finished cells, a file each; only rank 0 writes."""

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self.folder = folder
        self.fresh = fresh
        self.stamp = _package_digest()
        self.reused = 0

    def path(self, task: Task, options: Mapping[str, Any] | None) -> Path:
        """Where the result of this setting is kept."""
        what = json.dumps([self.stamp, task.identity, sorted((options or {"float": True}).items())])
        return self.folder / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.json"

    def get(self, path: Path) -> Result | None:
        """A finished cell, unless a fresh one is wanted; a file that was cut off counts as none."""
        if self.fresh or not path.exists():
            return None
        try:
            found = json.loads(path.read_text())
        except ValueError:
            return None
        self.reused += 1
        return found

    def put(self, path: Path, result: Result) -> None:
        """Keep one more cell, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(result, indent=1))
        partial.replace(path)


def _package_digest() -> str:
    """Changes with the package and with torch."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(path for path in Path(ocs.__file__).parent.iterdir() if path.suffix in (".py", ".so")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass
class Run:
    """What the cells of all models share: where finished ones are, the ranks, and the time that was spent."""

    store: Store
    ranks: Ranks
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*PARTS, "calibration", "all"), 0.0))
    measured: int = 0

    def measure(self, task: Task, cells: Iterable[Cell]) -> dict[tuple[str, str], Result]:
        """The result of every cell by row and column, {"error": text} where one failed; the float model's first."""
        begin = time.perf_counter()
        cells = [FLOAT, *cells]
        results: dict[tuple[str, str], Result] = {}
        work = task.count * sum(not cell.is_picked for cell in cells)
        hidden = self.ranks.rank > 0 or not sys.stderr.isatty()
        with tqdm(total=work, unit=task.unit, unit_scale=True, disable=hidden, mininterval=1, leave=False) as bar:
            for cell in cells:
                bar.set_description(f"{task.name}, {cell.row}, {cell.column}")
                planned = bar.n + (0 if cell.is_picked else task.count)
                results[cell.row, cell.column] = self._one(task, cell, results, bar)
                bar.total -= max(planned - bar.n, 0)  # it was on disk, or failed
        self.spent["all"] += time.perf_counter() - begin
        return results

    def _one(self, task: Task, cell: Cell, results: dict[tuple[str, str], Result], bar: tqdm) -> Result:
        options = cell.options
        if cell.best_of:
            rivals = [results[cell.row, name] for name in cell.best_of]
            best = task.metric.best([rival for rival in rivals if "error" not in rival])
            if best is None:
                return {"error": "every cell that this one is the best of has failed"}
            if options is None:
                return best
            options = {**options, "clip": best["options"]["clip"]}
        path = self.store.path(task, options)
        found = self.ranks.first(lambda: self.store.get(path))
        if found is None:
            found = self._new(task, options, bar)
            if self.ranks.rank == 0 and "error" not in found:
                self.store.put(path, found)
        return found

    def _new(self, task: Task, options: Mapping[str, Any] | None, bar: tqdm) -> Result:
        """Measure; whatever goes wrong is this cell's result, and the other cells go on."""
        begin = time.perf_counter()
        task.prepare(options)  # outside of try: without statistics there is no point in going on
        self.spent["calibration"] += time.perf_counter() - begin
        try:
            mine, error = task.measure(options, bar.update), None
        except DataError:
            raise  # the same for every cell
        except Exception as failure:  # noqa: BLE001 - it is reported in its place
            mine, error = None, f"{type(failure).__name__}: {failure}"
        if error := self.ranks.any(error):
            say(f"FAILED: {bar.desc or task.name}: {error}")
            return {"options": dict(options or {}), "error": error}
        sums, details, seconds = mine
        for part, value in seconds.items():
            self.spent[part] += value
        self.measured += 1
        value, low, high = task.metric.estimate(sums := self.ranks.sum(sums).tolist())
        result = {"options": dict(options or {}), "value": value, "low": low, "high": high, "sums": sums}
        return result | details | {"seconds": {part: round(value, 3) for part, value in seconds.items()}}

    def summary(self) -> str:
        """One line: what was measured, and which share of the time did not go into forward passes and data."""
        if not self.measured:
            return f"all {self.store.reused} cells were on disk"
        on_disk = f", {self.store.reused} were on disk" if self.store.reused else ""
        measured = f"{self.measured} cells in {self.spent['all']:.0f} s{on_disk}"
        if not self.spent["forward"]:
            return measured
        outside = self.spent["all"] - sum(self.spent[part] for part in ("data", "forward", "calibration"))
        shares = {"outside forward passes and data loading": outside, "planning": self.spent["planning"]}
        return f"{measured}; " + ", ".join(f"{100 * s / self.spent['all']:.1f} % {name}" for name, s in shares.items())


def say(text: str) -> None:
    """To standard error: about the run, not its result."""
    tqdm.write(text, file=sys.stderr)
