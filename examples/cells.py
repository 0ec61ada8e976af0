"""What the examples' tables share: settings measured once on one float model, and kept on disk.

A cell is what one setting of ocs.quantize gives: right answers, mean weight SQNR, and where the time went. Finished
cells are kept in build/, so that a second run prints them at once and an interrupted one goes on where it was.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from fashion_mnist import WEIGHTS, count_correct, load, load_model
from torch import Tensor, nn
from tqdm import tqdm

import ocs

BUILD = Path(__file__).resolve().parent.parent / "build"

Cells = dict[str, dict[str, Any]]


def fingerprint(images: int) -> str:
    """Changes with the package, the weights and the number of images, so that stale cells are never shown."""
    digest = hashlib.sha256(f"{images} {torch.__version__}".encode())
    package = sorted(path for path in Path(ocs.__file__).parent.iterdir() if path.suffix in (".py", ".so"))
    for path in (*package, WEIGHTS):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Cache:
    """Finished cells on disk, valid as long as the fingerprint is the same."""

    def __init__(self, name: str, images: int, *, fresh: bool) -> None:
        self.path = BUILD / f"{name}-{images}.json"
        self.stamp = fingerprint(images)
        self.cells: Cells = {}
        if self.path.exists() and not fresh:
            self.cells = json.loads(self.path.read_text()).get(self.stamp, {})
        if self.cells:
            say(f"{len(self.cells)} settings measured before, in {shown(self.path)}; --fresh measures again")

    def add(self, name: str, cell: dict[str, Any]) -> None:
        """Keep one more cell."""
        self.cells[name] = cell
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps({self.stamp: self.cells}, indent=1))


def measure(model: nn.Module, settings: dict[str, Any] | None, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Quantize a copy of the float model (folded: same values, no extra cost), and count the right answers.

    settings: those of ocs.quantize, besides `batch` for the images that run at once; None for the float model.
    """
    begin = time.perf_counter()
    model = copy.deepcopy(model)
    options = dict(settings or {})
    batch, sqnr = options.pop("batch", 500), None
    if settings is not None:
        sqnr = ocs.quantize(model, **options, expand=False, progress=False).mean_sqnr_db
    ready = time.perf_counter()
    correct = count_correct(model, images, labels, batch)
    end = time.perf_counter()
    return {"correct": correct, "sqnr": sqnr, "planning": ready - begin, "forward": end - ready}


def fill(cache: Cache, todo: dict[str, dict[str, Any] | None], images: Tensor, labels: Tensor) -> None:
    """Measure what is missing, from one float model that is loaded, and calibrated where need be, once."""
    missing = [name for name in todo if name not in cache.cells]
    if not missing:
        return
    model = load_model()
    count_correct(model, images[:500], labels[:500])  # the first forward pass of a process also sets the library up
    calibration = None
    if any("abits" in (todo[name] or {}) for name in missing):
        calibration = ocs.calibrate(model, load("calibration")[0].split(64))
    bar = tqdm(missing, unit="setting", mininterval=1, leave=False, disable=None)
    for name in bar:
        bar.set_description(name)
        settings = todo[name]
        if settings is not None and "abits" in settings:
            settings = settings | {"calibration": calibration}
        cache.add(name, measure(model, settings, images, labels))
    spent = {part: sum(cache.cells[name][part] for name in missing) for part in ("planning", "forward")}
    share = 100 * spent["planning"] / sum(spent.values())
    say(f"{len(missing)} settings in {sum(spent.values()):.0f} s, {share:.1f} % of it outside forward passes")


def say(text: str) -> None:
    """To standard error: about the run, not its result."""
    print(text, file=sys.stderr)


def shown(path: Path) -> str:
    """The path as a reader in this folder would type it."""
    return os.path.relpath(path)
