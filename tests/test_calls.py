"""Calls that mean something else than they say: the error says what was meant, and nothing is changed."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SmallNet, assert_unchanged, state
from torch import nn

import ocs
from ocs import functional, plot

x = torch.randn(2, 3, 8, 8)

CALLS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "bits by position": (lambda net: ocs.quantize(net, 4), r"options by name: ocs\.quantize\(model, wbits=4\)$"),
    "data by position": (lambda net: ocs.quantize(net, [x]), r"options by name: ocs\.quantize\(model, wbits=\.\.\."),
    "bits": (lambda net: ocs.quantize(net, bits=4), "no option 'bits': the nearest is wbits: bits of the weights"),
    "w_bits": (lambda net: ocs.quantize(net, w_bits=4), "no option 'w_bits': the nearest is wbits"),
    "act_bits": (lambda net: ocs.quantize(net, act_bits=4), "no option 'act_bits': the nearest is abits: bits of"),
    "group_size": (
        lambda net: ocs.quantize(net, group_size=128),
        "nearest is group: input channels that share a scale",
    ),
    "data": (lambda net: ocs.quantize(net, data=[x]), "no option 'data': the nearest is calibration"),
    "smoothquant": (lambda net: ocs.quantize(net, smoothquant=True), "'smoothquant': the nearest is equalize: move"),
    "a typing error": (lambda net: ocs.quantize(net, roundng="gptq"), "no option 'roundng': the nearest is rounding"),
    "anything": (lambda net: ocs.quantize(net, zzz=1), "no option 'zzz': use wbits, r, clip, "),
    "no model": (lambda net: ocs.quantize(), "missing 1 required positional argument: 'model'"),
    "load": (lambda net: ocs.load(net, "m"), r"the arguments are in another order: ocs\.load\(path, model\)$"),
    "save": (lambda net: ocs.save("m", net), r"in another order: ocs\.save\(model, path\)$"),
    "calibrate": (lambda net: ocs.calibrate([x], net), r"in another order: ocs\.calibrate\(model, data\)$"),
    "synthesize": (lambda net: ocs.synthesize((3, 8, 8), net), r"order: ocs\.synthesize\(model, shape\)$"),
    "norms": (lambda net: ocs.reestimate_batchnorm([x], net), r"order: ocs\.reestimate_batchnorm\(model, data\)$"),
    "no module at all": (lambda net: ocs.calibrate([x], [x]), r"model must be an nn\.Module, not list$"),
    "a layer to draw": (lambda net: plot.weight_histograms(net.head, 4, 0.1), r"not Linear: give its weight, layer\.w"),
    "a layer to clip": (lambda net: plot.clip_thresholds(net.head, 4), r"not Linear: give its weight, layer\.weight"),
    "a layer's inputs": (lambda net: plot.input_histograms(net.head, 4), "must be those of one layer, .* not Linear"),
    "a layer's weight": (lambda net: functional.quantize_weight(net.head, 4), "not Linear: give its weight"),
}


@pytest.mark.parametrize("case", CALLS)
def test_what_was_meant(net: SmallNet, case: str) -> None:
    call, message = CALLS[case]
    before = state(net)
    with pytest.raises(TypeError, match=message):
        call(net)
    assert_unchanged(net, before)


def test_the_signature_stays() -> None:
    assert list(inspect.signature(ocs.quantize).parameters)[:3] == ["model", "wbits", "r"]
    assert ocs.quantize.__doc__.startswith("Quantize a model in place")
    assert (ocs.quantize.__name__, ocs.quantize.__module__) == ("quantize", "ocs.quantization")


@pytest.mark.parametrize(
    ("model", "shape", "meant"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (4, 3, 16, 16), r"\(3, 16, 16\)"),
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (4, 3, 16), r"\(3, 16\)"),
    ],
)
def test_the_shape_of_a_batch(model: nn.Module, shape: tuple[int, ...], meant: str) -> None:
    with pytest.raises(ValueError, match=rf"is that of a batch: give that of one input, {meant}$"):
        ocs.synthesize(model, shape, images=2, steps=1)


def test_a_checkout_that_is_not_built(tmp_path: Path) -> None:
    package = Path(ocs.__file__).parent
    shutil.copytree(package, tmp_path / "ocs", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    finders = "sys.meta_path = [each for each in sys.meta_path if 'editable' not in repr(each)]"  # of other checkouts
    command = [sys.executable, "-c", f"import sys; {finders}; import ocs"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: the kernels of ocs are not built in ")
    assert "run `pip install -e .` in the folder above it" in last
