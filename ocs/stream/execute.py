"""quantize_file(): models that memory does not hold, from files to files, a layer at a time.

The model stands on the meta device. Where data calibrates it, it runs with its weights in files (ocs.stream.observed).
What decides (ocs.plan) sees it whole; then one layer after the other gets its weights, is quantized as quantize() does,
and written to its place in the result (ocs.formats.layout). So the result is that of quantize() and save(), whoever
makes which layers.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from ocs.calibration.calibrate import Calibration
from ocs.calibration.ranks import own_rank, rank_count, sum_over_ranks
from ocs.calibration.run import Data
from ocs.formats.contents import sizes_of
from ocs.formats.source import INDEX
from ocs.formats.storage import as_stored, stored_layers
from ocs.model.batchnorm_folding import with_parameters
from ocs.model.rewrite import keeps_grad_mode
from ocs.model.standardized import made_permanent
from ocs.nn.weights import bytes_of
from ocs.plan.input_facts import Watches, learn
from ocs.plan.layer_plan import LayerPlan
from ocs.plan.quantize_layer import LayerResult, quantize_layers
from ocs.progress import with_progress
from ocs.replace_file import FolderLock, naming, replacing
from ocs.report.data import Histogram, LayerReport, Report
from ocs.report.lines import report_lines
from ocs.stream.job import CONFIG, Job, Unit, blocks_of_their_own, check_values, open_job, plan_job, weights_in_files
from ocs.stream.observed import Observed

T = TypeVar("T")
SHARD = 2_000_000_000  # bytes
WORK = ".unfinished"  # in the folder of the result, what is not complete yet
_RECORD = "record.json"  # there: what is made of what
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

    With calibration the model runs first, batch by batch, each weight read when an operation uses it: memory holds two
    weights, the values of one batch, and some 80 KB of statistics for each layer. Each batch reads all weights once, so
    few large ones are faster than many small ones. Second moments, and histograms of channels to be split, are in files
    in `out` meanwhile: up to 2 GiB for a model, twice while a batch runs; ocs.calibration.gram.BYTES is that bound,
    which here costs disk alone.

    Called again after whatever stopped it, with the same arguments, it goes on where it stopped, with the batch or
    layer that was not finished. Where torch.distributed is initialized (torchrun), the ranks share the layers, and the
    result is that of one; all must see the same folders. Calibration is then that of ocs.quantize: each rank has
    batches of its own, and what was seen of them is kept once all are through.

        ocs.quantize_file("llama-70b", "llama-70b-4bit", wbits=4, r=0.02, recipe="best")
        ocs.quantize_file("llama-70b", "llama-70b-gptq", wbits=4, rounding="gptq", calibration=[{"input_ids": ids}])

    Args:
        model: a folder as transformers' save_pretrained writes it; or a float model on the meta device
            (`with torch.device("meta"): model = Net()`), which stays as it is.
        out: the folder to write, which holds no model yet; its parent exists. Index or single file come last.
        weights: where model is a module: a folder with model.safetensors.index.json or model.safetensors, or one
            safetensors file, whose names are those of its state_dict.
        shard_size: bytes that a file has at most, but for a single larger layer.
        progress: show a bar; by default where it takes over two seconds, a terminal looks on and tqdm is installed.
        options: those of ocs.quantize which do not need the whole model: wbits, r, recipe, overrides, calibration ...
            Calibration is batches, the same ones in the same order when called again, or a callable, whose batches
            nobody compares with those of the call before.

    Returns:
        The Report of ocs.quantize; of scales and thresholds that a layer has many of, it has the least and the largest.

    Raises:
        OSError: files are missing or cannot be written, or `out` holds a model, or another process is at work there.
        ValueError: an option is out of range or needs the whole model, or calibration that is not there; files and
            model do not fit, or with calibration a tensor of the model has no values in either, the error names it; a
            weight or an input holds NaN or Inf; what is unfinished in `out` was begun otherwise.
        TypeError: there is no such option, or calibration is an ocs.Calibration.
    """
    begin = time.perf_counter()
    with torch.inference_mode(False), torch.no_grad(), closing(FolderLock()) as lock:
        opened = _on_all_ranks(lambda: open_job(model, out, weights, shard_size, options))
        folder = Path(out)
        observed = Observed(folder / WORK / f"calibration-{own_rank()}", weights_in_files(opened))

        def run(model: nn.Module, watches: Watches, data: Data, _: bool | None) -> Calibration:
            _on_all_ranks(lambda: check_values(opened))
            _begin(folder, opened.record, lock)
            with blocks_of_their_own():
                return observed.run(model, watches, data, progress)

        plans, facts, *_ = learn(opened.model, opened.plans, opened.request.model, run)
        job = _on_all_ranks(lambda: plan_job(opened, plans, facts, observed))
        _begin(folder, opened.record, lock)
        _on_all_ranks(lambda: _lay_out(folder / WORK, job) if own_rank() == 0 else None)
        _on_all_ranks(lambda: _check_record(folder / WORK, job.record))
        _on_all_ranks(lambda: _make_units(folder, job, observed, progress))
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


# --- Units ------------------------------------------------------------------------------------------------------------


def _begin(folder: Path, record: Mapping[str, Any], lock: FolderLock) -> None:
    """Make the folder for what is unfinished, or find it as it was left by the same call."""
    _on_all_ranks(lambda: _make_folder(folder, record, lock) if own_rank() == 0 else None)
    _on_all_ranks(lambda: _check_record(folder / WORK, record))


def _make_folder(folder: Path, record: Mapping[str, Any], lock: FolderLock) -> None:
    work = folder / WORK
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: it is no folder")
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"{folder}: there is no folder {folder.parent}")
    folder.mkdir(exist_ok=True)
    lock.take(folder)
    if (work / _RECORD).exists():
        return
    if any((folder / name).exists() for name in (INDEX, CONFIG)) or any(folder.glob("*.safetensors")):
        raise FileExistsError(f"{folder}: it holds a model already: give another folder, or remove it")
    shutil.rmtree(work, ignore_errors=True)  # what was left before there was a record
    work.mkdir()
    _write_record(work, record)


def _write_record(work: Path, record: Mapping[str, Any]) -> None:
    with replacing(work / _RECORD) as partial:
        partial.write_text(json.dumps(record), encoding="utf-8")


def _read_record(work: Path) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        record = json.loads((work / _RECORD).read_text(encoding="utf-8"))
        if isinstance(record, dict):
            return record
    raise ValueError(f"{work / _RECORD}: it is damaged: remove {work}, and begin again")


def _lay_out(work: Path, job: Job) -> None:
    """Make the files of the result without values, unless they are there."""
    if "places" not in _read_record(work):
        job.layout.begin(work)
        _write_record(work, job.record)


def _check_record(work: Path, record: Mapping[str, Any]) -> None:
    """Refuse to go on with what was begun otherwise."""
    begun = _read_record(work)
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


def _make_units(folder: Path, job: Job, observed: Observed, progress: bool | None) -> None:
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
        unit = job.units[i]
        tensors, lines = observed.with_values({plan.name for plan in unit.plans}, partial(_made, unit, job, memory))
        unfinished = path.with_suffix(f".{os.getpid()}")
        said = json.dumps({"sums": job.layout.write(work, tensors), "lines": lines})
        with naming(path):
            unfinished.write_text(said, encoding="utf-8")
            unfinished.replace(path)


def _unit_path(work: Path, number: int) -> Path:
    return work / f"unit-{number:05d}.json"


def _is_made(path: Path, folder: Path, job: Job) -> bool:
    """Tell whether a unit was made, and what was written of it is undamaged where that is not finished."""
    if not path.exists():
        return False
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))["sums"]
    except (ValueError, LookupError, TypeError):  # the machine stopped, not we
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
    tensors |= {name: layers[layer].bias.detach() for name, layer in unit.biases.items()}
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
