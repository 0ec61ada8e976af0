"""Cells of a table: what each asks for, finished ones on disk, and all of them measured one after the other.

A cell is one setting of ocs.quantize on one float model. Its result is a file named by everything that decides it: the
package, the weights, the data set with its place and size, the setting. So a run that was stopped goes on where it was,
and tables share what they have in common; where the files of a data set were exchanged, use --fresh.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from data import DataError
from ranks import Ranks
from tasks import Advance, Task
from tqdm import tqdm

import ocs

Result = dict[str, Any]
T = TypeVar("T")
PARTS = ("loading", "calibration", "planning", "data", "forward")


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
    axes: Mapping[str, float] = field(default_factory=dict)  # for the picture: where it stands, by bits, r, batch size
    curve: str = ""  # and on which curve; "": it is not drawn

    @property
    def is_picked(self) -> bool:
        """Nothing is measured for it."""
        return bool(self.best_of) and self.options is None

    def clipped_as_released(self) -> Cell:
        """The same cell by the methods of the paper's release, which looks at weights before splitting."""
        names = {option: f"{self.options[option]}-release" for option in ("clip", "act_clip")
                 if (self.options or {}).get(option) in ("mse", "aciq", "kl")}  # fmt: skip
        return replace(self, options={**self.options, **names}) if names else self


FLOAT = Cell("float", "float")


class ModelError(RuntimeError):
    """A model's cells cannot be measured; the same on all ranks."""


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
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(result, indent=1))
        partial.replace(path)


def _package_digest() -> str:
    """Changes with every file of the package, and with torch."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(path for path in Path(ocs.__file__).parent.rglob("*") if path.suffix in (".py", ".so")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass
class Run:
    """What the cells of all models share: where finished ones are, the ranks, and the time that was spent."""

    store: Store
    ranks: Ranks
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    begin: float = field(default_factory=time.perf_counter)
    measured: int = 0
    failed: int = 0

    def open(self, what: Callable[[], Task]) -> Task:
        """A model and its data; where that fails on one rank, all raise ModelError."""
        return self._together("loading", what)

    def _together(self, part: str, what: Callable[[], T]) -> T:
        begin, found, error = time.perf_counter(), None, None
        try:
            found = what()
        except DataError:
            raise  # the end of this process, and so of all
        except Exception as failure:  # noqa: BLE001 - other ranks must hear of it, or they would wait for this one
            error = str(failure) or type(failure).__name__
        self.spent[part] += time.perf_counter() - begin
        if error := self.ranks.any(error):
            raise ModelError(error)
        return found

    def measure(self, task: Task, cells: Iterable[Cell]) -> dict[tuple[str, str], Result]:
        """The result of every cell by row and column, {"error": text} where one failed; the float model's first."""
        cells = [FLOAT, *cells]
        results: dict[tuple[str, str], Result] = {}
        work = task.count * sum(not cell.is_picked for cell in cells)
        hidden = self.ranks.rank > 0 or not sys.stderr.isatty()
        with tqdm(total=work, unit=task.unit, unit_scale=True, disable=hidden, mininterval=1, leave=False) as bar:
            for cell in cells:
                bar.set_description(title := f"{task.name}, {cell.row}, {cell.column}")
                planned = bar.n + (0 if cell.is_picked else task.count)
                results[cell.row, cell.column] = self._one(task, cell, results, title, bar.update)
                bar.total -= max(planned - bar.n, 0)  # it was on disk, or failed
        return results

    def _one(
        self, task: Task, cell: Cell, results: dict[tuple[str, str], Result], title: str, advance: Advance
    ) -> Result:
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
            found = self._new(task, options, title, advance)
            if self.ranks.rank == 0 and "error" not in found:
                self.store.put(path, found)
        return found

    def _new(self, task: Task, options: Mapping[str, Any] | None, title: str, advance: Advance) -> Result:
        """Measure; whatever goes wrong is this cell's result, and the other cells go on."""
        self._together("calibration", lambda: task.prepare(options))
        try:
            mine, error = task.measure(options, advance), None
        except DataError:
            raise  # the same for every cell
        except Exception as failure:  # noqa: BLE001 - it is reported in its place
            mine, error = None, f"{type(failure).__name__}: {failure}"
        if error := self.ranks.any(error):
            return self._failure(options, title, error)
        sums, details, seconds = mine
        for part, value in seconds.items():
            self.spent[part] += value
        value, low, high = task.metric.estimate(sums := self.ranks.sum(sums).tolist())
        if not math.isfinite(value):
            return self._failure(options, title, f"{task.metric.name} is {value}")
        self.measured += 1
        result = {"options": dict(options or {}), "value": value, "low": low, "high": high, "sums": sums}
        return result | details | {"seconds": {part: round(value, 3) for part, value in seconds.items()}}

    def _failure(self, options: Mapping[str, Any] | None, title: str, error: str) -> Result:
        self.failed += 1
        if self.ranks.rank == 0:
            say(f"FAILED: {title}: {error}")
        return {"options": dict(options or {}), "error": error}

    def summary(self) -> str:
        """One line: what was measured, and which share of the time did not go into forward passes and data."""
        if not self.measured and not self.failed:
            return f"all {self.store.reused} cells were on disk"
        spent, total = self.spent, time.perf_counter() - self.begin
        others = {"were on disk": self.store.reused, "failed": self.failed}
        counted = "".join(f", {count} {what}" for what, count in others.items() if count)
        text = f"{self.measured} cells in {total:.0f} s{counted}"
        if not spent["forward"]:
            return text
        outside = total - spent["forward"] - spent["data"] - spent["loading"] - spent["calibration"]
        return (
            f"{text}; {100 * outside / total:.1f} % outside forward passes and data loading (planning "
            f"{100 * spent['planning'] / total:.1f} %), calibration {100 * spent['calibration'] / total:.1f} %"
        )


def say(text: str) -> None:
    """To standard error: about the run, not its result."""
    tqdm.write(text, file=sys.stderr)
