"""torchvision's architectures, also where its wheel was built for another torch than the one installed."""

from __future__ import annotations

import sys
from types import ModuleType

import torch

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, Tensor dets_scale, Tensor s_scale, float iou_threshold) -> Tensor",
)
_LIBRARIES: list[torch.library.Library] = []  # a library's definitions live as long as it does


def torchvision_models() -> ModuleType:
    """torchvision.models. Under a CPU torch a wheel linked against CUDA registers no operators: schemas suffice."""
    try:
        import torchvision.models
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for schema in _OPERATORS:
            library.define(schema)
        _LIBRARIES.append(library)
        import torchvision.models
    return torchvision.models
