"""What ocs runs on: versions, kernels, threads, and what this CPU's 8-bit products can hold."""

import argparse
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ocs.cli.say import Notes, Result
from ocs.kernels import ops
from ocs.runtime.arithmetic import arithmetic_of

_PACKAGES = (
    "numpy", "safetensors", "tqdm", "matplotlib", "pillow", "torchvision", "timm", "transformers",
    "onnx", "onnxscript", "onnxruntime", "openvino", "argcomplete",
)  # fmt: skip
_COMPILERS = ("g++", "clang++", "c++")


def run_env(args: argparse.Namespace, notes: Notes) -> Result:
    """Describe this machine and what is installed."""
    from ocs import __version__

    arithmetic = arithmetic_of("this")
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, _COMPILERS)), None)
    values: dict[str, Any] = {
        "ocs": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "system": platform.platform(), "cpu": _cpu(), "cpus": _cpus(),
        "threads": torch.get_num_threads(), "isa": ops.isa(), "isas": list(ops.isas()),
        "torch_isa": torch.backends.cpu.get_cpu_capability(), "cuda": torch.cuda.is_available(),
        "saturates": arithmetic.saturates, "largest_exact_weight": arithmetic.limit(255), "compiler": compiler,
        "packages": {name: _version_of(name) for name in _PACKAGES},
    }  # fmt: skip
    return Result(_text(values), values)


def _text(values: dict[str, Any]) -> str:
    packages = values["packages"]
    there = ", ".join(f"{name} {number}" for name, number in packages.items() if number)
    engines = [each for each in ("onnxruntime", "openvino") if packages[each]]
    engines = (["inductor"] if values["compiler"] else []) + engines
    lines = {
        "versions": f"ocs {values['ocs']}, torch {values['torch']}, Python {values['python']}, {values['system']}",
        "CPU": f"{values['cpu']}, {values['cpus']} CPUs, {values['threads']} threads",
        "kernels": f"{values['isa']} (of {', '.join(values['isas'])}; OCS_ISA chooses); torch's: {values['torch_isa']}",
        "8-bit products": _saturation(values["largest_exact_weight"]) if values["saturates"] else "exact",
        "engines": f"{', '.join(engines) or 'none'} (of inductor, onnxruntime, openvino)",
        "packages": there,
        "not installed": ", ".join(name for name, number in packages.items() if not number) or "nothing",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def _saturation(limit: int) -> str:
    return (
        f"saturate in silence on this CPU where weights are beyond {limit}: ocs.lower, compile and export give such"
        " layers more columns; 7 bits are exact as they are"
    )


def _cpu() -> str:
    """Name the CPU as the system does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def _cpus() -> int | None:
    """Count the CPUs that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
