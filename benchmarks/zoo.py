"""torchvision's architectures, also where its wheel was built for another torch than the one installed."""

from __future__ import annotations

from types import ModuleType

from ocs.cli.models import torchvision_module


def torchvision_models() -> ModuleType:
    """Import torchvision.models as the command line does."""
    return torchvision_module("torchvision.models")
