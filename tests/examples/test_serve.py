"""The example that serves the bundled network without Python."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MAKE = Path(__file__).resolve().parents[2] / "examples" / "serve" / "make.py"


def test_cpp_and_onnxruntime_serve_the_bundled_network(tmp_path: Path) -> None:
    """91 of the first 100 test images are right in both, as in the simulated model."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    command = [sys.executable, "-W", "ignore", str(MAKE), "--out", str(tmp_path)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    right = [int(line.split()[-5]) for line in found[-2:]]
    assert [line.split(":")[0] for line in found[-2:]] == ["C++", "ONNX Runtime"]
    assert right[0] == pytest.approx(91, abs=2)
    assert right[1] == pytest.approx(91, abs=2)
