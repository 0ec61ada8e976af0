"""What the benchmarks share: timing in turns, a table of ratios, and JSON beside it."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ocs.kernels import ops

OUT = Path(__file__).resolve().parent.parent / "build" / "benchmarks"


@dataclass(frozen=True)
class Row:
    """One comparison: ours against a rival or a copy, and what the ratio should be."""

    what: str
    against: str
    ours_ms: float
    theirs_ms: float
    ratio: float  # theirs / ours where faster is asked for, ours / theirs where a limit is set
    target: str
    reached: bool


def in_turns(calls: dict[str, Callable[[], object]], rounds: int, title: str = "") -> dict[str, list[float]]:
    """Milliseconds of each call in each round; a round runs all of them in turn, and the first is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in tqdm(range(rounds + 1), title, leave=False, delay=2, disable=None):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            end = time.perf_counter()
            if i:
                times[name].append(1e3 * (end - begin))
    return times


def at_most(what: str, times: dict[str, list[float]], ours: str, theirs: str, limit: float) -> Row:
    """ours / theirs, the median over rounds of the ratio within a round."""
    ratio = _median_ratio(times[ours], times[theirs])
    return Row(what, theirs, *_medians(times, ours, theirs), ratio, f"<= {limit:g}x", ratio <= limit)


def faster(what: str, times: dict[str, list[float]], ours: str, theirs: str, factor: float) -> Row:
    """theirs / ours, likewise."""
    ratio = _median_ratio(times[theirs], times[ours])
    return Row(what, theirs, *_medians(times, ours, theirs), ratio, f">= {factor:g}x faster", ratio >= factor)


def _median_ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _medians(times: dict[str, list[float]], *names: str) -> list[float]:
    return [statistics.median(times[name]) for name in names]


def bytes_held(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = re.search(r"model name\s*: (.*)", _read("/proc/cpuinfo"))
    compiler = subprocess.run(["cc", "--version"], capture_output=True, text=True, check=False).stdout
    return {
        "cpu": cpu.group(1) if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": ops.isa(),
        "compiler": compiler.splitlines()[0] if compiler else "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def publish(name: str, rows: list[Row], notes: dict[str, Any] | None = None) -> None:
    """Print the table, or JSON where --json was asked for, and keep the JSON in build/benchmarks."""
    content = {"machine": machine(), "rows": [asdict(row) for row in rows], "notes": notes or {}}
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name}.json").write_text(json.dumps(content, indent=1))
    if "--json" in sys.argv:
        print(json.dumps(content, indent=1))
        return
    print(", ".join(f"{key} {value}" for key, value in content["machine"].items()))
    print(f"\n{'ours':<44}{'ms':>9}   {'against':<42}{'ms':>11}{'ratio':>11}   target")
    for row in rows:
        verdict = "" if row.reached else "  NOT REACHED"
        print(f"{row.what:<44}{row.ours_ms:>9.3f}   {row.against:<42}{row.theirs_ms:>11.3f}{row.ratio:>10.2f}x   "
              f"{row.target}{verdict}")  # fmt: skip
    for key, value in (notes or {}).items():
        print(f"{key}: {value}")
