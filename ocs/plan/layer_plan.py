"""What is decided of each layer; every stage of quantize() hands on the plans that it got, or new ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from ocs.model.input_statistics import HasMean
from ocs.model.targets import Target
from ocs.nn.base import QuantizedLayer
from ocs.nn.product import QuantProduct
from ocs.nn.registry import replacement_of
from ocs.plan.options import LayerOptions


@dataclass(frozen=True)
class LayerPlan:
    """A target, and what is decided of it."""

    target: Target
    options: LayerOptions
    status: Literal["quantized", "skipped", "float"] = "quantized"
    reason: str = ""  # why it is left as it is, if so
    skipped_by_name: bool = False  # the caller's skip means it, whatever else would leave it float
    overridden: frozenset[str] | None = None  # the options that overrides name; None where none fits
    input_mean: HasMean | None = None  # what is known of its input, where a recipe asked
    norm_folded: nn.Module | None = None  # what stands for the target's module once a BatchNorm is folded into it
    splits: Mapping[str, int] | None = None  # of each weight, in each group; None is what r says
    shell: nn.Module | None = None  # where its weights are read for a while: the layer without them

    @property
    def name(self) -> str:
        """The target's first name."""
        return self.target.name

    @property
    def module(self) -> nn.Module:
        """The float layer that is quantized."""
        return self.target.layer if self.norm_folded is None else self.norm_folded

    @property
    def like(self) -> nn.Module:
        """The float layer whose dtype counts: weights that are read for a while are in another."""
        return self.module if self.shell is None else self.shell

    @property
    def kind(self) -> type[QuantizedLayer]:
        """The class of the layer that replaces it."""
        return replacement_of(self.target.module)

    @property
    def quantized(self) -> bool:
        """Whether it is to be quantized."""
        return self.status == "quantized"

    @property
    def quantizes_input(self) -> bool:
        """Whether its input is to be quantized."""
        if not self.quantized or self.options.abits is None or self.target.reason_float_input:
            return False
        return not self.kind.input_if_asked or self.overrides("abits")

    @property
    def rounds_rows(self) -> bool:
        """Whether each row of its input gets a scale of its own."""
        return self.quantizes_input and self.options.act_scale == "dynamic"

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration must tell of its input."""
        if self.rounds_rows:
            return self.options.splits_input and self.kind.splits_input
        oracle = self.options.act_split == "oracle" and self.options.act_signed is True
        return self.quantizes_input and not oracle

    @property
    def can_correct_bias(self) -> bool:
        """Whether its kind of layer has a bias to correct."""
        return issubclass(self.kind, QuantProduct)

    @property
    def needs_mean(self) -> bool:
        """Whether its bias is to be corrected, by the mean of its input."""
        return self.quantized and self.options.correct_bias and self.can_correct_bias

    @property
    def needs_second_moments(self) -> bool:
        """Whether calibration must tell the second moments of what its weights meet."""
        return self.quantized and self.options.compensated and not self.kind.unseen(self.module)

    def overrides(self, option: str) -> bool:
        """Tell whether an override names the option."""
        return self.overridden is not None and option in self.overridden

    def left(self, status: Literal["skipped", "float"], reason: str) -> LayerPlan:
        """Make the plan of leaving the layer as it is."""
        return replace(self, status=status, reason=reason)
