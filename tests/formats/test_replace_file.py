"""What may stand where a file is saved, and what is left when saving ends in any way."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import ocs


@pytest.fixture
def model() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8))
    ocs.quantize(model)
    return model


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as each:
        before = Path.cwd()
        os.chdir(path.parent)  # the path of a socket is short
        each.bind(path.name)
        os.chdir(before)


def make_link_to_null(path: Path) -> None:
    path.symlink_to("/dev/null")


def make_loop(path: Path) -> None:
    path.symlink_to(path)


def make_link_to_folder(path: Path) -> None:
    path.symlink_to(path.parent)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (os.mkfifo, OSError, "no regular file"),
        (make_socket, OSError, "no regular file"),
        (make_link_to_null, OSError, "no regular file"),
        (make_loop, OSError, "no regular file"),
        (make_link_to_folder, IsADirectoryError, "it is a folder"),
        (lambda path: (path.touch(), path.chmod(0o444)), PermissionError, "it is read-only"),
    ],
)
def test_what_is_not_replaced(
    model: nn.Module, tmp_path: Path, make: Callable[[Path], object], error: type[OSError], message: str
) -> None:
    """As root, too, who could write all of these."""
    path = tmp_path / "m"
    make(path)
    before = path.lstat()
    with pytest.raises(error, match=message):
        ocs.save(model, path)
    assert (path.lstat().st_mode, path.lstat().st_ino) == (before.st_mode, before.st_ino)
    assert os.listdir(tmp_path) == ["m"]


def test_a_device_stays_one(model: nn.Module) -> None:
    with pytest.raises(OSError, match=r"/dev/null: it is no regular file"):
        ocs.save(model, "/dev/null")
    assert Path("/dev/null").is_char_device()


KILLED = """
import sys, torch, ocs
from torch import nn
model = nn.Sequential(nn.Linear(2, 2), nn.Embedding(30_000_000, 1))
ocs.quantize(model, overrides={"0": dict(wbits=4)})
print(flush=True)
while True:
    ocs.save(model, sys.argv[1])
"""


def test_what_a_killed_process_left_is_removed_and_nothing_else(model: nn.Module, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "other")], stdout=subprocess.PIPE)
    process.stdout.readline()
    while not [*tmp_path.glob(".ocs.*/*")]:
        process.send_signal(signal.SIGCONT)
        time.sleep(0.002)
        process.send_signal(signal.SIGSTOP)
    (left,) = tmp_path.glob(".ocs.*")
    ocs.save(model, tmp_path / "m")
    assert left.is_dir()  # what a living process is writing
    process.kill()
    process.wait()
    process.stdout.close()
    of_others = {
        ".m.partial",
        left.name.replace(f".{process.pid}.", f".{os.getppid()}."),  # a process that lives
        left.name.replace(".ocs.", ".ocs.elsewhere-"),  # another machine's
    }
    for each in of_others:
        (tmp_path / each).mkdir()
    ocs.save(model, tmp_path / "m")
    assert set(os.listdir(tmp_path)) - {"other"} == {"m", *of_others}


def test_file_and_folder_are_on_the_disk(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = [], os.fsync

    def note(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, (tmp_path / "m").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    ocs.save(model, tmp_path / "m")
    assert synced == [((tmp_path / "m").stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_long_names(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)  # 254 bytes, 255 are the most
    ocs.save(model, path)
    other = ocs.load(path, nn.Sequential(nn.Linear(8, 8)))
    assert torch.equal(other[0].weight, model[0].weight)


def test_whatever_safetensors_cannot_write_is_an_error_that_names_the_path(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m"
    ocs.save(model, path)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match=r"m: it cannot be written \(.*Input/output error") as caught:
        ocs.save(model, path)
    assert caught.value.errno == errno.EIO
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m"]


# --- Reading it meanwhile ---------------------------------------------------------------------------------------------


def test_load_reads_one_file_where_another_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Safetensors opens a file twice; in between it is replaced."""
    path, other = tmp_path / "m", nn.Sequential(nn.Linear(8, 8))
    for each, bits in (path, 4), (tmp_path / "next", 8):
        net = nn.Sequential(nn.Linear(8, 8))
        ocs.quantize(net, wbits=bits)
        ocs.save(net, each)
    from_file, replaced = torch.UntypedStorage.from_file, []

    def late(*args: Any, **kwargs: Any) -> Any:
        replaced.append((tmp_path / "next").replace(path))
        return from_file(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "from_file", late)
        assert ocs.load(path, other)[0].bits == 4
    assert replaced
    assert ocs.load(path, nn.Sequential(nn.Linear(8, 8)))[0].bits == 8


@pytest.mark.parametrize("name", [b"\xff", b"a\nb", b"-rf", "😀".encode(), b"%s{0}"])
def test_load_takes_every_name_that_save_does(model: nn.Module, tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    ocs.save(model, path)
    assert torch.equal(ocs.load(path, nn.Sequential(nn.Linear(8, 8)))[0].weight, model[0].weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m", "it is no regular file but a device, pipe or socket"),
        ("folder/model.safetensors", "it is a folder, in which there is neither"),
    ],
)
def test_load_does_not_wait_for_a_pipe(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / name)
    keeper = os.open(tmp_path / name, os.O_RDWR)  # lest this test wait
    os.write(keeper, b"{}")
    try:
        with pytest.raises(OSError, match=message):
            ocs.load(tmp_path / name.partition("/")[0], nn.Sequential(nn.Linear(8, 8)))
    finally:
        os.close(keeper)
