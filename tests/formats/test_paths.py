"""What is no name of a file is refused by every call that takes one, and the argument is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ocs


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8))


def quantized() -> nn.Module:
    model = net()
    ocs.quantize(model)
    return model


CALLS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "save": ("path", lambda path: ocs.save(quantized(), path)),
    "load": ("path", lambda path: ocs.load(path, net())),
    "export": ("path", lambda path: ocs.export(quantized(), path, torch.ones(1, 8))),
    "report": ("path", lambda path: ocs.quantize(net()).save(path)),
    "out": ("out", lambda path: ocs.quantize_file(net(), path, weights=".")),
    "weights": ("weights", lambda path: ocs.quantize_file(net(), "out", weights=path)),
    "model": ("model", lambda path: ocs.quantize_file(path, "out")),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("path", [3, b"a", ["a"], ""], ids=repr)
def test_the_argument_is_named(call: str, path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, function = CALLS[call]
    with pytest.raises((TypeError, ValueError)) as caught:
        function(path)
    assert str(caught.value).startswith(f"{name}={path!r}: give a name")
    assert not [*tmp_path.iterdir()]
