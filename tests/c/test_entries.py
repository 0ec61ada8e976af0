"""The C driver of hostile calls leaves out no entry of ocs.h."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_entry_is_called_with_hostile_arguments():
    header = (ROOT / "csrc" / "ocs.h").read_text()
    declared = set(re.findall(r"^[\w ]+\*?(ocs_\w+)\(", header, re.MULTILINE))
    called = set(re.findall(r"\b(ocs_\w+)\(", (ROOT / "tests" / "c" / "entries.c").read_text()))
    assert len(declared) > 30
    assert declared - called == set()
