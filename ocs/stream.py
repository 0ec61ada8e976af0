"""quantize_file(): models that memory does not hold, from files to files, a layer at a time.

The model stands on the meta device. What decides (ocs.plan) sees it whole; then one layer after the other gets its
weights, is quantized as quantize() does, and written as a part of the result. So the result is that of quantize() and
save(), whoever makes which parts.
"""

import copy
import ctypes
import inspect
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from ocs.calibration.ranks import own_rank, rank_count, sum_over_ranks
from ocs.formats.contents import Entry, entries_of, full_name, sizes_of
from ocs.formats.layout import Layout
from ocs.formats.source import INDEX, Source, sources_of
from ocs.formats.storage import as_stored, stored_layers
from ocs.model.batchnorm_folding import with_parameters
from ocs.model.rewrite import keeps_grad_mode
from ocs.model.standardized import made_permanent
from ocs.model.wrappers import named_modules, unwrapped
from ocs.nn.registry import is_quantizable
from ocs.nn.weights import bytes_of, is_weight
from ocs.plan.allocate import check_allocation
from ocs.plan.call import meant
from ocs.plan.choose import choose
from ocs.plan.coverage import check_coverage
from ocs.plan.input_facts import InputFacts, learn
from ocs.plan.layer_plan import LayerPlan
from ocs.plan.options import ModelOptions, Request
from ocs.plan.quantize_layer import LayerResult, foretold, quantize_layers
from ocs.progress import with_progress
from ocs.quantization import quantize
from ocs.replace_file import replacing
from ocs.report.data import Histogram, LayerReport, Report
from ocs.report.lines import report_lines

T = TypeVar("T")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc
SHARD = 2_000_000_000  # bytes
WORK = ".unfinished"  # in the folder of the result, what is not complete yet
_RECORD = "record.json"  # there: what is made of what
_WHOLE = ("calibration", "fold_bn", "equalize", "allocate", "budget")  # options that need all of a model at once
CONFIG = "config.json"  # of transformers
_BESIDE = (".json", ".txt", ".model", ".jinja")  # what goes with a model's weights: tokenizers and the like


@keeps_grad_mode
def quantize_file(
    model: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    shard_size: int = SHARD,
    progress: bool | None = None,
    **options: Any,
) -> Report:
    """Quantize a model in files that memory does not hold, layer by layer, into a folder of files.

    What is written is what ocs.quantize and ocs.save give, in shards; ocs.load reads the folder into a float model on
    the meta device, and so does transformers' from_pretrained after `import ocs.hf`, where the model is one of its.
    Memory holds one layer at a time, in float32 and as integers, and what belongs to no layer: norms and biases.

    Called again after whatever stopped it, with the same arguments, it goes on where it stopped. Where
    torch.distributed is initialized (torchrun), the ranks share the layers, and the result is that of one; all must see
    the same folders.

        ocs.quantize_file("llama-70b", "llama-70b-4bit", wbits=4, r=0.02, recipe="best")

    Args:
        model: a folder as transformers' save_pretrained writes it; or a float model on the meta device
            (`with torch.device("meta"): model = Net()`), which stays as it is.
        out: the folder to write, which holds no model yet; its parent exists. Index or single file come last.
        weights: where model is a module: a folder with model.safetensors.index.json or model.safetensors, or one
            safetensors file, whose names are those of its state_dict.
        shard_size: bytes that a file has at most, but for a single larger layer.
        progress: show a bar; by default where it takes over two seconds, a terminal looks on and tqdm is installed.
        options: those of ocs.quantize which need neither inputs nor the whole model: wbits, r, recipe, overrides ...

    Returns:
        The Report of ocs.quantize; of scales and thresholds that a layer has many of, it has the least and the largest.

    Raises:
        OSError: files are missing or cannot be written, or `out` holds a model.
        ValueError: an option is out of range or needs inputs or the whole model; files and model do not fit, the error
            names the tensor; a weight holds NaN or Inf; what is unfinished in `out` was begun otherwise.
        TypeError: there is no such option.
    """
    begin = time.perf_counter()
    with torch.inference_mode(False), torch.no_grad():
        job = _on_all_ranks(lambda: _plan(model, weights, shard_size, options))
        folder = Path(out)
        _on_all_ranks(lambda: _begin(folder, job) if own_rank() == 0 else None)
        _on_all_ranks(lambda: _check_record(folder / WORK, job.record))
        _on_all_ranks(lambda: _make_units(folder, job, progress))
        sums, lines = _on_all_ranks(lambda: _read_units(folder / WORK, job))
        _on_all_ranks(lambda: _write_beside(folder, job) if own_rank() == 0 else None)
        _on_all_ranks(lambda: _finish(folder, job, sums))
        _on_all_ranks(lambda: _end(folder, job) if own_rank() == 0 else None)
    return replace(_report(job, lines), seconds=time.perf_counter() - begin)


def _on_all_ranks(work: Callable[[], T]) -> T:
    """Do what each rank has to; where one fails, all do, and none goes on before all are done."""
    results: list[T] = []

    def measured() -> list[float]:
        results.append(work())
        return []

    sum_over_ranks(measured, 0, "quantize_file")
    return results[0]


# --- What is to be done -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """What is made at once: layers of which no other has the weights, or tensors that stay float."""

    plans: tuple[LayerPlan, ...] = ()
    floats: tuple[Entry, ...] = ()

    @property
    def quantized(self) -> dict[int, nn.Parameter]:
        """Give the weights that are quantized, by id, each once."""
        found = [plan.like._parameters[name] for plan in self.plans for name in plan.kind.weight_names(plan.like)]
        return {id(parameter): parameter for parameter in found}

    @property
    def waiting(self) -> list[torch.Tensor]:
        """List the tensors that are still in files."""
        tensors = [*self.quantized.values(), *(entry.tensor for entry in self.floats)]
        return [tensor for tensor in tensors if tensor.is_meta]

    @property
    def size(self) -> int:
        """Count the numbers that are read."""
        return sum(tensor.numel() for tensor in self.waiting)


@dataclass(frozen=True)
class Job:
    """A model on the meta device, its files, and what is decided of each layer."""

    model: nn.Module
    source: Source
    of_file: dict[int, str]  # the names of tensors in the files, by id in the model
    plans: list[LayerPlan]
    facts: dict[str, InputFacts]
    units: list[Unit]
    layout: Layout
    request: Request
    settings: dict[str, Any]
    options: dict[str, Any]  # as the caller gave them

    @property
    def record(self) -> dict[str, Any]:
        """Say what is made of what, as JSON has it; what is unfinished of another record is of another result."""
        made = {
            "model": {"class": type(self.model).__name__},
            "files": self.source.stamp(),
            "options": self.settings,
            "layers": self.layout.header["layers"],
            "version": {"ocs": self.layout.header["ocs"]},
            "places": {name: place[:3] for name, place in self.layout.places.items()},
        }
        return json.loads(json.dumps(made, default=str))


def _plan(model: Any, weights: Any, shard_size: Any, options: Mapping[str, Any]) -> Job:
    """Decide everything, of a model that holds what is no layer's weight."""
    request = _request(options)
    if type(shard_size) is not int or shard_size < 1:
        raise ValueError(f"shard_size={shard_size!r}: use a positive integer, bytes")
    model, source = _opened(model, weights)
    of_file = _filled(model, source)
    with _blocks_of_their_own():
        plans, settings = choose(model, request)
    _check_data_free(plans)
    check_allocation(plans, request.model)
    plans, facts, *_ = learn(model, plans, request.model)
    check_coverage(plans)
    units = _units(model, plans)
    layout = Layout(*_foretold(plans, units), shard_size)
    return Job(model, source, of_file, plans, facts, units, layout, request, settings, dict(options))


def _units(model: nn.Module, plans: Iterable[LayerPlan]) -> list[Unit]:
    """List what is to be done, tensors that stay float first."""
    by_name, of_layers = {plan.name: plan for plan in plans if plan.quantized}, []
    while by_name:
        plan = by_name.pop(next(iter(by_name)))
        tied = by_name.pop(plan.target.tied_to, None)
        of_layers.append(Unit((plan,) if tied is None else (plan, tied)))
    quantized = {tensor for unit in of_layers for tensor in unit.quantized}
    left = [entry for entry in entries_of(model, {}) if id(entry.tensor) not in quantized]
    held = tuple(entry for entry in left if not entry.tensor.is_meta)
    return [*([Unit(floats=held)] if held else []), *(Unit(floats=(e,)) for e in left if e.tensor.is_meta), *of_layers]


def _foretold(plans: Iterable[LayerPlan], units: Iterable[Unit]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Tell what the files say of the layers, and which tensors they have, all of it but values."""
    layers = {plan.name: foretold(plan) for plan in plans if plan.quantized}
    for plan in plans:
        if plan.quantized and plan.target.tied_to and not plan.kind.opt_in:
            layers[plan.name].hold("weight", *layers[plan.target.tied_to].weight_state("weight"))
    packed, header = stored_layers(layers)
    floats = {entry.name: entry.tensor for unit in units for entry in unit.floats}
    return header, floats | packed


@contextmanager
def _blocks_of_their_own() -> Iterator[None]:
    """Let the C library give back each large block at once: small ones between those of a large graph would keep them.

    Afterwards it is as any process of torch's has it before long: blocks up to 32 MB stay for the next one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)


def _request(options: Mapping[str, Any]) -> Request:
    names = [name for name in inspect.signature(quantize).parameters if name not in ("model", "progress")]
    unknown = next((name for name in options if name not in names), None)
    if unknown is not None:
        raise TypeError(f"quantize_file has no option {unknown!r}: {meant(unknown, names)}")
    for name in _WHOLE:
        if name in options and options[name] is not getattr(ModelOptions, name, None) and options[name] != "uniform":
            raise ValueError(
                f"{name}={str(options[name])[:60]} needs the whole model in memory, which quantize_file does not hold:"
                f" leave {name} out, or use ocs.quantize and ocs.save"
            )
    return Request.of(options)


def _check_data_free(plans: Iterable[LayerPlan]) -> None:
    """Refuse what needs inputs, or all layers at once; and rules of the caller's own, by which nothing can go on."""
    for plan in plans:
        options = plan.options
        needs = {
            f"abits={options.abits} with act_scale={options.act_scale!r}": plan.needs_statistics,
            f"rounding={options.rounding!r}": plan.quantized and options.rounding in ("gptq", "learned"),
            "correct_bias=True": plan.needs_mean,
            'wbits="auto"': plan.quantized and options.automatic,
            "a function as select": plan.quantized and callable(options.select),
        }
        for what, asked in needs.items():
            if asked:
                raise ValueError(
                    f"{plan.name}: {what} is not for quantize_file, which sees no inputs and one layer at a time: leave"
                    " it (abits: act_scale='dynamic' needs no inputs), or use ocs.quantize and ocs.save"
                )


def _opened(model: Any, weights: Any) -> tuple[nn.Module, Source]:
    """Make the model on the meta device, one of our own, and open its files."""
    if isinstance(model, nn.Module):
        if weights is None:
            raise TypeError("quantize_file(model, out, weights=...): say where the weights are, a folder or a file")
        return copy.deepcopy(unwrapped(model)), Source(weights)
    if weights is not None:
        raise TypeError(f"weights={str(weights)!r} is for a model that is an nn.Module: a folder brings its own")
    source = Source(model)
    if not (source.path / CONFIG).is_file():
        raise ValueError(f"{model}: it has no config.json, which says what model it is: give that, and weights=")
    from ocs.hf import on_meta

    return on_meta(source.path, next((each for each in source.dtypes.values() if each.is_floating_point), None)), source


def _filled(model: nn.Module, source: Source) -> dict[int, str]:
    """Read all that is no weight of a layer; give the names of tensors in the files by their id in the model."""
    entries, names = entries_of(model, {}), _every_name(model)
    found = sources_of(source, {entry.name: names[id(entry.tensor)] for entry in entries}, entries, model)
    waits = _weights_of_layers(model)
    of_file = {}
    for entry in entries:
        tensor, name = entry.tensor, found[entry.name]
        if id(tensor) not in waits:
            new = source.read(name, tensor.dtype)
            tensor = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
            for table, key in entry.places:
                table[key] = tensor
        elif not tensor.is_meta:
            raise ValueError(f"{entry.name}: it holds values: build the model on the meta device, torch.device('meta')")
        of_file[id(tensor)] = name
    return of_file


def _every_name(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for prefix, module in named_modules(model, every_name=True):
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    names.setdefault(id(tensor), []).append(full_name(prefix, key))
    return names


def _weights_of_layers(model: nn.Module) -> set[int]:
    """Tell the parameters that are large, by id; all others may say what inputs of layers look like."""
    layers = [module for _, module in named_modules(model) if is_quantizable(module)]
    return {id(parameter) for layer in layers for parameter in layer._parameters.values() if is_weight(parameter)}


# --- Units ------------------------------------------------------------------------------------------------------------


def _begin(folder: Path, job: Job) -> None:
    """Make the folder for what is unfinished, or find it as it was left."""
    work = folder / WORK
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: it is no folder")
    if (work / _RECORD).exists():
        return
    if any((folder / name).exists() for name in (INDEX, CONFIG)) or any(folder.glob("*.safetensors")):
        raise FileExistsError(f"{folder}: it holds a model already: give another folder, or remove it")
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"{folder}: there is no folder {folder.parent}")
    shutil.rmtree(work, ignore_errors=True)  # what was left before there was a record
    work.mkdir(parents=True)
    job.layout.begin(work)
    with replacing(work / _RECORD) as partial:
        partial.write_text(json.dumps(job.record), encoding="utf-8")


def _check_record(work: Path, record: Mapping[str, Any]) -> None:
    """Refuse to go on with what was begun otherwise."""
    begun = json.loads((work / _RECORD).read_text(encoding="utf-8"))
    for part, (then, now) in ((name, (begun.get(name), record[name])) for name in record):
        if then == now:
            continue
        both = [each if isinstance(each, dict) else {"": each} for each in (then, now)]
        name = next(name for each in both for name in each if both[0].get(name) != both[1].get(name))
        raise ValueError(
            f"{work.parent}: what is unfinished there was begun with other {part}: {name}"
            f" {str(both[0].get(name))[:80]}, now {str(both[1].get(name))[:80]}; call it as it was begun,"
            f" or remove {work}"
        )


def _make_units(folder: Path, job: Job, progress: bool | None) -> None:
    """Make this rank's units, those that are there already left out."""
    owners, rank, work = _shared([unit.size for unit in job.units], rank_count()), own_rank(), folder / WORK
    mine = [i for i, owner in enumerate(owners) if owner == rank]
    memory = _memory_for(job.units[i] for i in mine)
    for at, i in enumerate(with_progress(mine, "quantize", progress if rank == 0 else False)):
        path = _unit_path(work, i)
        if _is_made(path, folder, job):
            continue
        for following in mine[at : at + 2]:
            for tensor in job.units[following].waiting:
                job.source.expect(job.of_file[id(tensor)])
        tensors, lines = _made(job.units[i], job, memory)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"sums": job.layout.write(work, tensors), "lines": lines}), encoding="utf-8")
        partial.replace(path)


def _unit_path(work: Path, number: int) -> Path:
    return work / f"unit-{number:05d}.json"


def _is_made(path: Path, folder: Path, job: Job) -> bool:
    """Tell whether a unit was made, and what was written of it is undamaged where that is not finished."""
    if not path.exists():
        return False
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))["sums"]
    except ValueError:  # the machine stopped, not we
        return False
    files = job.layout.files
    unfinished = {
        name: each for name, each in sums.items() if not (folder / files[job.layout.places[name].shard]).exists()
    }
    return job.layout.holds(folder / WORK, unfinished)


def _shared(sizes: Sequence[int], ranks: int) -> list[int]:
    """Share work out among ranks, the largest pieces first: the rank of each."""
    loads, shared = [0] * ranks, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        shared[i] = loads.index(min(loads))
        loads[shared[i]] += sizes[i]
    return shared


def _made(unit: Unit, job: Job, memory: torch.Tensor) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Make a unit's tensors, and its lines of the report."""
    read = _read(unit, job, memory)
    if not unit.plans:
        held = {entry.name: entry for entry in unit.floats if not entry.tensor.is_meta}
        waited = {entry.name: read[id(entry.tensor)] for entry in unit.floats if entry.tensor.is_meta}
        return {name: as_stored(entry) for name, entry in held.items()} | waited, []
    plans = [_with_weights(plan, read) for plan in unit.plans]
    results = quantize_layers(plans, job.facts, explain=job.request.model.explained, progress=False)
    lines = [asdict(_in_short(line)) for line in report_lines(results)]
    layers = {result.plan.name: result.replacement for result in results}
    del plans, results, read  # the floats, before there are packed integers
    tensors, header = stored_layers(layers)
    for name, said in header["layers"].items():
        if said != job.layout.header["layers"][name]:
            raise RuntimeError(f"{name} is {said}, planned was {job.layout.header['layers'][name]}")
    return tensors, lines


def _memory_for(units: Iterable[Unit]) -> torch.Tensor:
    """Make room for the weights of any one of these units, which new memory for each would slow down several times."""
    most = max((sum(map(_room, unit.waiting)) for unit in units), default=0)
    return torch.from_numpy(np.empty(most, np.uint8))  # in large pages


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * max(tensor.element_size(), 4) // 64) * 64


def _read(unit: Unit, job: Job, memory: torch.Tensor) -> dict[int, nn.Parameter]:
    """Read what of a unit is in files, by id in the model; weights of layers in float32, as they are quantized."""
    read, start = {}, 0
    exact = not unit.plans or any(plan.target.permanent is not None for plan in unit.plans)  # by a weight in its dtype
    for old in unit.waiting:
        dtype = old.dtype if exact or old.dtype.itemsize > 4 else torch.float32
        place = memory[start : start + old.numel() * dtype.itemsize].view(dtype).view(old.shape)
        read[id(old)] = nn.Parameter(job.source.read(job.of_file[id(old)], old.dtype, place), requires_grad=False)
        start += _room(old)
    return read


def _with_weights(plan: LayerPlan, read: Mapping[int, nn.Parameter]) -> LayerPlan:
    """Give a copy of a layer its weights; the layer itself stays without."""
    module = plan.target.module
    names = plan.kind.weight_names(module)
    layer = with_parameters(module, **{name: read[id(module._parameters[name])] for name in names})
    target = replace(plan.target, module=layer, permanent=made_permanent(layer))
    return replace(plan, target=target, shell=plan.module)


def _in_short(line: LayerReport) -> LayerReport:
    """Keep the least and the largest of scales and thresholds: a large model has millions."""
    ends = {name: getattr(line, name) for name in ("scale", "threshold")}
    return replace(line, **{name: (min(x), max(x)) if isinstance(x, tuple) and x else x for name, x in ends.items()})


# --- The whole --------------------------------------------------------------------------------------------------------


def _read_units(work: Path, job: Job) -> tuple[dict[str, int], dict[str, list[Any]]]:
    """Give the sums of all tensors, and the lines of the report by layer, once all units are there."""
    sums: dict[str, int] = {}
    lines: dict[str, list[Any]] = {}
    for path in (_unit_path(work, number) for number in range(len(job.units))):
        if not path.exists():
            raise FileNotFoundError(f"{path}: there is no such file: all ranks must see the same folder {work.parent}")
        unit = json.loads(path.read_text(encoding="utf-8"))
        sums |= unit["sums"]
        for line in unit["lines"]:
            lines.setdefault(line["name"], []).append(line)
    return sums, lines


def _finish(folder: Path, job: Job, sums: Mapping[str, int]) -> None:
    """Give this rank's shards their headers and names."""
    for shard in range(own_rank(), len(job.layout.files), rank_count()):
        if not (folder / job.layout.files[shard]).exists():
            job.layout.finish(shard, folder / WORK, folder, sums)


def _end(folder: Path, job: Job) -> None:
    """Make the folder complete."""
    job.layout.write_index(folder)
    shutil.rmtree(folder / WORK)


def _write_beside(folder: Path, job: Job) -> None:
    """Write the configuration and the tokenizer of a model of transformers, where the source has them."""
    source = job.source.path
    if not (source / CONFIG).is_file() or not callable(getattr(type(job.model), "save_pretrained", None)):
        return
    for path in source.iterdir():
        if path.is_file() and path.suffix in _BESIDE and path.name not in (CONFIG, INDEX):
            shutil.copy(path, folder / path.name)
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "ocs", "packed": True, **_as_json(job.options)}
    with replacing(folder / CONFIG) as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what JSON has not; nobody reads options of what is quantized."""
    found = {}
    for name, value in options.items():
        try:
            found[name] = json.loads(json.dumps(value))
        except TypeError:
            continue
    return found


def _report(job: Job, made: Mapping[str, list[Any]]) -> Report:
    """Say what became of each layer."""
    lines: list[LayerReport] = []
    for plan in job.plans:
        own = made.get(plan.name)
        lines += report_lines([LayerResult(plan, plan.options)]) if own is None else map(_as_line, own)
    before, quantized = sizes_of(job.model, {}), [tensor for unit in job.units for tensor in unit.quantized.values()]
    return Report(
        tuple(lines), job.settings, model_bytes=before.model, weight_bytes=before.weights,
        float_weight_bytes=before.weights - sum(map(bytes_of, quantized)),
        file_bytes=sum(map(job.layout.size, range(len(job.layout.files)))),
    )  # fmt: skip


def _as_line(said: Mapping[str, Any]) -> LayerReport:
    histogram = said["histogram"]
    values = {name: _tuples(value) for name, value in said.items()}
    if histogram is not None:
        values["histogram"] = Histogram(**{name: _tuples(value) for name, value in histogram.items()})
    return LayerReport(**values)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
