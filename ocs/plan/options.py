"""The options of quantize(), each defined once: its default, its check, and a line of help.

LayerOptions are how one layer is quantized; overrides can change them layer by layer, and a recipe decides those that
the caller leaves open. ModelOptions are of the model as a whole. The signature of quantize(), overrides, the report's
settings and a file's header follow from the two.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from ocs.nn.input import ActScale, ActSplit
from ocs.plan.selectors import FIRST_LAYER, Selector, selectors, shown_selector
from ocs.weight.arguments import (
    check_bits,
    check_choice,
    check_clip,
    check_flag,
    check_group,
    check_ratio,
    check_rounding,
    check_select,
)
from ocs.weight.types import GROUP, Granularity, Select, Split

if TYPE_CHECKING:
    from ocs.calibration.calibrate import Calibration
    from ocs.calibration.run import Data

Rounding = Literal["nearest", "squant", "gptq", "learned"]
ActSelect = Literal["percentile", "max", "error"]
Allocate = Literal["uniform", "knapsack", "error"]
Recipe = Literal["paper", "best"]
Thresholds = Literal["learned", "searched"]
Check = Callable[[str, Any], Any]  # (name, value) -> the value as plain Python has it, or a ValueError


class Definition(NamedTuple):
    """What is said of an option once."""

    check: Check
    help: str  # one line, for command lines and tables
    left_open: bool = False  # None leaves it to the recipe
    of_input: bool = False  # it has no effect without abits


def _option(default: Any, check: Check, text: str, **more: bool) -> Any:
    return field(default=default, metadata={"definition": Definition(check, text, **more)})


_open = partial(_option, left_open=True)


def definitions(options: type) -> dict[str, Definition]:
    """Map the names of LayerOptions or ModelOptions to their definitions, in order."""
    return {each.name: each.metadata["definition"] for each in fields(options)}


# --- Checks -----------------------------------------------------------------------------------------------------------


def _or(literal: str | None, check: Check) -> Check:
    """Let a check pass one value more."""
    return lambda name, value: value if type(value) is type(literal) and value == literal else check(name, value)


_BITS_OR_AUTO, _WEIGHT_CLIP = _or("auto", check_bits), partial(check_clip, auto=True)
_EXPAND = partial(check_flag, meaning="True (expanded) or False (folded)")


def _one_of(choices: Any) -> Check:
    """Check that a value is one of the strings of a Literal."""
    return partial(check_choice, choices=get_args(choices))


def _signed(name: str, value: Any) -> bool | str:
    if value is not True and value != "auto":
        raise ValueError(f'{name}={value!r}: use True, or "auto" (unsigned where nothing is negative)')
    return value


def _positive(name: str, value: Any, *, number: str) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name}={value!r}: use a positive {number}")
    return int(value)


_BUDGET = partial(_positive, number="integer, bytes")
_STEPS = partial(_positive, number="number of training steps, or None")


def _overrides(name: str, value: Any) -> Mapping[str, Mapping[str, Any]]:
    if not isinstance(value, Mapping | None):
        raise TypeError(f"{name}={value!r}: use a dict from names or patterns to dicts of options")
    known = definitions(LayerOptions)
    for pattern, changes in (value or {}).items():
        if not isinstance(pattern, str) or not isinstance(changes, Mapping):
            raise TypeError(f"{name}={{{pattern!r}: {changes!r}}}: use a name or pattern, and a dict of options")
        unknown = next((key for key in changes if key not in known), None)
        if unknown is not None:
            raise ValueError(f"{name}[{pattern!r}]: unknown option {unknown!r}; use {', '.join(known)}")
    return dict(value or {})


def _anything(name: str, value: Any) -> Any:
    return value


# --- The options ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerOptions:
    """How one layer is quantized; see quantize()."""

    wbits: int | Literal["auto"] = _option(8, _BITS_OR_AUTO, 'bits of the weights, 2 to 8, or "auto" with budget')
    r: float = _option(0.0, check_ratio, "expand ratio, 0 to 1: ceil(r C) of C input channels are split")
    clip: str | float = _open("none", _WEIGHT_CLIP, "clip method of the split weights, or a fraction")
    granularity: Granularity = _open(
        "tensor", _one_of(Granularity), "a scale per tensor, output channel, or group of inputs"
    )
    group: int = _option(GROUP, check_group, 'input channels that share a scale, with granularity="group"')
    split: Split = _option("qa", _one_of(Split), "how channels are split: halved (quantization-aware or naive) or even")
    rounding: Rounding = _open("nearest", _one_of(Rounding), "how weights are rounded")
    abits: int | None = _open(None, _or(None, check_bits), "bits of layer inputs, 2 to 8; float without")
    act_clip: str | float = _open("none", check_clip, "clip method of layer inputs, or a fraction", of_input=True)
    act_r: float = _option(0.0, check_ratio, "expand ratio of layer inputs, 0 to 1", of_input=True)
    act_split: ActSplit = _option("static", _one_of(ActSplit), "split inputs once, or for each batch", of_input=True)
    act_select: ActSelect = _open("percentile", _one_of(ActSelect), "which channels of inputs are split", of_input=True)
    act_signed: bool | str = _open(True, _signed, "signed integers of inputs, or unsigned where it fits", of_input=True)
    act_scale: ActScale = _option("static", _one_of(ActScale), "scale of inputs: once, or of each row", of_input=True)
    correct_bias: bool = _option(False, check_flag, "give the outputs back the mean that quantization takes from them")
    expand: bool = _option(True, _EXPAND, "run with C + n channels, or with the copies folded back")
    select: Select = _option("max", check_select, "which channels are split")

    def __post_init__(self) -> None:
        for name, check in _LAYER_CHECKS:
            object.__setattr__(self, name, check(name, getattr(self, name)))
        check_rounding(self.rounding, self.split, get_args(Rounding))
        if self.act_scale == "dynamic":
            self._check_dynamic()

    def _check_dynamic(self) -> None:
        """Refuse what a scale for each row of an input leaves no room for."""
        for name in ("act_clip", "act_split", "act_signed"):
            value, needed = getattr(self, name), getattr(LayerOptions, name)
            if value != needed:
                raise ValueError(
                    f"{name}={value!r} with act_scale='dynamic', which finds the scale of each row of an input by its"
                    f" largest |x| alone: use {name}={needed!r}, or act_scale='static'"
                )

    @property
    def learned(self) -> bool:
        """Whether its integers are to be learned, from those of gptq on."""
        return self.rounding == "learned"

    @property
    def compensated(self) -> bool:
        """Whether its rounding starts from, or is, gptq's, by the second moments of what its weights meet."""
        return self.rounding in ("gptq", "learned")

    @property
    def splits_input(self) -> bool:
        """Whether channels of its input are to be split that calibration chooses."""
        return self.abits is not None and self.act_r > 0 and self.act_split == "static"

    @property
    def automatic(self) -> bool:
        """Whether its bits are still to be chosen."""
        return self.wbits == "auto"

    @property
    def of_rows(self) -> LayerOptions:
        """The options of an embedding: a scale for each row, and neither splits nor anything of inputs."""
        return LayerOptions(wbits=self.wbits, clip=self.clip, granularity="channel")

    @property
    def shown(self) -> dict[str, Any]:
        """The options as reports and files have them, a callable by its name."""
        return {name: shown_value(value) for name, value in vars(self).items()}

    @property
    def of_input(self) -> bool:
        """Whether an option that has no effect without abits was changed."""
        names = (name for name, definition in definitions(LayerOptions).items() if definition.of_input)
        return any(getattr(self, name) != getattr(LayerOptions, name) for name in names)


_LAYER_CHECKS = tuple((name, definition.check) for name, definition in definitions(LayerOptions).items())


@dataclass(frozen=True)
class ModelOptions:
    """What is asked for of a model as a whole; see quantize()."""

    calibration: Data | Calibration | None = _option(None, _anything, "what shows the inputs: batches, say")
    fold_bn: bool = _option(False, check_flag, "fold each BatchNorm into the convolution before it")
    equalize: bool = _option(False, check_flag, "move scales between layers, so that channels have one range")
    skip: Selector | Collection[Selector] | None = _option(FIRST_LAYER, _anything, "what stays float")
    overrides: Mapping[str, Mapping[str, Any]] | None = _option(None, _overrides, "options by layer name or pattern")
    embeddings: bool = _option(False, check_flag, "quantize embeddings, too, with a scale for each row")
    allocate: Allocate = _option("uniform", _one_of(Allocate), "which layers get the splits")
    budget: int | None = _option(None, _or(None, _BUDGET), 'bytes of all packed weights, with wbits="auto"')
    recipe: Recipe = _option("paper", _one_of(Recipe), "what the options mean that are left open")
    explain: bool | None = _option(None, _or(None, check_flag), "say what each option did for the error")
    progress: bool | None = _option(None, _anything, "show a bar")

    def __post_init__(self) -> None:
        for name, definition in definitions(ModelOptions).items():
            object.__setattr__(self, name, definition.check(name, getattr(self, name)))

    @property
    def explained(self) -> bool:
        """Whether the report says what each option did: by default with another recipe than the paper's."""
        return self.recipe != "paper" if self.explain is None else self.explain

    @property
    def shown(self) -> dict[str, Any]:
        """The options that a report has."""
        overrides = {
            pattern: {name: shown_value(value) for name, value in changes.items()}
            for pattern, changes in self.overrides.items()
        }
        return {
            "skip": [shown_selector(selector) for selector in selectors(self.skip)],
            "overrides": overrides,
            "fold_bn": self.fold_bn,
            "equalize": self.equalize,
            "embeddings": self.embeddings,
            "allocate": self.allocate,
            "budget": self.budget,
            "recipe": self.recipe,
        }


@dataclass(frozen=True)
class TrainingOptions:
    """What is asked for of training beyond how layers are quantized; see ocs.training.prepare()."""

    thresholds: Thresholds = _option("learned", _one_of(Thresholds), "weights' and inputs' thresholds while training")
    replan: int | None = _option(100, _or(None, _STEPS), "training steps after which splits are planned anew")

    def __post_init__(self) -> None:
        for name, definition in definitions(TrainingOptions).items():
            object.__setattr__(self, name, definition.check(name, getattr(self, name)))


def shown_value(value: Any) -> Any:
    """Name a callable; leave all else as it is."""
    return shown_selector(value) if callable(value) else value


class Request(NamedTuple):
    """What the caller of quantize() asked for, checked."""

    common: LayerOptions  # of all layers, the paper's where the caller left them open
    given: frozenset[str]  # the layer options that the caller chose
    model: ModelOptions

    @staticmethod
    def of(arguments: Mapping[str, Any]) -> Request:
        """Check the arguments of quantize(), by name; a ValueError or TypeError says which is out of range.

        Options that are not among them are as by default.
        """
        arguments = _DEFAULTS | arguments
        whole = ModelOptions(**{name: arguments[name] for name in definitions(ModelOptions)})
        given = {
            name: arguments[name]
            for name, definition in definitions(LayerOptions).items()
            if not (definition.left_open and arguments[name] is None)
        }
        _check_group_has_effect([given, *whole.overrides.values()])
        return Request(LayerOptions(**given), frozenset(given), whole)


def _check_group_has_effect(options: Collection[Mapping[str, Any]]) -> None:
    """Refuse another number of channels than the usual where nothing has a scale for so many."""
    group = next((each["group"] for each in options if each.get("group", GROUP) != GROUP), None)
    if group is not None and all(each.get("granularity") != "group" for each in options):
        raise ValueError(f"group={group!r} has no effect: it is for granularity='group'")


_DEFAULTS = {
    each.name: None if each.metadata["definition"].left_open else each.default
    for options in (LayerOptions, ModelOptions)
    for each in fields(options)
}
