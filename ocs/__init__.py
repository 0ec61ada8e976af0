"""Post-training quantization of PyTorch models by outlier channel splitting (Zhao et al., ICML 2019)."""

from ocs import functional, nn
from ocs.calibrate import Calibration, calibrate
from ocs.quantize import FIRST_LAYER, quantize
from ocs.reestimate import reestimate_batchnorm, synthesize
from ocs.report import LayerReport, Report
from ocs.storage import load, save

__version__ = "0.1.0"
__all__ = [
    "FIRST_LAYER",
    "Calibration",
    "LayerReport",
    "Report",
    "calibrate",
    "functional",
    "load",
    "nn",
    "quantize",
    "reestimate_batchnorm",
    "save",
    "synthesize",
]
