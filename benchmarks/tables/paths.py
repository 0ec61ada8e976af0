"""Importing this first lets the tables import what lies in benchmarks/ and examples/, from whatever folder they run."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "tables"  # what the commands write
sys.path += [str(ROOT / folder) for folder in ("benchmarks", "examples")]


def shown(path: Path) -> str:
    """The path as a reader in this folder would type it."""
    return os.path.relpath(path)
