"""Builds ocs._C: the C kernels and both bindings in one shared object for every CPython >= 3.11 and torch >= 2.10.

OCS_WERROR=1 turns compiler warnings into errors, as CI does. Everything else about the package is in pyproject.toml.
"""

import os
from pathlib import Path

import numpy
import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TORCH = Path(torch.__file__).parent
WARNINGS = ["-Wall", "-Wextra", *(["-Werror"] if os.environ.get("OCS_WERROR") else [])]
COMMON = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", *WARNINGS]
C_FLAGS = [*COMMON, "-std=c11", "-falign-loops=32"]  # else what stands before a loop decides up to 30 % of its time
CXX_FLAGS = [*COMMON, "-std=c++17", "-fvisibility-inlines-hidden"]  # C++20's string streams are GCC 11's
SYSTEM_INCLUDES = [numpy.get_include(), str(TORCH / "include")]
PLACES = [f"-ffile-prefix-map={TORCH.parent}/=", f"-ffile-prefix-map={Path.cwd()}/="]  # not in what errors say


class BuildExt(build_ext):
    """Gives each language its own flags, which setuptools has no setting for."""

    def build_extension(self, ext: Extension) -> None:
        """Compile with C_FLAGS or CXX_FLAGS, by the file's ending."""
        compile_one = self.compiler._compile

        def compile_in_its_language(obj: str, src: str, ext: str, cc: list, extra: list, pp: list) -> None:
            flags = CXX_FLAGS if src.endswith(".cpp") else C_FLAGS
            compile_one(obj, src, ext, cc, [*extra, *flags], pp)

        self.compiler._compile = compile_in_its_language
        super().build_extension(ext)


extension = Extension(
    "ocs._C",
    sources=sorted(str(path) for ending in ("c", "cpp") for path in Path("csrc").rglob(f"*.{ending}")),
    depends=sorted(str(path) for ending in ("h", "def") for path in Path("csrc").rglob(f"*.{ending}")),
    include_dirs=["csrc"],
    extra_compile_args=[*(f"-isystem{path}" for path in SYSTEM_INCLUDES), *PLACES],
    define_macros=[("Py_LIMITED_API", "0x030b0000"), ("TORCH_TARGET_VERSION", "0x020a000000000000")],
    library_dirs=[str(TORCH / "lib")],
    libraries=["torch_cpu"],
    py_limited_api=True,
)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
