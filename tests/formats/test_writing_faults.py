"""Full disks, read-only folders and kills, for all that writes files: who looks sees the old file or the new one.

Each file is written in a fresh process, this module run as a program. Where writing begins it forks, once for each
fault, and looks at what that left.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

MANY = bool(os.environ.get("OCS_FAULTS"))
KILLS = 30 if MANY else 5
NEEDS = {"model.onnx": "onnxscript", "save_pretrained": "transformers"}


QUICK = ["save", "report.json", "report.html", "comparison.json", "program.pt2"]  # what starts within two seconds


@pytest.mark.parametrize("names", [QUICK, *[["model.onnx"], ["save_pretrained"], ["package.pt2"]] * MANY], ids=str)
def test_old_or_new(names: list[str]) -> None:
    if names[0] in NEEDS and importlib.util.find_spec(NEEDS[names[0]]) is None:
        pytest.skip(f"{NEEDS[names[0]]} is not installed")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, *names]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name}: {KILLS + 3} faults" for name in names]


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
        net = nn.Sequential(nn.Linear(8, 8), nn.Embedding(10**6, 1) if name == "save" else nn.Linear(8, 300))
        ocs.quantize(net, wbits=4 + version, skip=None)
        nn.init.constant_(net[0].bias, 1 + version)
        return net

    def version_of(bias: Any) -> int:
        (found,) = torch.as_tensor(bias).unique().tolist()
        return int(found) - 1

    x, models = torch.ones(2, 8), (model(0), model(1))

    def of_text(things: list[Any]) -> Writer:
        texts = [each.to_json() if name.endswith("json") else each.to_html() for each in things]
        return Writer(lambda path, v: things[v].save(path), lambda path: texts.index(path.read_text()))

    def of_model(read: Callable[[Path], int], **options: Any) -> Writer:
        return Writer(lambda path, v: ocs.export(models[v], path, x, **options), read)

    def read_onnx(path: Path) -> int:
        onnx = importlib.import_module("onnx")
        (bias,) = (each for each in onnx.load(path).graph.initializer if each.name == "0.bias")
        return version_of(onnx.numpy_helper.to_array(bias))

    def read_program(path: Path) -> int:
        return version_of(torch.export.load(path).state_dict["0.bias"].detach())

    def run_package(path: Path) -> int:
        y = torch._inductor.aoti_load_package(str(path))(x)
        return [torch.allclose(y, each(x), atol=1e-3) for each in models].index(True)

    def saved(path: Path) -> int:
        return version_of(importlib.import_module("safetensors.torch").load_file(path)["0.bias"])

    def compared() -> list[ocs.Comparison]:
        return [ocs.compare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 300)), each, [x]) for each in models]

    writers = {
        "save": lambda: Writer(lambda path, v: ocs.save(models[v], path), saved),
        "report": lambda: of_text([ocs.quantize(nn.Sequential(nn.Linear(8, 8)), wbits=bits) for bits in (4, 5)]),
        "comparison": lambda: of_text(compared()),
        "program": lambda: of_model(read_program, form="program"),
        "model": lambda: of_model(read_onnx),
        "package": lambda: of_model(run_package),
        "save_pretrained": pretrained,
    }  # fmt: skip
    return writers[Path(name).stem]()


def pretrained() -> Writer:
    """Of transformers, which writes one file after the other: whoever reads both versions' files must be told."""
    import torch
    import transformers

    import ocs.hf

    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )

    def norms(model: torch.nn.Module) -> list[torch.nn.Parameter]:
        return [parameter for name, parameter in model.named_parameters() if "norm" in name]

    def model(version: int) -> torch.nn.Module:
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(config)
        for each in norms(made):
            torch.nn.init.constant_(each, version)
        ocs.quantize(made, wbits=4, skip=None)
        return ocs.hf.OcsConfig(wbits=4).attach(made)

    def write(path: Path, version: int) -> None:
        with faulty(path):
            models[version].save_pretrained(path, max_shard_size="20KB")

    def read(path: Path) -> int:
        (found,) = torch.cat(norms(transformers.AutoModelForCausalLM.from_pretrained(path))).unique().tolist()
        return int(found)

    transformers.utils.logging.disable_progress_bar()  # its lock is shared with whoever is killed
    models = (model(0), model(1))
    return Writer(write, read)


# --- What happens to them ---------------------------------------------------------------------------------------------

rounds: list[Callable[[Path], None]] = []  # what is tried where writing begins
child_pipe = 0  # of a forked process: what it tells
replacing: Callable[[Path], Any] = nullcontext


@contextmanager
def faulty(path: Path) -> Iterator[Any]:
    """Write to a path as ocs.replace_file.replacing does, after each fault was tried in a process of its own."""
    while rounds and not child_pipe:
        rounds.pop()(Path(path))
    with replacing(path) as partial:
        yield partial


def fork(body: Callable[[], object]) -> tuple[int, Any]:
    """Start a process that goes on from here: its number, and what it will say of how that ended."""
    global child_pipe  # noqa: PLW0603
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, os.fdopen(reading, "rb")
    child_pipe = writing
    sys.addaudithook(lambda event, _: event == "os.mkdir" and os.write(writing, b" "))
    body()
    return 0, None


def say_and_exit(kinds: list[str], text: str) -> None:
    """Say how it ended, once all is let go of that the error held: torch's writers may end the process then."""
    gc.collect()
    os.write(child_pipe, json.dumps([kinds, text]).encode())
    os._exit(0)


def contents(folder: Path) -> dict[Path, bytes]:
    return {each: each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def restore(path: Path, files: dict[Path, bytes]) -> None:
    """Have the path as it was, and leave what else there is for ocs to remove."""
    shutil.rmtree(path, ignore_errors=True)
    for each, content in files.items():
        each.parent.mkdir(exist_ok=True)
        each.write_bytes(content)


def refused(prepare: Callable[[Path], object]) -> Callable[[Path], None]:
    """A fault of which an OSError says what file it is about, and which changes no file."""

    def attempt(path: Path) -> None:
        before = contents(path.parent)
        child, pipe = fork(lambda: prepare(path))
        if not child:
            return
        kinds, text = json.loads(pipe.read())
        os.waitpid(child, 0)
        path.parent.chmod(0o755)
        assert "OSError" in kinds or (replacing is nullcontext and "SafetensorError" in kinds), (kinds, text)
        if replacing is not nullcontext:
            assert str(path) in text, text
            assert contents(path.parent) == before
            assert [*path.parent.iterdir()] == [path]
        restore(path, before)

    return attempt


def killed(after: float, read: Callable[[Path], int]) -> Callable[[Path], None]:
    """A kill so many seconds after a folder was made."""

    def attempt(path: Path) -> None:
        before = contents(path)
        if path.is_file():
            before[path] = path.read_bytes()
        child, pipe = fork(lambda: None)
        if not child:
            return
        pipe.read(1)
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with suppress(*[OSError, ValueError] * (replacing is nullcontext)):
            assert read(path) in (0, 1)
        restore(path, before)

    return attempt


def limit_files(size: int) -> None:
    """No file may be larger: a full disk, but for the number of the error."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def only_read(path: Path) -> None:
    """As a user who is not root, whom nothing stops."""
    path.parent.chmod(0o555)
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


def main(name: str) -> None:
    global replacing  # noqa: PLW0603
    import ocs.formats.onnx as onnx_files
    from ocs import replace_file
    from ocs.formats import pt2, storage
    from ocs.report import data

    writer = writer_of(name)
    if name != "save_pretrained":
        replacing = replace_file.replacing
        for module in (onnx_files, pt2, storage, data):
            module.replacing = faulty
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    path, started = folder / name, []
    rounds.append(lambda _: started.append(time.monotonic()))
    writer.write(path, 1)
    seconds, size = time.monotonic() - started[0], max(map(len, contents(folder).values()))
    assert writer.read(path) == 1
    writer.write(path, 0)
    chance = random.Random(name)
    rounds.extend(killed(chance.uniform(0, 1.2 * seconds), writer.read) for _ in range(KILLS))
    rounds.extend([refused(only_read), *(refused(lambda _, n=n: limit_files(n)) for n in (size // 3, size - 1))])
    kinds, text = [], ""
    try:
        writer.write(path, 1)
    except BaseException as error:
        if not child_pipe:
            raise
        kinds, text = [each.__name__ for each in type(error).__mro__], str(error)
    if child_pipe:
        say_and_exit(kinds, text)
    assert writer.read(path) == 1
    assert [*folder.iterdir()] == [path]
    shutil.rmtree(folder)
    print(f"{name}: {KILLS + 3 - len(rounds)} faults", flush=True)


if __name__ == "__main__":
    for each in sys.argv[1:]:
        main(each)
