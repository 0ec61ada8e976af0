"""Pictures of what splitting and clipping do; needs matplotlib (the extra `plot`).

`ocs.plot(x)` draws a model, a layer, a Report or a Comparison; the functions here draw arrays and statistics.
"""

import sys
from types import ModuleType
from typing import Any

from ocs.report.overview import draw
from ocs.report.plot import clip_thresholds, input_histograms, layer_agreement, weight_histograms

__all__ = ["clip_thresholds", "input_histograms", "layer_agreement", "weight_histograms"]


class _Plot(ModuleType):
    """The module, which can be called, too."""

    def __call__(self, what: Any, **options: Any) -> Any:
        return draw(what, **options)


_Plot.__call__.__doc__ = draw.__doc__
sys.modules[__name__].__class__ = _Plot
