"""The C driver of hostile calls leaves out no entry of ocs.h, which refuses to be compiled for other processors."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


def test_every_entry_is_called_with_hostile_arguments():
    header = (ROOT / "csrc" / "ocs.h").read_text()
    declared = set(re.findall(r"^[\w ]+\*?(ocs_\w+)\(", header, re.MULTILINE))
    called = set(re.findall(r"\b(ocs_\w+)\(", (ROOT / "tests" / "c" / "entries.c").read_text()))
    assert len(declared) > 30
    assert declared - called == set()


@needs_gcc
@pytest.mark.parametrize(("name", "value", "message"), [
    ("__BYTE_ORDER__", "__ORDER_BIG_ENDIAN__", "ocs needs a little-endian processor"),
    ("UINTPTR_MAX", "4294967295U", "ocs needs a 64-bit processor"),
])  # fmt: skip
def test_other_processors_are_refused(name: str, value: str, message: str, tmp_path: Path) -> None:
    source = tmp_path / "other.c"
    command = ["gcc", "-fsyntax-only", "-w", f"-I{ROOT / 'csrc'}", str(source)]
    source.write_text('#include "ocs.h"\n')
    subprocess.run(command, check=True)
    source.write_text(f'#include <stdint.h>\n#undef {name}\n#define {name} {value}\n#include "ocs.h"\n')
    refused = subprocess.run(command, check=False, capture_output=True, text=True)
    assert refused.returncode != 0
    assert message in refused.stderr


@needs_gcc
def test_packed_bytes_are_what_their_bits_say(tmp_path: Path) -> None:
    """What `make fuzz` and `make sanitize` run for longer."""
    kernels = map(str, [*(ROOT / "csrc").glob("*.c"), *(ROOT / "csrc" / "arch").glob("*.c")])
    flags = ["-std=c11", "-O0", "-ffp-contract=off", "-fno-math-errno", f"-I{ROOT / 'csrc'}"]
    program = tmp_path / "fuzz"
    source = str(ROOT / "tests" / "c" / "fuzz.c")
    subprocess.run(["gcc", *flags, *kernels, source, "-o", str(program), "-lm"], check=True)
    done = subprocess.run([str(program), "3000"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3000 packed weights are what their bits say" in done.stdout
