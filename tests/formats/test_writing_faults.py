"""Full disks, read-only folders and kills, for all that writes files: who looks sees the old file or the new one.

The faults happen in processes that a fresh one forks, which has one thread: this module, run as a program.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

MANY = bool(os.environ.get("OCS_FAULTS"))
KILLS = 30 if MANY else 4
WRITERS = ["save", "report.json", "report.html", "comparison.json", "program.pt2", "model.onnx", "save_pretrained"]
NEEDS = {"model.onnx": "onnxscript", "save_pretrained": "transformers"}
if MANY:
    WRITERS.append("package.pt2")  # compiled for ten seconds, each time
FAULTS = ["full disk", "full disk at the end", "read-only folder", "killed"]


@pytest.mark.parametrize("name", WRITERS)
def test_old_or_new(name: str) -> None:
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, __file__, name]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == FAULTS


# --- What writes, and what is read again ------------------------------------------------------------------------------


class Writer(NamedTuple):
    """How version 0 or 1 of something is written to a path, and which one a path has; an error where neither."""

    write: Callable[[Path, int], Any]
    read: Callable[[Path], int]


def writer_of(name: str) -> Writer:
    import torch
    from torch import nn

    import ocs

    def model(version: int) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 8), nn.Embedding(100_000, 1) if name == "save" else nn.Linear(8, 300))
        nn.init.constant_(net[0].bias, version)
        with torch.no_grad():
            net[1].weight += version
        ocs.quantize(net, wbits=4 + version, skip=None, overrides={"1": {"wbits": 8}})
        return net

    def version_of(values: torch.Tensor) -> int:
        (found,) = values.unique().tolist()
        return int(found)

    x, models = torch.ones(2, 8), (model(0), model(1))
    if name == "save":
        from safetensors.torch import load_file

        return Writer(lambda path, v: ocs.save(models[v], path), lambda path: version_of(load_file(path)["0.bias"]))
    if name.startswith("report"):
        reports = [ocs.quantize(nn.Sequential(nn.Linear(8, 8)), wbits=4 + v, skip=None) for v in (0, 1)]

        def read(path: Path) -> int:
            text = path.read_text()
            found = [v for v, report in enumerate(reports) if text in (report.to_json(), report.to_html())]
            return found[0]

        return Writer(lambda path, v: reports[v].save(path), read)
    if name.startswith("comparison"):
        compared = [ocs.compare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 300)), each, [x]) for each in models]
        texts = [each.to_json() for each in compared]
        return Writer(lambda path, v: compared[v].save(path), lambda path: texts.index(path.read_text()))
    if name == "model.onnx":
        import onnx

        def bias(path: Path) -> int:
            found = {each.name: each for each in onnx.load(path).graph.initializer}
            return version_of(torch.tensor(onnx.numpy_helper.to_array(found["0.bias"])))

        return Writer(lambda path, v: ocs.export(models[v], path, x), bias)
    if name == "program.pt2":
        return Writer(
            lambda path, v: ocs.export(models[v], path, x, form="program"),
            lambda path: version_of(torch.export.load(path).state_dict["0.bias"]),
        )
    if name == "package.pt2":
        expected = [each(x) for each in models]

        def run(path: Path) -> int:
            y = torch._inductor.aoti_load_package(str(path))(x)
            return [bool(torch.allclose(y, each, atol=1e-3)) for each in expected].index(True)

        return Writer(lambda path, v: ocs.export(models[v], path, x), run)
    return pretrained()


def pretrained() -> Writer:
    import torch
    import transformers

    import ocs.hf

    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    models = []
    for version in (0, 1):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for norm in (each for each in model.modules() if type(each).__name__ == "LlamaRMSNorm"):
                norm.weight.fill_(version)
        ocs.quantize(model, wbits=4, skip=None)
        models.append(ocs.hf.OcsConfig(wbits=4).attach(model))

    def read(path: Path) -> int:
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        norms = [each.weight for name, each in model.named_modules() if type(each).__name__ == "LlamaRMSNorm"]
        (found,) = torch.cat(norms).unique().tolist()
        return int(found)

    return Writer(lambda path, v: models[v].save_pretrained(path, max_shard_size="20KB"), read)


# --- What happens to them ---------------------------------------------------------------------------------------------


def in_child(body: Callable[[], object], kill_after: float | None = None) -> tuple[str, str]:
    """Run this in a process of its own, killed so long after it made a folder; gives an exception's kind and text."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        sys.addaudithook(lambda event, _: event == "os.mkdir" and os.write(writing, b"."))
        try:
            body()
            os.write(writing, json.dumps(["", ""]).encode())
        except BaseException as error:
            traceback.print_exc()
            os.write(
                writing, json.dumps([" ".join(each.__name__ for each in type(error).__mro__), str(error)]).encode()
            )
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        if kill_after is not None:
            pipe.read(1)
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        text = pipe.read().decode().lstrip(".")
    os.waitpid(child, 0)
    return tuple(json.loads(text)) if text else ("killed", "")


def limit_files(size: int) -> None:
    """No file may be larger: a full disk, but for the number of the error."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def size_of(path: Path) -> int:
    return max(each.stat().st_size for each in ([*path.rglob("*")] if path.is_dir() else [path]))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def check_refusal(writer: Writer, path: Path, prepare: Callable[[], object], needs_old: bool) -> None:
    """An OSError that names the path, all files as they were."""
    before = contents(path.parent)

    def body() -> None:
        prepare()
        writer.write(path, 1)

    kinds, text = in_child(body)
    assert "OSError" in kinds.split(), (kinds, text)
    assert str(path) in text, text
    if needs_old:
        assert contents(path.parent) == before
        assert not [*path.parent.glob(".ocs*")]


def main(name: str) -> None:
    writer, whole = writer_of(name), name != "save_pretrained"  # whose files transformers writes, one by one
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    path, done = folder / name, []
    started = time.monotonic()
    writer.write(path, 1)
    seconds = time.monotonic() - started
    size = size_of(path)
    assert writer.read(path) == 1
    writer.write(path, 0)
    for fault, limit in (("full disk", size // 3), ("full disk at the end", size - 1)):
        check_refusal(writer, path, lambda limit=limit: limit_files(limit), whole)
        done.append(fault)
        if not whole:
            writer.write(path, 0)

    def may_only_read() -> None:
        folder.chmod(0o555)
        for each in (path, *path.rglob("*")):
            each.chmod(0o755 if each.is_dir() else 0o444 if not whole else 0o666)
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)

    check_refusal(writer, path, may_only_read, whole)
    folder.chmod(0o755)
    for each in path.rglob("*"):
        each.chmod(0o644)
    done.append("read-only folder")
    chance, found = random.Random(0), []
    for _ in range(KILLS):
        in_child(lambda: writer.write(path, 1), kill_after=chance.uniform(0, 1.2 * seconds))
        if whole:
            found.append(writer.read(path))
        else:
            with suppress(OSError, ValueError):  # files of both versions, or half of one
                found.append(writer.read(path))
        writer.write(path, 0)
        assert writer.read(path) == 0
    assert set(found) <= {0, 1}
    assert not [*folder.glob(".ocs*")]
    done.append("killed")
    print(json.dumps(done))


if __name__ == "__main__":
    main(sys.argv[1])
