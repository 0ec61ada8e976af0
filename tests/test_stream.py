"""ocs.quantize_file: the result of quantize and save, of files that memory never holds, however often it is stopped."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Everything, header_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ocs
from ocs.formats.source import INDEX
from ocs.stream import execute as stream
from ocs.stream.execute import WORK

OPTIONS = {"wbits": 4, "r": 0.1}
SHARDS = 3000  # bytes


def everything() -> Everything:
    torch.manual_seed(0)
    return Everything().eval()


def on_meta() -> nn.Module:
    """Everything without values, tied as it is; what it makes of arrays is left out."""
    model = everything()
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    memo = {
        key: nn.Parameter(tensor.to("meta"), tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else tensor.to("meta")
        for key, tensor in tensors.items()
    }
    return copy.deepcopy(model, memo)


def write_files(model: nn.Module, folder: Path, count: int = 3) -> Path:
    """Write a model as Hugging Face does: each tensor once, in several files with an index."""
    folder.mkdir(exist_ok=True)
    once = {id(tensor): (name, tensor) for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    where = {}
    for i, (name, _) in enumerate(once.values()):
        where[name] = f"model-{i % count}.safetensors"
    for file in set(where.values()):
        save_file({n: t.detach().clone() for n, t in once.values() if where[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write_files(everything(), tmp_path / "float")


def run(files: Path, out: Path, **options: Any) -> ocs.Report:
    return ocs.quantize_file(on_meta(), out, weights=files, **{"shard_size": SHARDS, **OPTIONS, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: each for path in folder.glob("*.safetensors") for name, each in load_file(path).items()}


def lines_of(report: ocs.Report) -> list[dict[str, Any]]:
    """What a report says of each weight, of several scales the ends."""
    ends = lambda x: [min(x), max(x)] if isinstance(x, list) and x else x  # noqa: E731
    lines = report.to_dict()["layers"]
    return [line | {name: ends(line[name]) for name in ("scale", "threshold")} for line in lines]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recipe": "best", "embeddings": True, "skip": None},
        {"granularity": "group", "group": 32, "split": "even", "expand": False},
        {"abits": 8, "act_scale": "dynamic", "skip": ["net.*", "up"], "overrides": {"lstm": {"wbits": 7}}},
    ],
    ids=["paper", "best", "groups", "dynamic"],
)
def test_the_result_is_that_of_the_whole_model(files: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model, meta = everything(), on_meta()
    before = repr(meta), [id(each) for each in [*meta.modules(), *meta.parameters(), *meta.buffers()]]
    report = ocs.quantize_file(meta, tmp_path / "out", weights=files, shard_size=SHARDS, **OPTIONS | options)
    assert before == (repr(meta), [id(each) for each in [*meta.modules(), *meta.parameters(), *meta.buffers()]])
    whole = ocs.quantize(model, **OPTIONS | options)
    ocs.save(model, tmp_path / "saved")
    saved, found = load_file(tmp_path / "saved"), tensors_of(tmp_path / "out")
    assert saved.keys() == found.keys()
    assert all(torch.equal(each, found[name]) and each.dtype == found[name].dtype for name, each in saved.items())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    assert all(header_of(path) == header_of(tmp_path / "saved") for path in shards)
    assert all(path.stat().st_size - SHARDS < 40_000 for path in shards)  # the header comes besides
    assert lines_of(report) == lines_of(whole)
    assert report.settings == whole.settings
    for name in ("model_bytes", "weight_bytes", "float_weight_bytes", "packed_bytes"):
        assert getattr(report, name) == getattr(whole, name)
    assert report.file_bytes == sum(path.stat().st_size for path in shards)


@pytest.mark.parametrize("packed", [False, True])
def test_load_reads_the_folder(files: Path, tmp_path: Path, packed: bool) -> None:
    run(files, tmp_path / "out")
    model, images = everything(), Everything.inputs()
    ocs.quantize(model, **OPTIONS)
    ocs.save(model, tmp_path / "saved")
    found = ocs.load(tmp_path / "out", everything(), packed=packed)
    expected = ocs.load(tmp_path / "saved", everything(), packed=packed)
    assert all(torch.equal(a, b) for a, b in zip(found(*images), expected(*images), strict=True))


def test_one_file_has_no_index_and_one_file_is_read(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4, bias=False)).to(torch.bfloat16)
    save_file(net.state_dict(), tmp_path / "any.safetensors")
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4, bias=False)).to(torch.bfloat16)
    ocs.quantize_file(meta, tmp_path / "out", weights=tmp_path / "any.safetensors", wbits=3)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    ocs.quantize(net, wbits=3)
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    assert torch.equal(ocs.load(tmp_path / "out", copy.deepcopy(meta))(x), net(x))


def test_weights_have_the_dtype_of_the_model(tmp_path: Path) -> None:
    """As load_state_dict casts them: once to float16, and that is quantized."""
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Linear(40, 40), nn.Embedding(10, 4), nn.LayerNorm(40))  # noqa: E731
    save_file(make().state_dict(), tmp_path / "model.safetensors")
    model = make().half()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    ocs.quantize(model, wbits=8, granularity="channel")
    ocs.save(model, tmp_path / "saved")
    with torch.device("meta"):
        meta = make().half()
    ocs.quantize_file(meta, tmp_path / "out", weights=tmp_path, wbits=8, granularity="channel")
    saved, found = load_file(tmp_path / "saved"), tensors_of(tmp_path / "out")
    assert all(torch.equal(each, found[name]) and each.dtype == found[name].dtype for name, each in saved.items())


# --- Stopped, and called again ----------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, os.environ["TESTS"])
from pathlib import Path
from test_stream import WORK, run
from ocs.stream import execute as stream
from ocs.formats.layout import Layout

def killing(function, calls):
    def kills(*args, **kwargs):
        nonlocal calls
        calls -= 1
        if calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return kills

files, folder = Path(sys.argv[1]), Path(sys.argv[2])
run(files, folder.with_name("alone"))
places = [(stream, "_made", 1), (stream, "_made", 4), (Layout, "write", 7), (stream, "_read_units", 1),
          (Layout, "finish", 2), (Layout, "write_index", 1), (stream.shutil, "rmtree", 2)]
for owner, name, calls in places:
    child = os.fork()
    if child == 0:
        setattr(owner, name, killing(getattr(owner, name), calls))
        run(files, folder)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, name
    shards = [path.name for path in folder.glob("*.safetensors")]
    print(name, sum(path.suffix == ".json" for path in (folder / WORK).iterdir()), len(shards))
os._exit(0)
"""


def test_killed_at_any_time_it_goes_on(files: Path, tmp_path: Path) -> None:
    env = os.environ | {"TESTS": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(files), str(tmp_path / "out")]
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = [line.split() for line in done.stdout.splitlines()]
    made, shards = [int(each[1]) for each in told], [int(each[2]) for each in told]
    assert made[:3] == [1, 4, 10]  # the record, and what each had made on top of what it found
    assert shards[:4] == [0] * 4  # none under its name before all is there
    assert shards[4:] == [1, 4, 4]  # of four, then without an index, then with it
    made_again = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_made", lambda *args: made_again.append(args))
        run(files, tmp_path / "out")
    assert not made_again
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


class StoppedError(Exception):
    """Raised on the way."""


def stopped(files: Path, out: Path, units: int = 3, **options: Any) -> None:
    """Quantize so many units and stop."""
    made, calls = stream._made, []

    def stops(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > units:
            raise StoppedError
        return made(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_made", stops)
        with pytest.raises(StoppedError):
            run(files, out, **options)


def test_it_goes_on_with_the_same_alone(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(files, out)
    before = contents(out / WORK)
    for options, says in (
        ({"wbits": 5}, "other options: wbits 4, now 5"),
        ({"skip": None}, "other options: skip"),
        ({"overrides": {"cell": {"wbits": 8}}}, "other options: overrides"),
        ({"shard_size": 7000}, "other places: "),
    ):
        with pytest.raises(ValueError, match=f"out: what is unfinished there was begun with {says}.*remove .*{WORK}"):
            run(files, out, **options)
    os.utime(files / "model-1.safetensors", (0, 0))
    with pytest.raises(ValueError, match=r"other files: model-1\.safetensors"):
        run(files, out)
    assert contents(out / WORK) == before


def test_what_was_damaged_meanwhile_is_made_again(files: Path, tmp_path: Path) -> None:
    """Where the machine stopped, not only the process."""
    out = tmp_path / "out"
    stopped(files, out, units=6)
    record, kept = out / WORK / "record.json", (out / WORK / "record.json").read_text()
    for damaged in ("", "[]"):
        record.write_text(damaged)
        with pytest.raises(ValueError, match=rf"record\.json: it is damaged: remove .*{WORK}, and begin again"):
            run(files, out)
    record.write_text(kept)
    (out / WORK / "unit-00002.json").write_text("")
    (out / WORK / "unit-00003.json").write_text("[]")
    shard = next(path for path in sorted((out / WORK).glob("*.safetensors")) if path.read_bytes().strip(b"\0"))
    data = shard.read_bytes()
    shard.write_bytes(bytes(len(data)))
    run(files, out)
    run(files, tmp_path / "alone")
    assert contents(out) == contents(tmp_path / "alone")


def test_a_full_disk_is_an_error_and_no_end(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, write, calls = tmp_path / "out", os.pwrite, []

    def full(*args: Any) -> int:
        calls.append(args)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*model-0000\d-of-0000\d\.safetensors'"):
            run(files, out)
    assert not [*out.glob("*.safetensors")]
    run(files, out)
    run(files, tmp_path / "alone")
    assert contents(out) == contents(tmp_path / "alone")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 99))
        with pytest.raises(OSError, match=r"GB are to be written, the disk has 9\.9e-08 GB left"):
            run(files, tmp_path / "other")


def test_one_call_at_a_time_writes_to_a_folder(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, end, refused, children = tmp_path / "out", stream._end, [], []

    def another_call(*args: Any) -> None:
        with pytest.raises(BlockingIOError, match="out: another process is writing there") as caught:
            run(files, out)
        refused.append(caught)
        if not (child := os.fork()):  # as a DataLoader's worker, which stays
            time.sleep(60)
            os._exit(0)
        children.append(child)
        end(*args)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "_end", another_call)
        run(files, out)
    assert len(refused) == 1
    run(files, tmp_path / "alone")
    assert contents(out) == contents(tmp_path / "alone")
    with pytest.raises(FileExistsError, match="it holds a model already"):
        run(files, out)
    os.kill(children[0], signal.SIGKILL)
    os.waitpid(children[0], 0)


# --- Several ranks ----------------------------------------------------------------------------------------------------


NETS = """
import atexit, os, torch, test_stream
def make():
    atexit.register(lambda: os.system(f"cat /proc/{os.getpid()}/task/*/comm >&2"))
    with torch.device("cpu"):
        return test_stream.on_meta()
"""


def test_two_ranks_share_the_layers(files: Path, tmp_path: Path) -> None:
    """What torchrun starts, on the command line; the result is that of one process."""
    run(files, tmp_path / "alone")
    (tmp_path / "nets.py").write_text(NETS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--", "ocs"]
    options = ["--weights", str(files), "--stream", "-o", "out", "--wbits", "4", "--r", "0.1", "--json"]
    options += ["--shard-size", str(SHARDS)]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "quantize", "nets:make", *options], env=env, cwd=tmp_path, check=False,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "python" in done.stderr
    assert "gloo" not in done.stderr  # the group's threads have ended
    assert json.loads(done.stdout)["totals"]["quantized_layers"] == 9  # of one of them
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert len(contents(tmp_path / "out")) == 5


def test_work_is_shared_evenly_whoever_is_there() -> None:
    sizes = [100, 1, 1, 50, 50, 3]
    for ranks in (1, 2, 3, 7):
        shared = stream._shared(sizes, ranks)
        loads = [sum(size for size, rank in zip(sizes, shared, strict=True) if rank == each) for each in range(ranks)]
        assert sum(loads) == sum(sizes)
        assert max(loads) <= sum(sizes) / ranks + max(sizes)
    assert set(stream._shared(sizes, 2)) == {0, 1}


# --- Memory -----------------------------------------------------------------------------------------------------------

MEMORY = """
import json, struct, sys, torch, ocs
from pathlib import Path
from torch import nn

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

folder, layers, size = Path(sys.argv[1]), 40, 2048 * 2048
with torch.device("meta"):
    net = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(layers))).bfloat16()
header = {f"{i}.weight": {"dtype": "BF16", "shape": [2048, 2048], "data_offsets": [2 * size * i, 2 * size * (i + 1)]}
          for i in range(layers)}
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
with open(folder / "model.safetensors", "wb") as file:  # zeros that take no room
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(8 + len(text) + 2 * size * layers)
before = status("VmRSS")
ocs.quantize_file(net, folder / "out", weights=folder, wbits=4, r=0.01)
print(status("VmHWM") - before, 2 * size, 2 * size * layers)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_holds_one_layer(tmp_path: Path) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], env=env, check=True, capture_output=True)
    peak, layer, model = map(int, done.stdout.split())
    assert peak < 2 * layer + 500e6
    assert peak < 0.5 * model  # no bound that any model would keep
