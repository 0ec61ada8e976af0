"""Models that can save themselves, as those of transformers do, and would write what reads as random weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import ocs
from ocs.model.rewrite import NewEntry


class Pretrained(nn.Module):
    """What transformers' PreTrainedModel does, in short: tensors that are missing in the file are random."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.bare = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def save_pretrained(self, path: Path) -> str:
        torch.save(self.state_dict(), path)
        return "written"


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = Pretrained(), Pretrained()


def loaded(model: nn.Module, path: Path) -> nn.Module:
    ocs.save(model, path)
    return ocs.load(path, Pretrained())


MADE: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "quantized": lambda model, path: model,
    "a copy": lambda model, path: copy.deepcopy(model),
    "pickled": lambda model, path: pickle.loads(pickle.dumps(model)),
    "loaded": loaded,
    "compiled": lambda model, path: torch.compile(model),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("made", MADE)
def test_it_is_refused(tmp_path: Path, made: str) -> None:
    model = Pretrained()
    names = list(model.state_dict())
    ocs.quantize(model, wbits=4)
    model = MADE[made](model, tmp_path / "m")
    with pytest.raises(ValueError, match=r"save_pretrained would write integers, .* use|ocs\.save\(model, path\)"):
        model.save_pretrained(tmp_path / "pretrained")
    assert not (tmp_path / "pretrained").exists()
    assert "save_pretrained" not in names


def test_only_where_something_is_quantized(tmp_path: Path) -> None:
    model = Outer()
    ocs.quantize(model, skip="other.*")
    assert model.other.save_pretrained(tmp_path / "other") == "written"
    with pytest.raises(ValueError, match="save_pretrained would write integers"):
        model.inner.save_pretrained(tmp_path / "inner")
    assert not hasattr(model, "save_pretrained")
    assert Pretrained().save_pretrained(tmp_path / "float") == "written"


def test_a_failure_leaves_the_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All or nothing: the last of the slots fails."""
    model = Outer()

    def slots(*_: object) -> list:
        class Full(dict):
            def __setitem__(self, name: str, value: object) -> None:
                raise MemoryError

        return [NewEntry(vars(model.inner), "save_pretrained", None), NewEntry(Full(), "a", 2)]

    monkeypatch.setattr("ocs.quantization.refused_slots", slots)
    with pytest.raises(MemoryError):
        ocs.quantize(model)
    assert isinstance(model.inner.layer, nn.Linear)
    assert model.inner.save_pretrained(tmp_path / "inner") == "written"
