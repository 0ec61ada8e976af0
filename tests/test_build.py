"""The one shared object: what it needs from torch and Python, and the wheel that holds it."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from ocs import _C

ROOT = Path(__file__).resolve().parent.parent

# The C shims of libtorch that the extension may use: all of them are in torch 2.10.
TORCH_2_10 = {
    "aoti_torch_abi_version", "aoti_torch_delete_library_object", "aoti_torch_delete_tensor_object",
    "aoti_torch_empty_strided", "aoti_torch_get_dim", "aoti_torch_get_dtype", "aoti_torch_get_numel",
    "aoti_torch_get_size", "aoti_torch_get_sizes", "aoti_torch_get_stride", "aoti_torch_get_strides",
    "aoti_torch_is_contiguous", "aoti_torch_library_def", "aoti_torch_library_init_def",
    "aoti_torch_library_init_impl", "aoti_torch_new_tensor_handle", "torch_call_dispatcher", "torch_delete_list",
    "torch_get_const_data_ptr", "torch_get_mutable_data_ptr", "torch_library_impl", "torch_list_push_back",
    "torch_new_list_reserve_size", "torch_parallel_for",
}  # fmt: skip
ENUMS = re.compile(r"aoti_torch_(device_type|dtype|layout|memory_format)_\w+")  # one function for each constant
NEWER = {"aoti_torch_dtype_float8_e8m0fnu", "aoti_torch_dtype_float4_e2m1fn_x2"}

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")


def undefined_symbols() -> set[str]:
    listing = subprocess.run(["nm", "-D", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True)
    return {line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()}


@needs_nm
def test_only_c_shims_of_torch_2_10() -> None:
    symbols = undefined_symbols()
    of_torch = {name for name in symbols if name.startswith(("aoti_", "torch_"))}
    assert of_torch >= {"torch_parallel_for", "torch_library_impl"}
    assert {name for name in of_torch if not ENUMS.fullmatch(name)} <= TORCH_2_10
    assert not of_torch & NEWER
    mangled = [name for name in symbols if name.startswith("_Z") and re.search(r"2at|3c10|5torch|6caffe2", name)]
    assert mangled == []


@needs_nm
def test_only_the_limited_python_api() -> None:
    private = {name for name in undefined_symbols() if name.startswith("_Py")}
    stable = {"_PyArg_ParseTuple_SizeT", "_Py_BuildValue_SizeT", "_Py_Dealloc", "_Py_NoneStruct", "_Py_RefTotal"}
    assert private <= stable
    assert Path(_C.__file__).name == "_C.abi3.so"


@needs_nm
@pytest.mark.skipif(platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc", reason="of glibc on x86-64")
def test_runs_where_torch_does() -> None:
    """Below the versions that manylinux_2_28 allows, the tag of torch's own wheels."""
    listing = subprocess.run(["nm", "-D", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True)
    needed = re.findall(r"@(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", listing.stdout)
    most = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
    assert {name for name, _ in needed} == set(most)
    assert [(name, version) for name, version in needed if tuple(map(int, version.split("."))) > most[name]] == []


ANOTHER_SET = """
#include "kernels.h"
static bool yes(void) { return true; }
static float abs_max(const float *x, int64_t N) { return x[0] + (float)N; }
const ocs_instruction_set ocs_isa_another = {.name = "another", .supported = yes, .kernels = {.abs_max = abs_max}};
static bool no(void) { return false; }
const ocs_instruction_set ocs_isa_lacking = {.name = "lacking", .supported = no};
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_an_instruction_set_is_a_file_and_a_name_and_lacks_what_the_one_before_it_has(tmp_path: Path) -> None:
    """Without Python and torch: the C files alone are a library."""
    (tmp_path / "another.c").write_text(ANOTHER_SET)
    library = tmp_path / "libocs.so"
    files = [*(ROOT / "csrc").glob("*.c"), tmp_path / "another.c"]
    sets = "-DOCS_INSTRUCTION_SETS(SET)=SET(ref) SET(another) SET(lacking)"
    command = ["cc", "-std=c11", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", sets, "-o", library, *files, "-lm"]
    subprocess.run(command, check=True)
    c = ctypes.CDLL(str(library))
    c.ocs_abs_max_f32.restype, c.ocs_isa_name.restype, c.ocs_isa.restype = (
        ctypes.c_float,
        ctypes.c_char_p,
        ctypes.c_char_p,
    )
    assert [c.ocs_isa_name(i) for i in range(3)] == [b"ref", b"another", None]
    assert c.ocs_isa() == b"another"
    x, counts = (ctypes.c_float * 3)(1, -7, 2), (ctypes.c_int64 * 2)()
    assert c.ocs_abs_max_f32(x, ctypes.c_int64(3)) == 4.0
    assert c.ocs_histogram_f32(counts, x, ctypes.c_int64(3), ctypes.c_int64(2), ctypes.c_float(4)) == 0
    assert list(counts) == [1, 2]
    assert c.ocs_set_isa(b"lacking") != 0
    assert c.ocs_set_isa(b"ref") == 0
    assert c.ocs_abs_max_f32(x, ctypes.c_int64(3)) == 7.0


def repository() -> list[str]:
    """What belongs to the repository, without what is built or cached: in an unpacked source archive all there is."""
    if (ROOT / ".git").exists():
        listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
        return [name for name in listing.stdout.splitlines() if (ROOT / name).exists()]
    made = re.compile(r"\.so$|\.pyc$|\.egg-info/|^(build|dist|\.venv|\.\w+_cache|\.hypothesis)/")
    names = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()]
    return [name for name in names if not made.search(name) and name not in ("PKG-INFO", "setup.cfg")]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("sdist")
    for name in repository():
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).symlink_to(ROOT / name)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", out], cwd=sources, check=True)
    (built,) = out.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", out, sdist]
    subprocess.run(command, check=True, env={**os.environ, "OCS_WERROR": "1"})
    (built,) = out.glob("*.whl")
    return built


def test_the_source_archive_has_the_whole_repository(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        top, *_ = archive.getnames()
        files = {member.name.removeprefix(f"{top}/") for member in archive if not member.isdir()}
    made = {name for name in files if name.startswith("torch_ocs.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert files - made == set(repository())


def test_wheel_serves_every_python(wheel: Path) -> None:
    name, version, *tags = wheel.stem.split("-")
    assert (name, version) == ("torch_ocs", __import__("ocs").__version__)
    assert tags[:2] == ["cp311", "abi3"]
    files = [name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("torch_ocs-")]
    assert "ocs/py.typed" in files
    assert sorted(files) == sorted([*(name for name in repository() if name.startswith("ocs/")), "ocs/_C.abi3.so"])


def test_the_binary_says_nothing_of_where_it_was_built(wheel: Path) -> None:
    binary = zipfile.ZipFile(wheel).read("ocs/_C.abi3.so")
    assert b"torch/include/torch/csrc/stable/" in binary  # what torch's errors say, below its folder
    assert re.findall(rb"(?<![\w/])(?:/[\w.+-]{3,}){2,}/[\w.+-]*", binary) == []


def test_the_version_is_the_newest_in_the_changelog() -> None:
    (newest, *_) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest == __import__("ocs").__version__


def test_wheel_quantizes_outside_of_the_repository(wheel: Path, tmp_path: Path) -> None:
    """The demo's quantize step, from the installed wheel alone."""
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel], check=True)
    shutil.copy(ROOT / "examples" / "fashion_mnist.py", tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(site)!r})
from pathlib import Path
import ocs
from fashion_mnist import load_model
assert ocs.__file__.startswith({str(site)!r}), ocs.__file__
report = ocs.quantize(load_model(Path({str(ROOT)!r}) / "assets/fashion-mnist/resnet20.safetensors"), wbits=5, r=0.02)
print(report)
assert "<style>.ocs-report" in report.to_html()
"""
    done = subprocess.run([sys.executable, "-P", "-c", "import sys; sys.path.insert(0, '.')" + code], cwd=tmp_path,
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert "19 layers quantized, 1 left float" in done.stdout
