"""One definition of the options: what follows from it agrees with it."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields

import pytest
from conftest import SmallNet

import ocs
from ocs.plan.options import LayerOptions, ModelOptions, Request, definitions

LAYER, MODEL = definitions(LayerOptions), definitions(ModelOptions)
SIGNATURE = {name: each for name, each in inspect.signature(ocs.quantize).parameters.items() if name != "model"}


def test_the_signature_has_every_option_and_its_default() -> None:
    defaults = {each.name: each.default for options in (LayerOptions, ModelOptions) for each in fields(options)}
    assert set(SIGNATURE) == set(defaults)
    for name, parameter in SIGNATURE.items():
        left_open = name in LAYER and LAYER[name].left_open
        assert repr(parameter.default) == repr(None if left_open else defaults[name]), name
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY


def test_the_docstring_says_something_of_every_option() -> None:
    for name in SIGNATURE:
        assert f"\n        {name}: " in ocs.quantize.__doc__, name


def test_every_option_has_a_line_of_help() -> None:
    for definition in (LAYER | MODEL).values():
        assert 5 < len(definition.help) < 80


def test_overrides_know_the_layer_options_and_no_others(net: SmallNet) -> None:
    for name in MODEL:
        with pytest.raises(ValueError, match=rf"unknown option '{name}'; use {', '.join(LAYER)}"):
            ocs.quantize(net, overrides={"head": {name: None}})


def test_report_and_file_have_the_options_by_name(net: SmallNet) -> None:
    report = ocs.quantize(net, wbits=4, r=0.1)
    assert list(report.settings) == [
        *LAYER,
        "skip",
        "overrides",
        "fold_bn",
        "equalize",
        "embeddings",
        "allocate",
        "budget",
        "recipe",
    ]
    assert list(net.head.settings) == list(LAYER)
    json.dumps(net.head.settings)


@pytest.mark.parametrize("name", LAYER)
def test_none_leaves_open_what_a_recipe_decides_and_nothing_else(name: str) -> None:
    arguments = {each: parameter.default for each, parameter in SIGNATURE.items()} | {name: None}
    if LAYER[name].left_open:
        request = Request.of(arguments)
        assert name not in request.given
        assert getattr(request.common, name) == getattr(LayerOptions, name)
    else:
        with pytest.raises(ValueError, match=f"{name}=None: use"):
            Request.of(arguments)
