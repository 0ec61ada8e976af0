"""save() and load(): k bits take k bits, a model comes back exactly, and no file can do harm."""

from __future__ import annotations

import copy
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import Everything, assert_unchanged, forge, header_of, state
from torch import Tensor, nn

import ocs
from ocs import _C
from ocs.formats import storage
from ocs.nn.base import QuantizedLayer


def fresh() -> Everything:
    """Other weights each time."""
    return Everything().eval()


def outputs(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(*Everything.inputs())


def assert_same_model(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name
    assert repr(a) == repr(b)
    for ours, theirs in zip(outputs(a), outputs(b), strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = fresh()
    ocs.quantize(model, wbits=5, r=0.1, overrides={"lstm": {"wbits": 3, "granularity": "channel"}})
    path = tmp_path / "model.safetensors"
    ocs.save(model, path)
    return model, path


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("expand", [True, False])
def test_a_model_comes_back_exactly(tmp_path: Path, expand: bool, bits: int) -> None:
    model, path = fresh(), tmp_path / "any name"
    ocs.quantize(model, wbits=bits, r=0.25, expand=expand, granularity="channel" if bits % 2 else "tensor")
    ocs.save(model, path)
    other = fresh()
    assert ocs.load(path, other) is other
    assert_same_model(other, model)
    assert other.decoder.weight is other.embedding.weight
    assert other.again is other.net.head
    for a, b in zip(model.modules(), other.modules(), strict=True):
        if isinstance(a, QuantizedLayer):
            assert a.settings == b.settings
            assert a.settings["r"] == 0.25


def test_parameters_stay_the_same_objects(saved: tuple[nn.Module, Path]) -> None:
    other = fresh()
    kept = {name: p for name, p in other.named_parameters() if name.endswith("bias") or name.startswith("embedding")}
    ocs.load(saved[1], other)
    assert all(dict(other.named_parameters())[name] is p for name, p in kept.items())


def test_onto_meta(saved: tuple[nn.Module, Path]) -> None:
    """No weight is made twice; what is tied stays tied."""
    model, path = saved
    other = fresh().to("meta")
    other.decoder.weight = other.embedding.weight
    ocs.load(path, other)
    assert not any(tensor.is_meta for tensor in other.state_dict().values())
    assert other.decoder.weight is other.embedding.weight
    assert_same_model(other.eval(), model)


def test_a_half_precision_model(tmp_path: Path) -> None:
    model, path = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).half(), tmp_path / "half"
    ocs.quantize(model, wbits=4, r=0.2)
    ocs.save(model, path)
    floats = [nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).to(dtype) for dtype in (torch.half, torch.float)]
    same, wider = (ocs.load(path, model) for model in floats)
    assert torch.equal(same[0].weight, model[0].weight)
    assert wider[0].weight.dtype == wider[1].weight.dtype == torch.float
    assert torch.equal(wider[1].weight, model[1].weight.float())


def test_bits_take_bits(tmp_path: Path) -> None:
    model, path = nn.Sequential(nn.Linear(1000, 1000, bias=False)), tmp_path / "m"
    for bits in range(2, 9):
        ours = copy.deepcopy(model)
        report = ocs.quantize(ours, wbits=bits, r=0.02)
        ocs.save(ours, path)
        assert 0 <= path.stat().st_size - report.packed_bytes < 1500  # the header
        assert report.packed_bytes == 1000 * 1020 * bits // 8 + 4 + 20 * 4


class Scaled(nn.Module):
    """With a tensor of its own that is called as a quantized layer's are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("input_scale", torch.tensor(1.0))
        self.input_source = nn.Parameter(torch.zeros(4))
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x * self.input_scale + self.input_source)


def test_tensors_that_are_called_like_ours_are_kept(tmp_path: Path) -> None:
    model, x = Scaled(), torch.randn(3, 4)
    with torch.no_grad():
        model.input_scale.fill_(7)
        model.input_source.fill_(3)
    ocs.quantize(model, abits=8, calibration=x)
    ocs.save(model, tmp_path / "scaled.safetensors")
    for target in (Scaled(), Scaled().to("meta")):
        assert torch.equal(ocs.load(tmp_path / "scaled.safetensors", target)(x), model(x))


def test_the_file_is_readable_by_others(saved: tuple[nn.Module, Path]) -> None:
    model, path = saved
    header = header_of(path)
    with safetensors.safe_open(path, framework="np") as file:
        packed, copies = file.get_tensor("net.head.weight_int"), file.get_tensor("net.head.source")
    assert (header["format"], header["ocs"]) == (2, ocs.__version__)
    assert header["layers"]["net.head"] == {
        "kind": "Linear",
        "bits": 5,
        "expand": True,
        "settings": {"wbits": 5, "r": 0.1, "clip": "none", "granularity": "tensor", "group": 64,
                     "split": "qa", "rounding": "nearest", "abits": None, "act_clip": "none", "act_r": 0.0,
                     "act_split": "static", "act_select": "percentile", "act_signed": True, "act_scale": "static",
                     "correct_bias": False, "expand": True, "select": "max"},
        "input": None,
        "weights": {"weight": [5, 18]},
    }  # fmt: skip
    assert np.array_equal(_C.unpack(packed, 5 * 18, 5).reshape(5, 18), model.net.head.weight_int.numpy())
    assert copies.tolist() == model.net.head.copies().tolist()


def test_resnet50_at_5_bits(tmp_path: Path) -> None:
    """At most 5/32 x 1.06 of the float weights, plus what is not quantized."""
    from zoo import torchvision_models

    model, path = torchvision_models().resnet50(weights=None), tmp_path / "resnet50"
    total = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    report = ocs.quantize(model, wbits=5, r=0.02)
    ocs.save(model, path)
    assert path.stat().st_size <= 5 / 32 * 1.06 * report.float_bytes + (total - report.float_bytes)


# --- What goes wrong while saving -------------------------------------------------------------------------------------


def test_an_interrupted_save_loses_nothing(saved: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = saved
    before = path.read_bytes()

    def write_half(tensors: dict, target: Path, metadata: dict) -> None:
        Path(target).write_bytes(before[: len(before) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", write_half)
    with pytest.raises(KeyboardInterrupt):
        ocs.save(model, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_reader_of_the_old_file_keeps_it(saved: tuple[nn.Module, Path]) -> None:
    """The new file takes its name at once: nobody sees half of it."""
    model, path = saved
    before = path.read_bytes()
    model.net.head.bias.data += 1
    with path.open("rb") as reader:
        ocs.save(model, path)
        assert reader.read() == before
    assert path.read_bytes() != before


def test_a_loaded_model_has_left_its_file(saved: tuple[nn.Module, Path]) -> None:
    """Which may be overwritten, or cut, while the model is in use."""
    other = ocs.load(saved[1], fresh())
    content = saved[1].read_bytes()
    saved[1].write_bytes(bytes(len(content)))
    assert_same_model(other, saved[0])


def test_the_file_is_as_readable_as_others(saved: tuple[nn.Module, Path]) -> None:
    model, path = saved
    plain = path.with_name("plain")
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    path.chmod(0o604)
    ocs.save(model, path)
    assert path.stat().st_mode & 0o777 == 0o604


def test_what_is_no_model_or_no_file(saved: tuple[nn.Module, Path]) -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, not dict"):
        ocs.save({}, saved[1])
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, not dict"):
        ocs.load(saved[1], {})
    (saved[1].parent / "folder").mkdir()
    for call in (lambda: ocs.save(saved[0], saved[1].parent), lambda: ocs.load(saved[1].parent / "folder", fresh())):
        with pytest.raises(IsADirectoryError, match="it is a folder"):
            call()


def test_saving_through_a_link_keeps_the_link(saved: tuple[nn.Module, Path]) -> None:
    model, path = saved
    link = path.parent / "link"
    link.symlink_to(path)
    ocs.save(model, link)
    assert link.is_symlink()
    assert_same_model(ocs.load(link, fresh()), model)


def test_a_model_gives_the_same_bytes_each_time(saved: tuple[nn.Module, Path]) -> None:
    model, path = saved
    before = path.read_bytes()
    for _ in range(8):
        ocs.save(model, path)
        assert path.read_bytes() == before


class Extra(nn.Linear):
    def get_extra_state(self) -> dict:
        return {"a": 1}


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with pytest.raises(ValueError, match=r"Linear has no quantized layer: call ocs\.quantize first"):
        ocs.save(nn.Linear(2, 2), path)
    model = nn.Sequential(nn.Linear(2, 2), Extra(2, 2))
    ocs.quantize(model, skip="1")
    with pytest.raises(ValueError, match="1: it has extra state"):
        ocs.save(model, path)
    with pytest.raises(ValueError, match="model is itself a QuantLinear"):
        ocs.save(model[0], path)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    ocs.quantize(model, skip="1")
    with pytest.raises(ValueError, match=r"1\.weight: it holds no values yet"):
        ocs.save(model, path)
    model = nn.Sequential(nn.Linear(2, 2))
    ocs.quantize(model)
    model.register_buffer("adjacency", torch.eye(2).to_sparse())
    with pytest.raises(ValueError, match=r"adjacency: it is torch\.sparse_coo"):
        ocs.save(model, path)
    del model.adjacency
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"phase: it is torch\.complex128, which a safetensors file cannot hold"):
        ocs.save(model, path)
    with pytest.raises(FileNotFoundError):
        ocs.save(nn.Sequential(model[0]), tmp_path / "no" / "such" / "folder")
    assert not os.listdir(tmp_path)


# --- Files that are damaged, foreign or hostile -----------------------------------------------------------------------


def load_fails(path: Path, message: str, model: nn.Module | None = None) -> None:
    """With one clear error, and the model as it was."""
    model = model or fresh()
    before = state(model)
    with pytest.raises(ValueError, match=message) as caught:
        ocs.load(path, model)
    assert str(path) in str(caught.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize("part", [0, 0.001, 0.1, 0.5, 0.999])
def test_truncated(saved: tuple[nn.Module, Path], part: float) -> None:
    content = saved[1].read_bytes()
    saved[1].write_bytes(content[: int(part * len(content))])
    load_fails(saved[1], "it is no complete safetensors file")


def test_no_such_file() -> None:
    with pytest.raises(FileNotFoundError):
        ocs.load("/no/such/file", fresh())


def test_every_flipped_bit_is_found(saved: tuple[nn.Module, Path]) -> None:
    """Or changes nothing, as white space in the header."""
    model, path = saved
    content = bytearray(path.read_bytes())
    positions = np.random.default_rng(0).integers(0, 8 * len(content), 300)
    found = 0
    for at in [*range(64), *positions.tolist()]:
        damaged = bytearray(content)
        damaged[at // 8] ^= 1 << at % 8
        path.write_bytes(damaged)
        other = fresh()
        try:
            ocs.load(path, other)
        except ValueError:
            found += 1
        else:
            assert_same_model(other, model)
    assert found > 350


def test_a_changed_setting_is_found(saved: tuple[nn.Module, Path]) -> None:
    content = saved[1].read_bytes()
    assert content.count(b'\\"r\\": 0.1') == 9
    saved[1].write_bytes(content.replace(b'\\"r\\": 0.1', b'\\"r\\": 0.7', 1))
    load_fails(saved[1], "its header is damaged")


def setting(*keys: str, to: Any) -> Callable[[dict, dict], None]:
    def change(header: dict, tensors: dict) -> None:
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = to

    return change


def tensor(name: str, to: Callable[[Tensor], Tensor]) -> Callable[[dict, dict], None]:
    return lambda header, tensors: tensors.update({name: to(tensors[name])})


def nested(levels: int) -> list:
    return [nested(levels - 1)] if levels else []


HEAD = ("layers", "net.head")
LAYER = {"kind": "Linear", "bits": 5, "expand": True, "settings": {}, "weights": {}}
FORGED = {
    "newer": (setting("format", to=8), "wrote it in format 8, newer than 7: upgrade torch-ocs"),
    "format of another type": (setting("format", to="1"), "header is damaged"),
    "format zero": (setting("format", to=0), "header is damaged"),
    "format of no number": (setting("format", to=True), "header is damaged"),
    "no sums": (setting("tensors", to="ab"), "header is damaged"),
    "no layers": (setting("layers", to=[]), "header is damaged"),
    "bits as text": (setting(*HEAD, "bits", to="5"), "header is damaged"),
    "bits out of range": (setting(*HEAD, "bits", to=64), "header is damaged"),
    "bits as bool": (setting(*HEAD, "bits", to=True), "header is damaged"),
    "other bits": (setting(*HEAD, "bits", to=4), "net.head.weight_int is .* the model needs"),
    "input of another type": (setting(*HEAD, "input", to=[4]), "header is damaged"),
    "shapes of another type": (setting(*HEAD, "weights", to={"weight": 5}), "header is damaged"),
    "shapes of no numbers": (setting(*HEAD, "weights", to={"weight": [[5], True]}), "header is damaged"),
    "bits of many digits": (setting(*HEAD, "bits", to=10**4000), "header is damaged"),
    "a norm's name of another type": (setting("batch_norms", to=[["bn"]]), "header is damaged"),
    "norms of another type": (setting("batch_norms", to={"bn": 1}), "header is damaged"),
    "norms of nothing": (setting("batch_norms", to=None), "header is damaged"),
    "a norm that is none": (setting("batch_norms", to=["net.head"]), "no batch norm 'net.head' to fold"),
    "nested in the settings": (setting(*HEAD, "settings", "clip", to=nested(900)), "header is damaged"),
    "nested in the input": (setting(*HEAD, "input", to={"bits": nested(900)}), "header is damaged"),
    "nested elsewhere": (setting("more", to=nested(17)), "header is damaged"),
    "unknown field": (setting(*HEAD, "code", to="import os"), "header is damaged"),
    "another kind": (setting(*HEAD, "kind", to="GRU"), "net.head: it was saved from another GRU than this Linear"),
    "another weight": (setting(*HEAD, "weights", to={"bias": [5]}), "net.head: it was saved from another Linear"),
    "tied to another": (setting(*HEAD, "tied", to="net.stem"), "net.head: .* this one is tied to another layer"),
    "tied to a number": (setting(*HEAD, "tied", to=3), "header is damaged"),
    "an unknown layer": (setting("layers", "net.tail", to=LAYER), "has no layer 'net.tail'"),
    "the root": (setting("layers", "", to=LAYER), "has no layer ''"),
    "a container": (setting("layers", "net", to=LAYER), "has no layer 'net'"),
    "a tied layer": (setting("layers", "decoder", to=LAYER), "decoder: .* its weight is shared"),
    "huge shape": (setting(*HEAD, "weights", to={"weight": [2**40, 2**40]}), "the model needs"),
    "too many copies": (tensor("net.head.source", lambda t: torch.zeros(17, dtype=torch.int32)), "17 copies of 16"),
    "copies of nothing": (tensor("net.head.source", lambda t: t + 100), "net.head.source is no split plan"),
    "negative copies": (tensor("net.head.source", lambda t: t - 100), "net.head.source is no split plan"),
    "copies as floats": (tensor("net.head.source", lambda t: t.float()), "net.head.source is not I32"),
    "copies in two dimensions": (tensor("net.head.source", lambda t: t[:, None]), "the model needs"),
    "scale zero": (tensor("net.head.scale", torch.zeros_like), "net.head.scale is not positive"),
    "scale NaN": (tensor("net.head.scale", lambda t: t * torch.nan), "net.head.scale is not positive"),
    "many scales": (tensor("net.head.scale", lambda t: t.repeat(6)), r"net.head.scale is \[6\], the model needs \[5\]"),
    "codes of no integer": (tensor("net.head.weight_int", lambda t: t | 255), "weight_int is not of 5-bit integers"),
    "packed as signed": (tensor("net.head.weight_int", lambda t: t.view(torch.int8)), "weight_int is not U8"),
    "directions differ": (lambda header, tensors: (
        tensors.update({"lstm.source_hh_l0_reverse": torch.zeros(3, dtype=torch.int32),
                        "lstm.weight_hh_l0_reverse_int": torch.zeros(48 * 15 * 3 // 8, dtype=torch.uint8)}),
        header["layers"]["lstm"]["weights"].update(weight_hh_l0_reverse=[48, 15])), "different numbers of splits"),
    "missing tensor": (lambda header, tensors: tensors.pop("net.stem.weight"), "it has no net.stem.weight"),
    "missing integers": (lambda header, tensors: tensors.pop("net.head.weight_int"), "it has no net.head.weight_int"),
    "missing copies": (lambda header, tensors: tensors.pop("net.head.source"), "it has no net.head.source"),
    "one tensor more": (lambda header, tensors: tensors.update(x=torch.zeros(1)), "it has besides x"),
    "another shape": (tensor("net.stem.bias", lambda t: t[:3]), r"net.stem.bias is \[3\], the model needs \[8\]"),
    "no elements": (tensor("net.stem.bias", lambda t: torch.zeros(2**40, 0)), "the model needs"),
    "another dtype": (tensor("steps", lambda t: t.float()), "steps is torch.float32, the model has torch.int64"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
def test_forged(saved: tuple[nn.Module, Path], case: str) -> None:
    change, message = FORGED[case]
    forge(saved[1], change)
    load_fails(saved[1], message)


def test_a_forgery_that_changes_nothing_loads(saved: tuple[nn.Module, Path]) -> None:
    """What the others prove rests on this."""
    forge(saved[1], lambda header, tensors: None)
    assert_same_model(ocs.load(saved[1], fresh()), saved[0])


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    load_fails(path, "it was not written by ocs.save")
    torch.save({"a": torch.zeros(1)}, path)
    load_fails(path, "no complete safetensors file")
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata={"ocs": "[" * 100_000})
    load_fails(path, "header is damaged")
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata={"ocs": "1" * 5000})
    load_fails(path, "header is damaged")
    header = json.dumps({"a": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    load_fails(path, "no complete safetensors file")
    path.write_bytes(struct.pack("<Q", 2**60))
    load_fails(path, "no complete safetensors file")


def test_another_model(saved: tuple[nn.Module, Path]) -> None:
    load_fails(saved[1], "this one has no layer", nn.Sequential(nn.Linear(3, 3)))
    wider = fresh()
    wider.net.head = nn.Linear(17, 5)
    load_fails(saved[1], r"net.head: weight is \[5, 18\], the model needs \[5, 19\]", wider)
    untied = fresh()
    untied.decoder.weight = nn.Parameter(torch.zeros(20, 12))
    load_fails(saved[1], "saved from another model: it has no decoder.weight", untied)
    quantized = fresh()
    ocs.quantize(quantized)
    load_fails(saved[1], "already quantized", quantized)


@pytest.mark.parametrize("at", range(0, 25, 3))
def test_a_failure_while_the_model_is_changed_is_undone(
    saved: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """At the first copied tensor, in the middle, and when the layers are put in place."""
    model, calls, copy_ = fresh(), [], Tensor.copy_
    before = state(model)
    ours = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}

    def fail_at(self: Tensor, *args: Any) -> Tensor:
        if self.data_ptr() in ours:
            calls.append(self)
            if len(calls) == at + 1:
                raise KeyboardInterrupt
        return copy_(self, *args)

    monkeypatch.setattr(Tensor, "copy_", fail_at)
    with pytest.raises(KeyboardInterrupt):
        ocs.load(saved[1], model)
    assert_unchanged(model, before)


def test_a_failure_in_the_last_step_is_undone(saved: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    before = state(model)
    monkeypatch.setattr(storage, "exchange", lambda slots, values: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ocs.load(saved[1], model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("progress", [True, False])
def test_progress(saved: tuple[nn.Module, Path], progress: bool, capsys: pytest.CaptureFixture[str]) -> None:
    ocs.save(saved[0], saved[1], progress=progress)
    ocs.load(saved[1], fresh(), progress=progress)
    error = capsys.readouterr().err
    assert ("save" in error) == ("load" in error) == progress
