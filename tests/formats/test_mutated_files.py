"""Files with right sums that no ocs.save wrote: refused with a ValueError, or read for exactly what they hold."""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
import resource
import signal
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Everything, assert_unchanged, header_of, state
from safetensors.torch import load_file, save_file
from torch import Tensor

import ocs
from ocs.formats.contents import crc32
from ocs.formats.storage import stored

pytestmark = pytest.mark.usefixtures("one_thread")
FUZZ_SECONDS = float(os.environ.get("OCS_FUZZ_SECONDS", "0"))  # more than the first files, others each time
FILES = 40
GIGABYTE, SECONDS = 2**30, 30
OPTIONS = {
    "weights": {"wbits": 5, "r": 0.1, "overrides": {"lstm": {"wbits": 3, "granularity": "channel"}}},
    "inputs": {"wbits": 4, "r": 0.3, "abits": 8, "act_r": 0.2, "skip": None, "calibration": lambda net: run(net)},
    "rows and groups": {
        "granularity": "group",
        "group": 32,
        "embeddings": True,
        "overrides": {name: {"abits": 8, "act_scale": "dynamic"} for name in ("lstm", "cell", "net.head")},
    },
}
NUMBERS = [-1, 0, 1, 2, 3, 7, 8, 9, 32, 255, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, float("inf"), float("nan")]
VALUES = [*NUMBERS, None, True, False, "", "weight", "Linear", "net.head", "\ud800", "\0", [], {}, [1], {"a": 1}]
DTYPES = [torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.bool]


def run(model: Everything) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(*Everything.inputs())


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each kind."""
    paths = {}
    for name, options in OPTIONS.items():
        paths[name] = tmp_path_factory.mktemp("originals") / "m"
        torch.manual_seed(0)
        model = Everything().eval()
        ocs.quantize(model, **options)
        ocs.save(model, paths[name])
    return paths


# --- Mutations --------------------------------------------------------------------------------------------------------


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container and key in a tree of JSON, but the sums, which are computed anew."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    found = [(tree, key) for key in keys]
    return found + [each for key in keys if key != "tensors" for each in places(tree[key])]


def mutate_header(chance: random.Random, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    where, key = chance.choice(places(header))
    other, other_key = chance.choice(places(header))
    match chance.randrange(6):
        case 0:
            del where[key]
        case 1 if type(where[key]) in (int, float):
            where[key] += chance.choice([-1, 1])
        case 2:
            where[key] = copy.deepcopy(other[other_key])
        case 3 if isinstance(where, dict):
            where[str(chance.choice(VALUES))] = where.pop(key)
        case 4 if isinstance(where, list):
            where.append(copy.deepcopy(where[key]))
        case _:
            where[key] = chance.choice(VALUES)


def mutate_tensor(chance: random.Random, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    name, other = chance.choice(list(tensors)), chance.choice(list(tensors))
    tensor = tensors[name]
    match chance.randrange(8):
        case 0:
            del tensors[name]
        case 1:
            tensors[chance.choice(["x", other + ".x", name[1:], ""])] = tensor.clone()
        case 2:
            tensors[name], tensors[other] = tensors[other], tensor
        case 3:
            tensors[name] = tensor.real.to(chance.choice(DTYPES))
        case 4:
            tensors[name] = tensor.flatten()[: chance.randint(0, tensor.numel())].clone()
        case 5:
            tensors[name] = torch.cat([tensor.flatten(), tensor.flatten()])
        case 6:
            tensors[name] = torch.full_like(tensor, chance.choice([0, 1, 127]))
        case _ if tensor.numel():
            content = tensors[name] = tensor.clone()
            raw = content.flatten().view(torch.uint8)
            for _ in range(chance.randint(1, 3)):
                raw[chance.randrange(len(raw))] = chance.choice([0, 1, 127, 128, 254, 255, chance.randrange(256)])


def mutate_file(chance: random.Random, path: Path) -> None:
    """Of safetensors' own header: what it says of names, dtypes, shapes and offsets."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    where, key = chance.choice([each for each in places(header) if each[0] is not header["__metadata__"]])
    where[key] = chance.choice([*VALUES, "F32", "I8", "F8_E4M3", "F4", "C64", [0, 0], [2**40], [2**32, 2**32]])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def write_mutant(chance: random.Random, original: Path, path: Path) -> None:
    header, tensors = header_of(original), load_file(original)
    for _ in range(chance.randint(1, 2)):
        chance.choice([mutate_header, mutate_header, mutate_tensor])(chance, header, tensors)
    if isinstance(header.get("tensors"), dict):
        header["tensors"] = {name: crc32(tensor) for name, tensor in tensors.items()}
    text = json.dumps(header)
    save_file(tensors, path, metadata={"ocs": text, "crc32": str(zlib.crc32(text.encode()))})
    if chance.randrange(5) == 0:
        mutate_file(chance, path)


# --- What becomes of them ---------------------------------------------------------------------------------------------


@contextmanager
def limited() -> Iterator[None]:
    """Let memory run out, and time: neither is a ValueError."""

    def late(*_: Any) -> None:
        raise TimeoutError

    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTE, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def check(path: Path, packed: bool) -> bool:
    """Whether a file is read; the model then holds what it says, runs, and is as it was where not."""
    model = Everything().eval()
    before = state(model)
    with limited():
        try:
            ocs.load(path, model, packed=packed)
        except ValueError:
            assert_unchanged(model, before)
            return False
        said, tensors = header_of(path), load_file(path)
        again, metadata = stored(model)
        held = json.loads(metadata["ocs"])
        assert set(again) == set(tensors)
        for name, tensor in again.items():
            assert crc32(tensors[name].to(tensor.dtype)) == crc32(tensor), name
        for name, layer in held["layers"].items():
            of_file = said["layers"][name]
            assert all(of_file[key] == layer[key] for key in ("kind", "bits", "weights")), name
            assert (of_file.get("input") or {}).items() <= (layer["input"] or {}).items(), name
        assert said["layers"].keys() == held["layers"].keys()
        repr(model)
        run(copy.deepcopy(model))
    return True


@pytest.mark.parametrize("name", OPTIONS)
def test_refused_or_read_as_it_is(originals: dict[str, Path], tmp_path: Path, name: str) -> None:
    path, read = tmp_path / "mutant", 0
    assert check(originals[name], packed=False)
    until, start = time.monotonic() + FUZZ_SECONDS / len(OPTIONS), time.time_ns() * (FUZZ_SECONDS > 0)
    for i in itertools.count(start):
        chance = random.Random(f"{name}, {i}")
        write_mutant(chance, originals[name], path)
        try:
            read += check(path, packed=chance.randrange(2) == 1)
        except BaseException as error:
            error.add_note(f"mutant {i}")
            raise
        if i - start >= FILES and time.monotonic() >= until:
            break
    assert 0 < read < i - start
