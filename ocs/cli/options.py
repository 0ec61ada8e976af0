"""Options of a Python function as those of a command: names, defaults and choices are the function's own.

Of ocs.quantize the checks and lines of help are those of ocs.plan.options.
"""

import argparse
import types
from collections.abc import Callable, Collection, Mapping
from functools import partial
from inspect import signature
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from ocs.plan.options import Check, LayerOptions, ModelOptions, definitions
from ocs.plan.selectors import FIRST_LAYER
from ocs.quantization import quantize
from ocs.weight.arguments import check_choice
from ocs.weight.threshold import METHODS

_FIRST = "FIRST_LAYER"
_SHOWN = {int: "N", float: "X", str: "METHOD", bool: "true"}


class Values(NamedTuple):
    """What an annotation allows: kinds of values, and strings by name."""

    kinds: frozenset[Any]
    choices: tuple[str, ...]

    @property
    def flag(self) -> bool:
        """Whether it is True or False, or left open, and nothing else."""
        return bool in self.kinds and self.kinds <= {bool, types.NoneType} and not self.choices

    @property
    def shown(self) -> str:
        """What stands for a value in help."""
        return "|".join([*(text for kind, text in _SHOWN.items() if kind in self.kinds), *self.choices])

    def parse(self, text: str) -> Any:
        """Read a value as Python would have it; what fits nothing stays text, for the option's check to refuse."""
        if text == "none" and types.NoneType in self.kinds and str not in self.kinds:
            return None
        if bool in self.kinds and text in ("true", "false"):
            return text == "true"
        for kind in (int, float):
            if kind in self.kinds:
                try:
                    return kind(text)
                except ValueError:
                    pass
        return text


def values_of(annotation: Any) -> Values:
    """Take an annotation apart: unions, literals, and all else by its type."""
    origin = get_origin(annotation)
    if origin is Literal:
        return Values(frozenset(), get_args(annotation))
    if origin not in (Union, types.UnionType):
        return Values(frozenset({origin or annotation}), ())
    parts = [values_of(part) for part in get_args(annotation)]
    return Values(frozenset().union(*(part.kinds for part in parts)), sum((part.choices for part in parts), ()))


# --- ocs.quantize -----------------------------------------------------------------------------------------------------

KNOWN = definitions(LayerOptions) | definitions(ModelOptions)


def add_quantize_options(parser: argparse.ArgumentParser, names: Collection[str], **defaults: Any) -> None:
    """Give a command these options of ocs.quantize, some with defaults of its own."""
    group = parser.add_argument_group("how to quantize (the options of ocs.quantize)")
    checks = {name: definition.check for name, definition in KNOWN.items() if name in names}
    add_options(group, quantize, {name: KNOWN[name].help for name in checks}, checks, defaults)


def chosen_options(args: argparse.Namespace) -> dict[str, Any]:
    """Collect those of ocs.quantize's options that the user gave or that the command has by default."""
    found = {name: vars(args)[name] for name in KNOWN if name in vars(args)}
    if "skip" in found:
        found["skip"] = _selectors(found["skip"])
    if "overrides" in found:
        found["overrides"] = dict(found["overrides"]) or None
    return found


def _selectors(names: list[str]) -> Any:
    """Make of names given what `skip` takes: the default where there is none."""
    if not names:
        return FIRST_LAYER
    return [FIRST_LAYER if name == _FIRST else name for name in names if name != "none"]


def _override(text: str) -> tuple[str, dict[str, Any]]:
    """Read PATTERN:OPTION=VALUE,OPTION=VALUE."""
    pattern, colon, rest = text.rpartition(":")
    pairs = [part.partition("=") for part in rest.split(",")]
    if not colon or not pattern or not all(name and equals for name, equals, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}: use PATTERN:OPTION=VALUE,OPTION=VALUE, 'layer4.*:wbits=8' say")
    hints, layer_options = get_type_hints(quantize), definitions(LayerOptions)
    values = {}
    for name, _, value in ((name.replace("-", "_"), equals, value) for name, equals, value in pairs):
        if name not in layer_options:
            raise argparse.ArgumentTypeError(f"{text!r}: unknown option {name!r}; use {', '.join(layer_options)}")
        values[name] = _checked(layer_options[name].check, name, values_of(hints[name]).parse(value))
    return pattern, values


_APPENDED = {
    "skip": (str, "NAME", f"; a name or pattern, again for more; {_FIRST} is the default, none skips nothing"),
    "overrides": (_override, "PATTERN:OPTION=VALUE,...", "; again for more"),
}


# --- Any function -----------------------------------------------------------------------------------------------------


def add_options(
    parser: Any,
    function: Callable[..., Any],
    texts: Mapping[str, str],
    checks: Mapping[str, Check] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Add an option for each argument of a function that has a line of help here; without a check it is a choice.

    defaults: those of the command, where they are not the function's.
    """
    hints, parameters = get_type_hints(function), signature(function).parameters
    for name, text in texts.items():
        switch, line = f"--{name.replace('_', '-')}", text.replace("%", "%%")
        default = (defaults or {}).get(name, parameters[name].default)
        if name in _APPENDED:
            kind, metavar, more = _APPENDED[name]
            parser.add_argument(
                switch, dest=name, action="append", type=kind, default=[], metavar=metavar, help=line + more
            )
            continue
        values = values_of(hints[name])
        what = f"{line} ({_default(name, default)})"
        if values.flag:
            flag = parser.add_argument(switch, dest=name, action=argparse.BooleanOptionalAction, default=default)
            flag.help = what  # afterwards: Python 3.11 would add the default once more
            continue
        check = (checks or {}).get(name) or partial(check_choice, choices=values.choices)
        methods = [each for each in ("auto", *METHODS) if _passes(check, name, each)] if str in values.kinds else []
        what = f"{what}; METHOD: {', '.join(methods)}" if methods else what
        read = partial(_read, name, values, check)
        option = parser.add_argument(switch, dest=name, type=read, default=default, metavar=values.shown, help=what)
        option.completer = partial(_completions, [*values.choices, *methods])


def _completions(words: list[str], **_: Any) -> list[str]:
    """List what a shell may complete an option's value to."""
    return words


def _default(name: str, default: Any) -> str:
    """Say what an option is where it is not given."""
    if default is None and getattr(LayerOptions, name, None) is not None:
        return "default: the recipe's"
    return f"default: {'none' if default is None else default}"


def _read(name: str, values: Values, check: Check, text: str) -> Any:
    """Read an option's value, and check it."""
    value = values.parse(text)
    return value if value is None else _checked(check, name, value)


def _passes(check: Check, name: str, value: Any) -> bool:
    try:
        check(name, value)
    except ValueError:
        return False
    return True


def _checked(check: Check, name: str, value: Any) -> Any:
    """Check a value as ocs.quantize does; argparse shows the messages of its own kind of error only."""
    try:
        return check(name, value)
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
