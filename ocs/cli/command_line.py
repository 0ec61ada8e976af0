"""The command line: its commands and options, what it prints, and its exit codes.

0: done; 1: failed; 2: called wrongly; 130: interrupted. Results go to stdout, all else to stderr; --json makes the
result, or the error, one JSON object.
"""

# PYTHON_ARGCOMPLETE_OK

import argparse
import difflib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from typing import Any, NoReturn, get_args

from ocs.cli import commands
from ocs.cli.demo import run_demo
from ocs.cli.environment import run_env
from ocs.cli.models import FORMS, PRETRAINED, as_model
from ocs.cli.options import KNOWN, add_options, add_quantize_options
from ocs.cli.say import Notes, UsageError, one_line
from ocs.plan.call import meant
from ocs.report.data import plain
from ocs.runtime.arithmetic import Machine
from ocs.runtime.export import export

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class _CalledWrongly(SystemExit):
    """What a parser refuses: its program, and what is wrong, in a line."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        raise _CalledWrongly(self.prog, f"{' '.join(message.split())} ({self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, sys.argv's by default; returns the exit code."""
    parser = build_parser()
    _complete(parser)
    try:
        args, unknown = parser.parse_known_args(argv)
        if "run" not in args:
            parser.print_help()
            return USAGE
        if unknown:
            _refuse(parser, args, unknown)
    except _CalledWrongly as wrong:
        return _failed(*wrong.args, USAGE, as_json="--json" in (sys.argv if argv is None else argv))
    except SystemExit as stop:
        return int(stop.code or DONE)
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    """Run a command; what it raises becomes a line and an exit code."""
    notes, failed = Notes(), partial(_failed, f"ocs {args.command}", as_json=args.json)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr if args.json else sys.stdout):
            _warn_in_lines()  # and what a model prints stays out of the JSON
            result = args.run(args, notes)
        if result is not None:
            print(json.dumps(plain(result.values | {"notes": notes.lines}), indent=1) if args.json else result.text)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return failed("interrupted; files are as they were", INTERRUPTED)
    except BrokenPipeError:  # who read the output has seen enough: Python would complain of it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except SystemExit as stop:
        return failed(f"the model's own code called sys.exit({stop.code!r})", FAILED)
    except Exception as error:  # noqa: BLE001 - whatever it is, users get a line
        if args.debug:
            traceback.print_exc()
        return failed(one_line(error), USAGE if isinstance(error, UsageError) else FAILED)
    return DONE


def _failed(program: str, message: str, code: int, *, as_json: bool) -> int:
    print(f"{program}: error: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": message, "exit_code": code}))
    return code


def _warn_in_lines() -> None:
    """Show warnings of ocs in a line each, and none of other packages, about which users can do nothing."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"ocs: warning: {' '.join(str(message).split())}", file=sys.stderr)

    warnings.showwarning = show
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", category=UserWarning, module=r"ocs\b")


def _refuse(parser: _Parser, args: argparse.Namespace, unknown: list[str]) -> NoReturn:
    """Refuse arguments that a command does not have, and say which was meant."""
    own = parser.commands[args.command]
    name = unknown[0].partition("=")[0]
    near = difflib.get_close_matches(name, own._option_string_actions, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    if name.startswith("--") and args.command == "quantize" and not near:
        hint = f"; {meant(name[2:].replace('-', '_'), KNOWN)}"
    own.error(f"unrecognized argument {name}{hint}")


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks for completions, where argcomplete is installed."""
    if "_ARGCOMPLETE" in os.environ:
        try:
            import argcomplete
        except ImportError:
            return
        argcomplete.autocomplete(parser)


# --- The commands -----------------------------------------------------------------------------------------------------


def build_parser() -> _Parser:
    """Make the parser of all commands."""
    from ocs import __version__

    parser = _Parser("ocs", description="Post-training quantization of PyTorch models by outlier channel splitting.")
    parser.add_argument("--version", action="version", version=f"ocs {__version__}")
    chosen = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    parser.commands = {name: _added(chosen, name, *rest) for name, *rest in _COMMANDS}
    return parser


def _added(chosen: Any, name: str, text: str, run: Any, arguments: Any) -> _Parser:
    parser = chosen.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    parser.set_defaults(run=run)
    arguments(parser)
    common = parser.add_argument_group("output")
    common.add_argument("--json", action="store_true", help="print the result as one JSON object")
    common.add_argument(
        "--debug", action="store_true", default=bool(os.environ.get("OCS_DEBUG")),
        help="show where an error came from (or set OCS_DEBUG=1)",
    )  # fmt: skip
    return parser


def _inspect(parser: _Parser) -> None:
    _add_model(parser)
    parser.add_argument("--top", type=_count, default=20, metavar="N", help="weights to list (default: 20)")
    add_quantize_options(parser, ("wbits", "r"), wbits=4, r=0.02)


def _quantize(parser: _Parser) -> None:
    _add_model(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="write the quantized model, a safetensors file")
    parser.add_argument(
        "--stream", action="store_true",
        help="for models larger than memory: a layer at a time, from hf:FOLDER or --weights into the folder -o, and on"
        " where it was stopped; torchrun shares the layers",
    )  # fmt: skip
    parser.add_argument("--shard-size", type=_count, metavar="BYTES", help="of a file that --stream writes, at most")
    parser.add_argument("--report", metavar="FILE", help="write the report: a page (.html) or JSON (.json)")
    parser.add_argument(
        "--calibration", dest="calibration_data", metavar="PATH",
        help="what shows the inputs: a folder of images, or arrays in .npy or .safetensors files",
    )  # fmt: skip
    parser.add_argument("--synthesize", type=_count, metavar="N", help="calibrate on N inputs made without data")
    _add_inputs(parser)
    add_quantize_options(parser, [name for name in KNOWN if name != "calibration"])


def _compare(parser: _Parser) -> None:
    what = "file of weights, a quantized one, or MODEL"
    parser.add_argument("a", metavar="A", help=f"the float model: {what}")
    parser.add_argument("b", metavar="B", help=f"what is compared with it: {what}; or an .onnx file")
    parser.add_argument("--model", type=_model, metavar="MODEL", help=f"what the files are of: {FORMS}")
    _add_weights(parser, "weights of A where it is a MODEL")
    parser.add_argument(
        "--images", metavar="PATH",
        help="a folder of images, or arrays in .npy or .safetensors files (default: random inputs)",
    )  # fmt: skip
    _add_inputs(parser)


def _export(parser: _Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="a quantized file, of ocs quantize -o")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="what to write: .onnx or .pt2")
    parser.add_argument(
        "--model", type=_model, metavar="MODEL", help=f"what the file is of, by default as it says: {FORMS}"
    )
    _add_shape(parser)
    parser.add_argument(
        "--target", choices=get_args(Machine), default="this",
        help="whose arithmetic the integers must fit, see ocs.lower (default: this)",
    )  # fmt: skip
    texts = {
        "form": "of a .pt2: compiled for this machine, or what torch.export gives",
        "additions": "round what residual additions add to 8 bits, too",
        "dynamic_lstm": "of an .onnx: LSTM layers by ONNX Runtime's own operator",
    }
    add_options(parser, export, texts)


def _demo(parser: _Parser) -> None:
    parser.add_argument("--keep", metavar="FOLDER", help="keep the files there that it writes")


def _env(parser: _Parser) -> None:
    del parser


_COMMANDS = (
    (
        "inspect",
        "show a model's outliers layer by layer, and what splitting would bring",
        commands.run_inspect,
        _inspect,
    ),
    ("quantize", "quantize a model, and write it and a report", commands.run_quantize, _quantize),
    ("compare", "compare two models on the same inputs, without labels", commands.run_compare, _compare),
    ("export", "write a quantized file for other engines: .onnx or .pt2", commands.run_export, _export),
    ("demo", "train a small network, quantize it, compare, save and time it, in half a minute", run_demo, _demo),
    ("env", "say what this machine and this installation can do", run_env, _env),
)


# --- Arguments that several have --------------------------------------------------------------------------------------


def _add_model(parser: _Parser) -> None:
    parser.add_argument("model", type=_model, metavar="MODEL", help=FORMS)
    _add_weights(parser, "weights")


def _add_weights(parser: _Parser, what: str) -> None:
    text = (
        f"{what}: a safetensors file, a state_dict of torch.save, or '{PRETRAINED}' (torchvision: and timm: fetch them)"
    )
    parser.add_argument("--weights", metavar="FILE", help=text)


def _add_inputs(parser: _Parser) -> None:
    _add_shape(parser)
    parser.add_argument("--limit", type=_count, default=128, metavar="N", help="inputs at most (default: 128)")
    parser.add_argument("--batch", type=_count, default=16, metavar="N", help="inputs at once (default: 16)")


def _add_shape(parser: _Parser) -> None:
    text = "of a batch of one input (default: the model's own)"
    parser.add_argument("--shape", type=_shape, metavar="1,3,224,224", help=text)


def _model(text: str) -> str:
    try:
        return as_model(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.replace("x", ",").split(",")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}: use numbers, 1,3,224,224 say")
    return tuple(map(int, sizes))


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: use a whole number from 1 on")
    return int(text)
