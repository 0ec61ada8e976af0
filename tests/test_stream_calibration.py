"""ocs.quantize_file with calibration: the result of quantize and save, of a model whose weights stay in files."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Everything, header_of
from safetensors.torch import load_file, save_file
from test_stream import SHARDS, StoppedError, contents, everything, lines_of, on_meta, tensors_of, write_files
from torch import Tensor, nn

import ocs
from ocs.formats.source import Source
from ocs.stream import execute as stream
from ocs.stream.execute import WORK
from ocs.stream.observed import Spilled, checksum


class Decoder(nn.Module):
    """A small decoder that does what models do with weights: it uses them by itself, twice, as views, asks for them."""

    runs = 0

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(30, 16), nn.Linear(16, 30, bias=False)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(16, 48, bias=False), "out": nn.Linear(16, 16), "norm": nn.RMSNorm(16)})
            for _ in range(3)
        )
        self.shared, self.down, self.unused = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 2)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        """Numbers of words [N, T] -> logits [N, T, 30]."""
        Decoder.runs += isinstance(words, Tensor)  # not traced
        assert self.head.weight.device == words.device == next(self.parameters()).device
        assert self.head.weight.is_cpu
        first = x = self.words(words)
        for block in self.blocks:
            q, k, v = block["qkv"](block["norm"](x)).chunk(3, -1)
            x = x + block["out"](F.scaled_dot_product_attention(q, k, v, is_causal=True))
            x = x + self.down(self.shared(x).relu())
        x = x + first @ self.blocks[0]["out"].weight.T + F.linear(x, weight=self.blocks[1]["out"].weight)
        return self.head(x)


def decoder() -> Decoder:
    torch.manual_seed(1)
    return Decoder().eval()


def decoder_on_meta() -> Decoder:
    with torch.device("meta"):
        return Decoder().eval()


def with_buffers() -> nn.Module:
    """Everything on the meta device, but for what no file has."""
    model = on_meta()
    model.scratch = torch.zeros(2)
    return model


def words(count: int = 4) -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randint(30, (2, 9)) for _ in range(count)]


def pictures() -> list[dict[str, Tensor]]:
    torch.manual_seed(3)
    return [dict(zip(("image", "words"), Everything.inputs(), strict=True)) for _ in range(3)]


GPTQ = {"wbits": 4, "r": 0.1, "rounding": "gptq"}
OPTIONS = {
    "gptq": GPTQ,
    "static": {"wbits": 4, "abits": 8, "act_clip": "mse"},
    "splits": {"abits": 8, "act_r": 0.1, "act_select": "max", "act_signed": "auto"},
    "splits by error": {"abits": 4, "act_r": 0.3, "act_select": "error", "act_clip": "mse", "act_signed": "auto"},
    "rows": {
        "wbits": 4, "abits": 8, "act_scale": "dynamic", "act_r": 0.1, "skip": ["net.*", "up"],
        "overrides": {"lstm": {"abits": 8}},
    },
    "best": {"wbits": 3, "r": 0.1, "recipe": "best", "rounding": "gptq", "abits": 8, "act_r": 0.1, "embeddings": True},
    "bias": {"wbits": 3, "correct_bias": True},
}  # fmt: skip


def check_same(out: Path, report: ocs.Report, model: nn.Module, data: Any, **options: Any) -> None:
    """Compare with what quantize and save give."""
    whole = ocs.quantize(model, calibration=data, **options)
    ocs.save(model, out.with_name("saved"))
    saved, found = load_file(out.with_name("saved")), tensors_of(out)
    assert saved.keys() == found.keys()
    assert all(torch.equal(each, found[name]) and each.dtype == found[name].dtype for name, each in saved.items())
    assert all(header_of(path) == header_of(out.with_name("saved")) for path in out.glob("*.safetensors"))
    assert lines_of(report) == lines_of(whole)
    assert [path.name for path in out.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_result_is_that_of_the_whole_model(tmp_path: Path, options: dict[str, Any]) -> None:
    files, out, data = write_files(everything(), tmp_path / "float"), tmp_path / "out", pictures()
    report = ocs.quantize_file(with_buffers(), out, weights=files, shard_size=SHARDS, calibration=data, **options)
    check_same(out, report, everything(), data, **options)


@pytest.mark.parametrize(
    ("options", "how"),
    [(GPTQ, list), (OPTIONS["best"], iter), (GPTQ, lambda data: lambda model: [model(each) for each in data])],
    ids=["list", "iterator", "callable"],
)
def test_whatever_a_model_does_with_its_weights(
    tmp_path: Path, options: dict[str, Any], how: Callable[[Any], Any]
) -> None:
    files, out = write_files(decoder(), tmp_path / "float"), tmp_path / "out"
    report = ocs.quantize_file(decoder_on_meta(), out, weights=files, calibration=how(words()), **options)
    check_same(out, report, decoder(), how(words()), **options)


def test_correct_bias_needs_no_inputs_where_norms_tell(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, bias=False))
        nn.init.normal_(net[1].bias)
        return net.eval()

    save_file(make().state_dict(), tmp_path / "float")
    report = ocs.quantize_file(make().to("meta"), tmp_path / "out", weights=tmp_path / "float", correct_bias=True)
    assert tensors_of(tmp_path / "out")["3.bias"].shape == (6,)
    check_same(tmp_path / "out", report, make(), None, correct_bias=True)


# --- Memory -----------------------------------------------------------------------------------------------------------


def test_memory_holds_two_weights_and_what_is_seen_of_one_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the model runs; tensors that are alive are counted."""
    make = lambda: nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(12)))  # noqa: E731
    save_file(make().state_dict(), tmp_path / "float")
    alive: list[weakref.ref[Tensor]] = []
    spilled: list[int] = []
    read, load = Source.read, Spilled.load

    def reading(self: Source, *args: Any) -> Tensor:
        assert sum(each() is not None for each in alive) <= 1
        alive.append(weakref.ref(value := read(self, *args)))
        return value

    def loading(self: Spilled) -> None:
        load(self)
        spilled.append(sum(each._sums is not None for each in moments()))

    def moments() -> Iterator[Any]:
        return (part for _, each in watched[0].spilled.values() for part in each.parts)

    watched: list[Any] = []
    run = stream.Observed.run
    monkeypatch.setattr(stream.Observed, "run", lambda self, *args: watched.append(self) or run(self, *args))
    monkeypatch.setattr(Source, "read", reading)
    monkeypatch.setattr(Spilled, "load", loading)
    with monkeypatch.context() as patch:
        patch.setattr(stream, "_made", lambda *args: pytest.fail("calibrated"))
        with pytest.raises(pytest.fail.Exception):
            ocs.quantize_file(
                make().to("meta"), tmp_path / "out", weights=tmp_path / "float", skip=None, wbits=4, rounding="gptq",
                calibration=[torch.randn(8, 64) for _ in range(2)],
            )  # fmt: skip
    assert len(alive) == 24  # each weight for each batch
    assert max(spilled) == 1
    assert all(each._sums is None for each in moments())


# --- Stopped, and called again ----------------------------------------------------------------------------------------


def stopping(data: list[Any], after: int) -> Iterator[Any]:
    yield from data[:after]
    raise StoppedError


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write_files(decoder(), tmp_path / "float")


def run(files: Path, out: Path, data: Any, **options: Any) -> int:
    """Quantize, and tell how often the model ran."""
    before = Decoder.runs
    ocs.quantize_file(decoder_on_meta(), out, weights=files, shard_size=SHARDS, calibration=data, **options)
    return Decoder.runs - before


@pytest.mark.parametrize("options", [GPTQ, OPTIONS["best"]], ids=["gptq", "best"])
def test_it_goes_on_with_the_batch_where_it_stopped(
    files: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run(files, tmp_path / "alone", words(), **options) == 4
    for after in (0, 2, 3):
        with pytest.raises(StoppedError):
            run(files, out, stopping(words(), after), **options)
    with monkeypatch.context() as patch:
        patch.setattr(stream, "_made", lambda *args: stopping([], 0).__next__())
        with pytest.raises(StoppedError):
            run(files, out, words(), **options)
    before = Decoder.runs
    assert run(files, out, words(), **options) == 0  # it is calibrated
    assert Decoder.runs == before
    assert contents(out) == contents(tmp_path / "alone")


def test_batches_that_were_stopped_on_the_way_count_once(files: Path, tmp_path: Path) -> None:
    """An error in the middle of a batch, when some layers have seen it: nothing of it stays."""
    out, calls = tmp_path / "out", []

    def broken(self: Spilled, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 30:
            raise StoppedError
        observe(self, *args)

    observe = Spilled.observe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Spilled, "observe", broken)
        with pytest.raises(StoppedError):
            run(files, out, words(), **GPTQ)
    assert 0 < run(files, out, words(), **GPTQ) < 4
    run(files, tmp_path / "alone", words(), **GPTQ)
    assert contents(out) == contents(tmp_path / "alone")


def test_what_was_damaged_meanwhile_is_seen_again(files: Path, tmp_path: Path) -> None:
    """Where the machine stopped, not only the process."""
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        run(files, out, stopping(words(), 3), **GPTQ)
    path = max((out / WORK / "calibration-0").glob("*.npy"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-4] + b"1234")
    assert run(files, out, words(), **GPTQ) == 4
    run(files, tmp_path / "alone", words(), **GPTQ)
    assert contents(out) == contents(tmp_path / "alone")


def test_a_full_disk_is_an_error_that_names_the_file(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr("numpy.save", full)
        with pytest.raises(OSError, match="No space left") as caught:
            run(files, tmp_path / "out", words(), **GPTQ)
    assert f"{WORK}/calibration-0/m0-0.0.npy: it cannot be written" in str(caught.value)
    assert run(files, tmp_path / "out", words(), **GPTQ) == 4


def test_it_goes_on_with_the_same_batches_alone(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, data = tmp_path / "out", words()
    with pytest.raises(StoppedError):
        run(files, out, stopping(data, 3), **GPTQ)
    other = [data[0], data[1] + 0, data[1], data[3]]
    other[1][0, 0] += 1
    for wrong, says in ((other, "batch 1 is another one"), (data[:1], "there were 2 batches and more, not 1")):
        with pytest.raises(
            ValueError, match=f"begun with other calibration: {says}; give the same.*or remove .*{WORK}"
        ):
            run(files, out, wrong, **GPTQ)
    with pytest.raises(ValueError, match="other options: wbits 4, now 5"):
        run(files, out, data, **GPTQ | {"wbits": 5})
    with pytest.raises(ValueError, match="needs calibration="):
        run(files, out, None, **GPTQ)
    with monkeypatch.context() as patch:
        patch.setattr(stream, "_made", lambda *args: stopping([], 0).__next__())
        with pytest.raises(StoppedError):
            run(files, out, data, **GPTQ)
    with pytest.raises(ValueError, match="there were 4 batches, and now there are more"):
        run(files, out, words(5), **GPTQ)
    run(files, out, data, **GPTQ)


def test_checksums_tell_batches_apart() -> None:
    x = torch.arange(6.0)
    batches = [x, x.double(), x.view(2, 3), (x, x), [x, 1], {"a": x}, {"b": x}, x + 1, torch.empty(0), torch.tensor(1)]
    assert len({checksum(each) for each in batches}) == len(batches)
    assert checksum(x.view(2, 3).T) == checksum(x.view(2, 3).T.contiguous())
    assert checksum((x, object())) == checksum((x, object()))  # of which nothing can be said


# --- Several ranks ----------------------------------------------------------------------------------------------------

RANKS = """
import os, sys
sys.path.insert(0, os.environ["TESTS"])
import torch._dynamo  # imported later, as initial values on meta do, it would keep the group to the end
import torch.distributed as dist
from test_stream_calibration import *

dist.init_process_group("gloo")
files, out = Path(sys.argv[1]), Path(sys.argv[2])
own, made, options = words()[dist.get_rank() :: 2], stream._made, OPTIONS["best"]
stream._made = lambda *args: stopping([], 0).__next__()
with pytest.raises(StoppedError):
    run(files, out, own, **options)
stream._made = made
assert run(files, out, own, **options) == 0
model = decoder()
ocs.quantize(model, calibration=own, **options)
if dist.get_rank() == 0:
    ocs.save(model, out.with_name("saved"))
dist.destroy_process_group()
running = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
assert not any("gloo" in name for name in running), running  # who kept the group? Its threads may abort the process
"""


def test_ranks_give_batches_of_their_own(files: Path, tmp_path: Path) -> None:
    """As those of quantize; the result is that of quantize and save on the same ranks, stopped once or not."""
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = os.environ | {"PYTHONPATH": path, "TESTS": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, tmp_path / "ranks.py", files, tmp_path / "out"], env=env, check=False,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    saved, found = load_file(tmp_path / "saved"), tensors_of(tmp_path / "out")
    assert saved.keys() == found.keys()
    assert all(torch.equal(each, found[name]) for name, each in saved.items())


# --- What is refused --------------------------------------------------------------------------------------------------


def test_what_has_no_values_anywhere_is_refused_by_name(files: Path, tmp_path: Path) -> None:
    model = decoder_on_meta()
    model.blocks[1].register_buffer("mask", torch.zeros(3, device="meta"), persistent=False)
    with pytest.raises(ValueError, match=r"blocks\.1\.mask: calibration runs the model, where this has no values"):
        ocs.quantize_file(model, tmp_path / "out", weights=files, calibration=words(), **GPTQ)
    assert not (tmp_path / "out").exists()
    ocs.quantize_file(model, tmp_path / "out", weights=files, wbits=4)  # which does not run it
    model = decoder_on_meta()
    model.blocks[1]["norm"].register_forward_hook(lambda norm, args, y: y + torch.zeros(16, device="meta"))
    with pytest.raises(RuntimeError, match="meta") as caught:
        ocs.quantize_file(model, tmp_path / "other", weights=files, calibration=words(), **GPTQ)
    assert caught.value.__notes__[-1].endswith("make it a buffer")


def test_errors_name_the_batch_and_the_layer(files: Path, tmp_path: Path) -> None:
    with pytest.raises(IndexError, match="index out of range") as caught:
        run(files, tmp_path / "out", [*words(1), torch.full((2, 9), 30)], **GPTQ)
    assert "calibration, batch 1" in "".join(caught.value.__notes__)
    with pytest.raises(ValueError, match="calibration is empty"):
        run(files, tmp_path / "other", [], **GPTQ)
    with pytest.raises(TypeError, match="calibration="):
        run(files, tmp_path / "third", {"words": words(1)[0]}, **GPTQ)
