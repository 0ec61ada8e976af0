"""The package's own layers: a module imports from those below it, and from its own package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ocs"
LAYERS = (  # each may import from those before it, and all may import what stands on its own
    ("kernels",),
    ("weight",),
    ("nn",),
    ("model",),
    ("calibration",),
    ("plan", "tune"),
    ("report", "formats"),
    ("runtime",),
    ("quantization",),
    ("hf", "training"),
    ("stream",),
    ("cli",),
    ("__main__",),
)
ALONE = {"_C", "errors", "progress", "replace_file", "__version__"}  # these import nothing of the package
FACADES = {"__init__", "functional", "plot"}  # these import from everywhere, and nobody imports them
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports_of(path: Path) -> set[str]:
    """Names of packages and modules of ocs that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "ocs":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("ocs."):
            found.add(node.module.split(".")[1])
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_go_down(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own in FACADES:
        return
    above = {name for name in imports_of(path) - ALONE - {own} if own in ALONE or LEVEL.get(name, 99) >= LEVEL[own]}
    assert not above, f"{own} imports from {', '.join(sorted(above))}"


TRACED = [path for path in FILES if path.relative_to(PACKAGE).parts[0] in ("kernels", "weight", "nn")]


@pytest.mark.parametrize("path", TRACED, ids=[str(path.relative_to(PACKAGE)) for path in TRACED])
def test_what_dynamo_traces_asks_for_no_union(path: Path) -> None:
    """In torch 2.10 isinstance(x, A | B) is no constant; Array is such a union."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            kinds = node.args[1]
            assert not isinstance(kinds, ast.BinOp), f"line {node.lineno}: use a tuple"
            assert not (isinstance(kinds, ast.Name) and kinds.id == "Array"), f"line {node.lineno}: use ARRAYS"
