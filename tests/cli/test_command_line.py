"""The command line as a whole: exit codes, one-line errors, JSON, options that follow from ocs.quantize, interrupts."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import ocs
from ocs.cli import commands
from ocs.cli.command_line import build_parser, main
from ocs.cli.options import KNOWN, values_of
from ocs.plan.options import Recipe

MODEL = "conftest:SmallNet"
TESTS = Path(__file__).resolve().parents[1]


def python(*argv: str, path: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run Python in the folder of tests, where MODEL is."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, *path))), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *argv], cwd=TESTS, env=env, capture_output=True, text=True, check=False)


def failed(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Run a command that must fail with one line, and nothing on stdout; returns the exit code and the line."""
    code = main(argv)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if ": note: " not in line]
    assert out == ""
    assert len(lines) == 1, err
    return code, lines[0]


# --- Calls ------------------------------------------------------------------------------------------------------------


def test_without_a_command_it_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(name in out for name in ("inspect", "quantize", "compare", "export", "demo", "env"))


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["quantize", "--help"], ["compare", "-h"]])
def test_help_and_version(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    assert capsys.readouterr().out.startswith(("usage: ocs", f"ocs {ocs.__version__}"))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("quantise m:f", "invalid choice: 'quantise'"),
        ("quantize", "the following arguments are required: MODEL"),
        ("quantize resnet50", "'resnet50' is no MODEL: use torchvision:NAME"),
        ("quantize a.py:make", "'a.py:make' is no MODEL"),
        (f"quantize {MODEL} --wbits 9", "argument --wbits: wbits=9: use an integer from 2 to 8"),
        (f"quantize {MODEL} --wbits four", "wbits='four'"),
        (f"quantize {MODEL} --r nan", "argument --r: r=nan"),
        (f"quantize {MODEL} --clip foo", "clip='foo': use \"none\""),
        (f"quantize {MODEL} --recipe bset", "recipe='bset': use 'paper' or 'best'"),
        (f"quantize {MODEL} --act-signed false", "act_signed=False: use True"),
        (f"quantize {MODEL} --wbit 4", "unrecognized argument --wbit; did you mean --wbits?"),
        (f"quantize {MODEL} --per-channel", "unrecognized argument --per-channel; the nearest is granularity"),
        (f"quantize {MODEL} --overrides head", "'head': use PATTERN:OPTION=VALUE"),
        (f"quantize {MODEL} --overrides head:bits=3", "unknown option 'bits'; use wbits"),
        (f"quantize {MODEL} --overrides head:wbits=1", "wbits=1: use an integer from 2 to 8"),
        (f"quantize {MODEL} --shape 3,a", "argument --shape: '3,a'"),
        (f"quantize {MODEL} --limit 0", "argument --limit: '0'"),
        (f"quantize {MODEL} --report r.txt", "--report r.txt: end it in .html or .json"),
        (f"quantize {MODEL} -o q.html --report q.html", "--report q.html: it is the file of -o"),
        ("export q.safetensors", "the following arguments are required: -o"),
        ("export q.safetensors -o m.tflite", "-o m.tflite: end it in .onnx or .pt2"),
        ("export q.safetensors -o m.onnx --form zip", "form='zip': use 'package' or 'program'"),
        (f"compare {MODEL} nowhere", "nowhere: there is no such file, and it is no MODEL"),
    ],
)
def test_wrong_calls(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = failed(capsys, *line.split())
    assert code == 2
    assert says in error
    assert error.startswith(("ocs: error: ", f"ocs {line.split(maxsplit=1)[0]}: error: "))


def test_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for line, says in (
        (f"quantize {MODEL} --weights none.pt", "none.pt: there is no such file"),
        (f"quantize {MODEL} --weights .", ".: it is a folder"),
        (f"quantize {MODEL} -o no/q.safetensors", "-o no/q.safetensors: there is no folder no"),
        (f"quantize {MODEL} -o .", "-o .: it is a folder"),
        (f"quantize {MODEL} --abits 8", "abits=8 needs calibration="),
        (f"quantize {MODEL} --skip nolayer", "skip='nolayer': no layer has that name"),
        (f"quantize {MODEL} --overrides no:wbits=3", "overrides='no': no layer has that name"),
        ("export none.safetensors -o m.onnx", "none.safetensors: there is no such file"),
    ):
        code, error = failed(capsys, *line.split())
        assert code == 1
        assert says in error
    assert list(tmp_path.iterdir()) == []


def test_json_of_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", MODEL, "--abits", "8", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert "needs calibration=" in found["error"]
    assert found["exit_code"] == 1


@pytest.mark.parametrize("line", ["inspect resnet50 --json", "quantize --json", "frobnicate --json", "inspect --jsons"])
def test_json_of_a_wrong_call(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    found = json.loads(out) if line.endswith("--json") else {"error": err.strip().partition("error: ")[2]}
    assert f"error: {found.pop('error')}\n" in err
    assert found == ({"exit_code": 2} if out else {})


@pytest.mark.parametrize("switch", [True, False])
def test_debug_shows_where(switch: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if not switch:
        monkeypatch.setenv("OCS_DEBUG", "1")
    assert main(["quantize", MODEL, "--abits", "8", *(["--debug"] if switch else [])]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_warnings_are_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def warns(*_: object, **__: object) -> None:
        warnings.warn("less than\nhalf", UserWarning, stacklevel=2)  # in ocs.cli.commands
        warnings.warn_explicit("of others", UserWarning, "x.py", 1, module="torch.x")
        raise ValueError("enough")

    monkeypatch.setattr(commands, "quantize", warns)
    assert main(["quantize", MODEL]) == 1
    assert capsys.readouterr().err.splitlines() == ["ocs: warning: less than half", "ocs quantize: error: enough"]


# --- Options ----------------------------------------------------------------------------------------------------------


def test_options_are_those_of_quantize() -> None:
    """Names and defaults, all but calibration, which files give."""
    args = vars(build_parser().parse_args(["quantize", MODEL]))
    parameters = inspect.signature(ocs.quantize).parameters
    appended = {"skip": [], "overrides": []}
    for name in KNOWN.keys() - {"calibration"}:
        assert args[name] == appended.get(name, parameters[name].default), name


def test_every_option_has_its_choices_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    main(["quantize", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, definition in KNOWN.items():
        if name != "calibration":
            assert f"--{name.replace('_', '-')}" in text
            assert definition.help in text
    assert "|".join(get_args(Recipe)) in text
    assert "--fold-bn, --no-fold-bn" in text


def test_values_are_read_as_the_annotations_say() -> None:
    hints = get_type_hints(ocs.quantize)
    for name, text, value in (
        ("wbits", "4", 4), ("wbits", "auto", "auto"), ("r", "1", 1.0), ("clip", "0.5", 0.5), ("clip", "none", "none"),
        ("abits", "none", None), ("act_signed", "true", True), ("act_signed", "auto", "auto"), ("budget", "70", 70),
    ):  # fmt: skip
        found = values_of(hints[name]).parse(text)
        assert found == value
        assert type(found) is type(value)


def test_what_quantize_gets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(model: object, **options: object) -> None:
        seen.update(options)
        raise ValueError("stop")

    seen: dict[str, object] = {}
    monkeypatch.setattr(commands, "quantize", stop)
    line = "--wbits 3 --fold-bn --no-expand --skip FIRST_LAYER --skip head --overrides body.*:wbits=4,act-signed=auto"
    main(["quantize", MODEL, *line.split(), "--overrides", "head:r=0"])
    assert (seen["wbits"], seen["fold_bn"], seen["expand"]) == (3, True, False)
    assert seen["skip"] == [ocs.FIRST_LAYER, "head"]
    assert seen["overrides"] == {"body.*": {"wbits": 4, "act_signed": "auto"}, "head": {"r": 0.0}}
    main(["quantize", MODEL])
    assert seen["skip"] is ocs.FIRST_LAYER
    assert seen["overrides"] is None
    main(["quantize", MODEL, "--skip", "none"])
    assert seen["skip"] == []


def test_the_calls_in_the_docs_are_calls() -> None:
    text = (TESTS.parent / "docs" / "command-line.md").read_text().replace("\\\n", " ")
    lines = [line.removeprefix("$ ") for line in text.splitlines() if line.startswith(("ocs ", "$ ocs "))]
    calls = [line for line in lines if "error:" not in line]
    assert len(calls) >= 10
    for call in calls:
        args, unknown = build_parser().parse_known_args(shlex.split(call)[1:])
        assert not unknown, call
        assert args.run


# --- Processes --------------------------------------------------------------------------------------------------------


PROCESS = """
import sys, ocs
assert not [name for name in sys.modules if name.startswith(("ocs.cli", "torchvision", "PIL"))]
from ocs.cli.command_line import main
sys.exit(main())
"""


def test_as_a_process() -> None:
    """import ocs brings nothing of the command line; no bar and no note where all is well."""
    done = python("-c", PROCESS, "inspect", MODEL, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["weights"]) == 5


INTERRUPTED = """
import os, signal, safetensors.torch
from conftest import SmallNet

signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background

def half(tensors, path, metadata=None):
    with open(path, "wb") as file:
        file.write(b"half")
    os.kill(os.getpid(), signal.SIGINT)

safetensors.torch.save_file = half
"""


@pytest.mark.skipif(not hasattr(signal, "SIGINT") or os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_leaves_files_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "interrupting.py").write_text(INTERRUPTED)
    (tmp_path / "q.safetensors").write_bytes(b"old")
    command = ("-m", "ocs", "quantize", "interrupting:SmallNet", "-o", str(tmp_path / "q.safetensors"))
    done = python(*command, path=(tmp_path,))
    assert done.returncode == 130
    assert done.stderr == "ocs quantize: error: interrupted; files are as they were\n"
    assert (tmp_path / "q.safetensors").read_bytes() == b"old"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["interrupting.py", "q.safetensors"]


def test_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that asks gets its answer from argcomplete, from a parser of all commands."""
    seen: list[Callable[..., object]] = []
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.setitem(sys.modules, "argcomplete", type(sys)("argcomplete"))
    monkeypatch.setattr(sys.modules["argcomplete"], "autocomplete", seen.append, raising=False)
    assert main(["--version"]) == 0
    assert set(seen[0].commands) >= {"inspect", "quantize", "compare", "export"}
    option = seen[0].commands["quantize"]._option_string_actions["--clip"]
    assert {"auto", "none", "mse"} <= {*option.completer(prefix="", parsed_args=None)}
