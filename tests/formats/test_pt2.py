"""What is said of torch's compiler where that fails, and what is left then."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import ocs

OUTPUT = "CppCompileError: C++ compile error\n\nCommand:\ng++ a.cpp\n\nOutput:\n{}\nPlease submit a full bug report.\n"
FAILURES = {
    "disk": ("a.s: Fatal error: can't write 4 bytes: 'No space left on device'", errno.ENOSPC),
    "signal": ("g++: internal compiler error: File size limit exceeded signal terminated cc1plus", errno.EFBIG),
    "system": (f"OSError: [Errno 30] {os.strerror(errno.EROFS)}: '/cache/a'", errno.EROFS),
    "code": ("a.cpp:3:1: error: expected ';'", None),
}


@pytest.fixture
def model() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8))
    ocs.quantize(model)
    return model


@pytest.mark.parametrize("name", FAILURES)
def test_one_error_names_the_path_and_where_the_compiler_writes(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    said, code = FAILURES[name]
    failure, path = RuntimeError(OUTPUT.format(said)), tmp_path / "model.pt2"

    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/cache")
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    monkeypatch.setattr(torch._inductor, "compile", fail)
    path.write_bytes(b"old")
    calls = {
        str(path): lambda: ocs.export(model, path, torch.ones(1, 8)),
        "engine='inductor'": lambda: ocs.compile(model, torch.ones(1, 8)),
    }
    for what, call in calls.items():
        with pytest.raises(Exception, match=r"^.*: torch's compiler failed, which writes to /cache and /") as caught:
            call()
        assert type(caught.value) is (OSError if code else RuntimeError)
        assert getattr(caught.value, "errno", None) == code
        text = str(caught.value)
        assert text.startswith(f"{what}: torch")
        assert said in text if code else "RuntimeError: CppCompileError: C++ compile error)" in text
        assert caught.value.__cause__ is failure
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.pt2"]
