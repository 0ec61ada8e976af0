"""Post-training quantization of PyTorch models by outlier channel splitting (Zhao et al., ICML 2019)."""

from importlib.util import find_spec

import torch  # noqa: F401 - first: ocs._C takes what it needs of libtorch from the process

if find_spec("ocs._C") is None:
    raise ImportError(
        f"the kernels of ocs are not built in {__path__[0]}: run `pip install -e .` in the folder above it"
    )

from ocs import functional, nn, plot, training
from ocs.calibration.calibrate import Calibration, calibrate
from ocs.formats.storage import load, save
from ocs.nn.own_forward import register
from ocs.plan.selectors import FIRST_LAYER
from ocs.quantization import quantize
from ocs.report.comparison import Comparison
from ocs.report.data import LayerReport, Report
from ocs.runtime.compare import compare
from ocs.runtime.compile import Compiled, compile
from ocs.runtime.export import export
from ocs.runtime.lower import lower
from ocs.runtime.pack import pack, unpack
from ocs.stream.execute import quantize_file
from ocs.tune.reestimate import reestimate_batchnorm
from ocs.tune.synthesize import synthesize

__version__ = "0.1.0"
__all__ = [
    "FIRST_LAYER", "Calibration", "Comparison", "Compiled", "LayerReport", "Report", "calibrate", "compare", "compile",
    "export", "functional", "load", "lower", "nn", "pack", "plot", "quantize", "quantize_file", "reestimate_batchnorm",
    "register", "save", "synthesize", "training", "unpack",
]  # fmt: skip
