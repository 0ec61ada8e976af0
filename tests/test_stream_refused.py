"""ocs.quantize_file: models, files and options that it refuses, before any work."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_stream import everything, on_meta, run, write_files
from torch import Tensor, nn

import ocs
from ocs.calibration.calibrate import Calibration
from ocs.formats.source import INDEX


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write_files(everything(), tmp_path / "float")


def without(files: Path, name: str) -> None:
    change(files, lambda tensors: {key: each for key, each in tensors.items() if key != name})


def change(files: Path, changed: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    for path in files.glob("*.safetensors"):
        save_file(dict(changed(load_file(path))), path)


def with_tensor(name: str, tensor: Tensor) -> Callable[[Path], None]:
    return lambda files: change(files, lambda tensors: {n: tensor if n == name else t for n, t in tensors.items()})


def added(files: Path) -> None:
    path = files / "model-0.safetensors"
    save_file(load_file(path) | {"more.weight": torch.zeros(2)}, path)


def twice(files: Path) -> None:
    tensors = load_file(files / "model-0.safetensors") | load_file(files / "model-1.safetensors")
    save_file(tensors, files / "model-1.safetensors")


def with_index(text: str) -> Callable[[Path], Any]:
    return lambda files: (files / INDEX).write_text(text)


def truncated(files: Path) -> None:
    path = files / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def quantized(files: Path) -> None:
    model = everything()
    ocs.quantize(model)
    (files / INDEX).unlink()
    ocs.save(model, files / "model.safetensors")


WRONG = {
    "missing": (lambda files: without(files, "net.stem.bias"), r"it is of another model: it has no net\.stem\.bias$"),
    "one more": (added, r"it is of another model: it has besides more\.weight$"),
    "shape": (with_tensor("lstm.weight_hh_l0", torch.zeros(48, 13)), r"lstm\.weight_hh_l0 is \[48, 13\], .*\[48, 12\]"),
    "dtype": (with_tensor("steps", torch.tensor(7.0)), r"steps is torch\.float32, the model has torch\.int64"),
    "twice": (twice, "two of the files have a tensor of the same name"),
    "half": (truncated, "it is no complete safetensors file"),
    "quantized": (quantized, "it holds a quantized model"),
    "no file": (lambda files: (files / "model-2.safetensors").unlink(), r"model-2\.safetensors: there is no such file"),
    "no JSON": (with_index("{"), "it is no index"),
    "no map": (with_index('{"weight_map": [1]}'), "it is no index"),
    "elsewhere": (with_index('{"weight_map": {"a": "../model-0.safetensors"}}'), "it is no index"),
    "nothing": (shutil.rmtree, "there is no such file or folder"),
    "no weights": (lambda files: (files / INDEX).unlink(), "it is a folder, in which there is neither"),
}


@pytest.mark.parametrize(("damage", "says"), WRONG.values(), ids=WRONG)
def test_files_that_do_not_fit_are_refused_before_any_work(
    files: Path, tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    damage(files)
    with pytest.raises((ValueError, OSError), match=says):
        run(files, tmp_path / "out")
    assert not (tmp_path / "out").exists()


REFUSED = {
    "calibration": ({"calibration": Calibration(), "abits": 8}, TypeError, "give quantize_file the batches"),
    "without use": ({"calibration": [torch.zeros(1)]}, ValueError, "calibration= has no effect on these options"),
    "folding": (
        {"fold_bn": True},
        ValueError,
        "fold_bn=True needs the whole model in memory.*ocs.quantize and ocs.save",
    ),
    "equalize": ({"equalize": True}, ValueError, "equalize=True needs the whole model"),
    "allocate": ({"allocate": "knapsack"}, ValueError, "allocate=knapsack needs the whole model"),
    "budget": ({"wbits": "auto", "budget": 10**6}, ValueError, "budget=1000000 needs the whole model"),
    "automatic": ({"wbits": "auto"}, ValueError, 'wbits="auto" is not for quantize_file'),
    "inputs": ({"abits": 8}, ValueError, "abits=8 needs calibration=: batches of inputs, say"),
    "gptq": ({"overrides": {"cell": {"rounding": "gptq"}}}, ValueError, "cell: rounding='gptq' needs calibration="),
    "learned": ({"rounding": "learned", "calibration": [0]}, ValueError, "rounding='learned' is not for.*'gptq' takes"),
    "function": ({"select": lambda w, n: range(n)}, ValueError, "a function as select is not for quantize_file"),
    "range": ({"wbits": 1}, ValueError, "wbits=1: use an integer from 2 to 8"),
    "pattern": ({"overrides": {"nowhere": {}}}, ValueError, "nowhere"),
    "unknown": ({"bits": 4}, TypeError, "quantize_file has no option 'bits': the nearest is wbits"),
    "size": ({"shard_size": 0}, ValueError, "shard_size=0: use a positive integer"),
}


@pytest.mark.parametrize(("options", "error", "says"), REFUSED.values(), ids=REFUSED)
def test_options_that_need_more_are_refused(
    files: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        run(files, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_models_and_folders_that_cannot_be(files: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"net\.stem\.weight: it holds values: build the model on the meta device"):
        ocs.quantize_file(everything(), tmp_path / "out", weights=files)
    net = nn.Sequential(nn.LazyLinear(2, bias=False, device="meta"))
    save_file({"0.weight": torch.zeros(2, 2)}, tmp_path / "lazy")
    with pytest.raises(ValueError, match=r"0\.weight: it is of a lazy layer"):
        ocs.quantize_file(net, tmp_path / "out", weights=tmp_path / "lazy")
    with pytest.raises(TypeError, match=r"weights=\.\.\.\): say where the weights are"):
        ocs.quantize_file(on_meta(), tmp_path / "out")
    with pytest.raises(TypeError, match=r"is for a model that is an nn\.Module"):
        ocs.quantize_file(files, tmp_path / "out", weights=files)
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        ocs.quantize_file(files, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        run(files, tmp_path / "no" / "out")
    with pytest.raises(FileExistsError, match="it holds a model already"):
        run(files, files)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="it is no folder"):
        run(files, tmp_path / "file")


def test_a_weight_without_numbers_is_an_error_that_names_it(files: Path, tmp_path: Path) -> None:
    change(files, lambda tensors: {n: t * torch.nan if n == "cell.weight_ih" else t for n, t in tensors.items()})
    with pytest.raises(ValueError, match=r"^cell: weight_ih: .*NaN"):
        run(files, tmp_path / "out")
    assert not [*(tmp_path / "out").glob("*.safetensors")]
