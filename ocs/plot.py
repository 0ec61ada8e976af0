"""Pictures of what splitting and clipping do; needs matplotlib (the extra `plot`)."""

from ocs.report.plot import clip_thresholds, input_histograms, layer_agreement, weight_histograms

__all__ = ["clip_thresholds", "input_histograms", "layer_agreement", "weight_histograms"]
