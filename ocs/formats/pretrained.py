"""Models with a save_pretrained, as transformers have: what it wrote would be read as random weights."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ocs.model.rewrite import NewEntry, Slot, attribute
from ocs.nn.base import QuantizedLayer


def refused_slots(model: nn.Module, replacements: Mapping[int, nn.Module]) -> Iterator[Slot | NewEntry]:
    """Let every module that will hold quantized layers refuse save_pretrained, where it has one.

    A from_pretrained knows nothing of integers: it takes the float weights for missing ones, and makes them up.
    """
    quantized = {old for old, new in replacements.items() if isinstance(new, QuantizedLayer)}
    for module in model.modules():
        has_one = callable(getattr(type(module), "save_pretrained", None)) and id(module) not in replacements
        if has_one and any(id(child) in quantized for child in module.modules()):
            entry = (vars(module), "save_pretrained", refuse_save_pretrained)
            yield attribute(module, *entry[1:]) if "save_pretrained" in vars(module) else NewEntry(*entry)


def refuse_save_pretrained(*_: Any, **__: Any) -> None:
    """Stand in for save_pretrained in a quantized model."""
    raise ValueError(
        "save_pretrained would write integers, of which from_pretrained makes random weights: write the model with"
        " ocs.save(model, path) and its configuration with model.config.save_pretrained(folder); read them with"
        " ocs.load(path, model) into a float model made from that configuration; or, of a model of transformers, call"
        " ocs.hf.OcsConfig().attach(model) first"
    )
