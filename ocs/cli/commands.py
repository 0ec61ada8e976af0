"""The commands on models: inspect, quantize, compare and export."""

import argparse
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ocs.calibration.ranks import own_rank, rank_count
from ocs.cli.files import (
    check_output,
    is_quantized,
    load_quantized,
    model_of,
    onnx_model,
    save_quantized,
    saved_shape,
)
from ocs.cli.input_form import InputForm
from ocs.cli.inputs import Batches, holds_arrays, random_batch, shape_text, with_shape
from ocs.cli.models import FORMS, RANDOM, Loaded, is_model, load_model, without_values
from ocs.cli.options import chosen_options
from ocs.cli.outliers import outliers_of, outliers_text
from ocs.cli.say import Notes, Result, UsageError
from ocs.quantization import quantize
from ocs.report.words import size
from ocs.runtime.compare import compare
from ocs.runtime.export import export
from ocs.stream.execute import quantize_file
from ocs.tune.synthesize import synthesize


def run_inspect(args: argparse.Namespace, notes: Notes) -> Result:
    """Show the outliers of a model's weights, and what splitting would bring."""
    loaded = load_model(args.model, args.weights, notes)
    found = outliers_of(loaded.module, args.wbits, args.r)
    return Result(outliers_text(found, args.top), {"model": args.model, **found.to_dict()})


def run_quantize(args: argparse.Namespace, notes: Notes) -> Result | None:
    """Quantize a model, and write it and its report."""
    if args.stream:
        with _ranks_of_torchrun():
            return _streamed(args, notes)
    if args.shard_size is not None:
        raise UsageError("--shard-size is for --stream, which writes several files")
    check_output(args.output, "-o", inputs=(args.weights, args.calibration_data))
    check_output(args.report, "--report", (".html", ".json"), (args.weights, args.output))
    if args.report and args.output and os.path.realpath(args.report) == os.path.realpath(args.output):
        raise UsageError(f"--report {args.report}: it is the file of -o")
    loaded = load_model(args.model, args.weights, notes)
    options = chosen_options(args)
    calibration = _calibration(loaded, args, notes)
    try:
        report = quantize(loaded.module, calibration=calibration, **options)
    except ValueError as error:
        _say_how(error, args)
        raise
    if args.output:
        save_quantized(args.output, loaded, args.shape)
    else:
        notes.add("nothing is saved: -o FILE.safetensors does")
    if args.report:
        report.save(args.report)
    values = {"model": args.model, "output": args.output, "report_file": args.report, **report.to_dict()}
    written = [f"{path}: {_size(path)}" for path in (args.output, args.report) if path]
    return Result("\n".join([str(report), *written]), values)


@contextmanager
def _ranks_of_torchrun() -> Iterator[None]:
    """Have a group of the ranks that torchrun started, if it did, whose threads do not outlive it.

    They do where torch._dynamo is imported after the group was made (meta tensors do it), and may abort the process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    importlib.import_module("torch._dynamo")
    dist.init_process_group("gloo")
    try:
        yield
        dist.barrier()  # a rank that ended before would end others
    finally:
        dist.destroy_process_group()


def _streamed(args: argparse.Namespace, notes: Notes) -> Result | None:
    """Quantize a model from files to files; of ranks that torchrun started, the first has the result."""
    if not args.output:
        raise UsageError("--stream needs -o FOLDER")
    if args.synthesize:
        raise UsageError(
            "--stream holds a layer at a time, and --synthesize needs the whole model: use --calibration PATH"
        )
    check_output(args.report, "--report", (".html", ".json"), (args.weights, args.calibration_data))
    model, form = without_values(args.model, args.weights)
    options, usual = chosen_options(args), signature(quantize).parameters
    given = {name: value for name, value in options.items() if name == "progress" or value != usual[name].default}
    if args.shard_size is not None:
        given["shard_size"] = args.shard_size
    if args.calibration_data:
        batches = _calibration(Loaded(args.model, nn.Module(), form, ""), args, notes)
        given["calibration"] = islice(batches, own_rank(), None, rank_count())
    try:
        report = quantize_file(model, args.output, weights=args.weights, **given)
    except ValueError as error:
        _say_how(error, args)
        raise
    if own_rank() > 0:
        return None
    if args.report:
        report.save(args.report)
    values = {"model": args.model, "output": args.output, "report_file": args.report, **report.to_dict()}
    return Result(f"{report}\n{args.output}: {size(report.file_bytes)}", values)


def _say_how(error: ValueError, args: argparse.Namespace) -> None:
    """Note how inputs are given on the command line, where an error asks for them."""
    if not args.calibration_data and not args.synthesize and "calibration=" in str(error):
        error.add_note("here --calibration PATH" + ("" if args.stream else ", or --synthesize N without data"))


def run_compare(args: argparse.Namespace, notes: Notes) -> Result:
    """Compare two models on the same inputs, without labels."""
    first, second, weights = _sides(args, notes)
    if first.weights == RANDOM and weights not in (RANDOM, ""):
        raise UsageError(f"{args.a} has random weights, {args.b} those of {weights}: give --weights")
    batches = _batches(first, args.images, args, notes)
    found = compare(first.module, second, batches)
    values = {"a": args.a, "b": args.b, "inputs": batches.said, "random_inputs": not batches.files, **found.to_dict()}
    return Result(f"{found}\n{args.b} against {args.a}, on {batches.said}", values)


def run_export(args: argparse.Namespace, notes: Notes) -> Result:
    """Export a quantized file for engines."""
    check_output(args.output, "-o", (".onnx", ".pt2"), (args.file,))
    args.shape = args.shape or saved_shape(args.file)
    loaded = load_quantized(args.file, args.model)
    form = _form(loaded, args, notes)
    example = random_batch(form, form.shape[0], torch.Generator().manual_seed(0))
    names = ("target", "form", "additions", "dynamic_lstm")
    export(loaded.module, args.output, example, **{name: vars(args)[name] for name in names})
    if not any(getattr(layer, "input_grid", None) for layer in loaded.module.modules()):
        notes.add(
            "inputs of layers are floats, so products run in floats: quantize with --abits 8 --fold-bn for integers"
        )
    values = {"file": args.file, "model": loaded.model, "output": args.output, "shape": list(form.shape)}
    values["bytes"] = os.path.getsize(args.output)
    return Result(f"{args.output}: {_size(args.output)}, for inputs of {shape_text(form.shape)}", values)


# --- What they have in common -----------------------------------------------------------------------------------------


def _size(path: str) -> str:
    return size(os.path.getsize(path))


def _calibration(loaded: Loaded, args: argparse.Namespace, notes: Notes) -> Any:
    """Give what quantize() learns from: files that the user names, or inputs made for the model's BatchNorms."""
    if args.calibration_data and args.synthesize:
        raise UsageError("--synthesize makes inputs where there are none: leave it, or --calibration")
    if args.calibration_data:
        batches = _batches(loaded, args.calibration_data, args, notes)
        notes.add(f"calibrated on {batches.said}")
        return batches
    if not args.synthesize:
        return None
    form = _form(loaded, args, notes)
    if form.words:
        raise ValueError(f"--synthesize: {loaded.model} takes words, and only floats can be made: use --calibration")
    notes.add(f"calibrated on {args.synthesize} synthetic inputs, made for the model's BatchNorms")
    return synthesize(loaded.module, form.shape[1:], images=args.synthesize, batch=min(args.batch, args.synthesize))


def _form(loaded: Loaded, args: argparse.Namespace, notes: Notes) -> InputForm:
    form = with_shape(loaded.form, args.shape, loaded.model)
    if form.guess:
        notes.add(f"inputs of {shape_text(form.shape)} are a guess ({form.guess}): --shape says otherwise")
    return form


def _batches(loaded: Loaded, source: str | None, args: argparse.Namespace, notes: Notes) -> Batches:
    if source is not None and holds_arrays(source):  # which have a shape of their own
        return Batches(loaded.form or InputForm(()), source, args.limit, args.batch)
    return Batches(_form(loaded, args, notes), source, args.limit, args.batch)


def _sides(args: argparse.Namespace, notes: Notes) -> tuple[Loaded, Callable[..., Any], str]:
    """Load what is compared, and say where B's weights are from; files of weights need the MODEL that another names."""
    if args.a.endswith(".onnx"):
        raise UsageError(f"{args.a}: an ONNX file can be B, and A the float model")
    named = [text for text in (args.a, args.b) if not Path(text).exists()]
    for text in named:
        if not is_model(text):
            raise UsageError(f"{text}: there is no such file, and it is no MODEL ({FORMS})")
    model = args.model or next(iter(named), None)
    if args.weights and args.a not in named:
        raise UsageError(f"--weights is for the MODEL that is A, and {args.a} is a file")
    files = [text for text in (args.a, args.b) if text not in named and Path(text).is_file()]
    quantized = [text for text in files if is_quantized(text)]
    if model is None and len(quantized) == 1:
        model = model_of(quantized[0])
    first = _side(args.a, model, args.weights, notes)
    if args.b.endswith(".onnx"):
        return first, onnx_model(args.b), ""
    second = _side(args.b, model, None, notes)
    return first, second.module, second.weights


def _side(text: str, model: str | None, weights: str | None, notes: Notes) -> Loaded:
    if not Path(text).exists():
        return load_model(text, weights, notes)
    if Path(text).is_dir():
        raise UsageError(f"{text}: it is a folder: hf:{text} is what transformers wrote there")
    if is_quantized(text):
        return load_quantized(text, model)
    if model is None:
        raise UsageError(f"{text}: it holds weights alone: give --model MODEL ({FORMS})")
    return load_model(model, text, notes)
