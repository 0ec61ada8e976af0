"""The notebooks: each runs from top to bottom, and is stored as a run left it, small enough for git."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import matplotlib.font_manager  # noqa: F401 -- writes the font cache, else a kernel's output tells that it does
import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))
MOST_BYTES = 250_000
SECONDS = 600  # for a cell, or for a kernel to start, on a machine that has other things to do


@pytest.fixture
def kernel() -> Iterator[AsyncKernelManager]:
    """A Python kernel of this interpreter, whatever kernels are installed, behind sockets in a folder of its own."""
    native = KernelSpecManager(kernel_dirs=[])  # without kernelspecs "python3" is ipykernel under sys.executable
    with tempfile.TemporaryDirectory(prefix="nb") as folder:  # a socket's path is short, pytest's tmp_path may not be
        yield AsyncKernelManager(kernel_spec_manager=native, transport="ipc", ip=str(Path(folder, "socket")))


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """All but the prose."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def check_outputs(notebook: nbformat.NotebookNode) -> None:
    """A picture or more, and neither errors nor warnings."""
    shown = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert [output for output in shown if output.output_type == "error"] == []
    assert [output.text for output in shown if output.get("name") == "stderr"] == []


def test_there_are_six() -> None:
    assert [name[0] for name in NAMES] == ["1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize("name", NAMES)
def test_runs(name: str, kernel: AsyncKernelManager, tmp_path: Path) -> None:
    notebook = nbformat.read(FOLDER / name, nbformat.current_nbformat)
    for cell in code_cells(notebook):
        cell.outputs = []
    folder = {"metadata": {"path": str(FOLDER)}}
    options = {"timeout": SECONDS, "startup_timeout": SECONDS, "record_timing": False, "coalesce_streams": True}
    client = NotebookClient(notebook, km=kernel, resources=folder, **options)
    # Threads that spin while they wait make it many times slower on a machine that has other things to do
    settings = {"IPYTHONDIR": str(tmp_path), "OMP_WAIT_POLICY": "PASSIVE"}
    client.execute(cleanup_kc=True, env=os.environ | settings)
    check_outputs(notebook)
    if os.environ.get("OCS_STORE") == "1":
        nbformat.write(notebook, FOLDER / name)


@pytest.mark.parametrize("name", NAMES)
def test_is_stored_as_a_run_left_it(name: str) -> None:
    notebook = nbformat.read(FOLDER / name, nbformat.current_nbformat)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert notebook.metadata.kernelspec.name == "python3"
    check_outputs(notebook)


@pytest.mark.parametrize("name", NAMES)
def test_is_small_and_names_no_machine(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert len(text) < MOST_BYTES
    for path in (str(FOLDER.parent), str(Path.home()) + "/", tempfile.gettempdir() + "/"):
        assert path not in text
