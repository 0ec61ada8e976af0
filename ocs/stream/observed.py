"""Calibration of a model whose weights are in files: batch by batch, and on from the batch where it was stopped.

Each batch runs through the model as it is, whose weights are read as they are used (ocs.stream.file_weights), and is
seen by the observers that ocs.quantize would have look at it, in the same order, so that they see the same to the bit.
What they keep that is large, second moments and histograms of channels, is in files but while one of them looks on.
"""

import json
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ocs.calibration.additions import Additions, Term
from ocs.calibration.batches import check_data
from ocs.calibration.calibrate import Calibration, collect
from ocs.calibration.gram import LayerMoments
from ocs.calibration.ranks import rank_count, sum_over_ranks
from ocs.calibration.run import Data, Watch
from ocs.calibration.statistics import Statistics
from ocs.kernels.constants import OCTAVE_BINS
from ocs.model.rewrite import for_a_while
from ocs.model.wrappers import named_modules
from ocs.plan.input_facts import Watches
from ocs.replace_file import naming, replacing
from ocs.stream.file_weights import FileWeights

T = TypeVar("T")
_LARGE = ("octaves", "_sums")  # what Statistics and SecondMoments have that grows with channels, or their square
_STATE = "state.safetensors"


class Spilled:
    """An observer whose large tensors are in files but while it looks at something.

    now: names the step that is being done; what earlier ones left stays as it was.
    """

    def __init__(self, observer: Statistics | LayerMoments, path: Path, now: Callable[[], int]) -> None:
        self.observer, self.path, self.now = observer, path, now
        self.written: dict[str, tuple[str, int]] = {}  # the file of each part, and its sum
        self.parts = [*observer.values()] if isinstance(observer, LayerMoments) else [observer]
        self.drop()

    @property
    def inputs(self) -> int:
        """Count what it has seen."""
        return self.observer.inputs

    def observe(self, layer: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Take in one call of the layer with these arguments by name."""
        self._changed(partial(self.observer.observe, layer, arguments))

    def reduce(self) -> None:
        """Merge what all ranks have seen."""
        self._changed(self.observer.reduce)

    def _changed(self, change: Callable[[], None]) -> None:
        self.load()
        change()
        for key, part, field in self._large():
            tensor = getattr(part, field)
            if tensor is not None and tensor.numel():
                path = self.path.with_name(f"{self.path.name}-{key}.{self.now()}.npy")
                with naming(path):
                    np.save(path, tensor.numpy())
                self.written[key] = path.name, checksum(tensor)
        self.drop()

    def load(self) -> None:
        """Hold what is in files."""
        for key, part, field in self._large():
            if key in self.written:
                setattr(part, field, torch.from_numpy(np.load(self.path.with_name(self.written[key][0]))))
            elif field == "octaves":
                part.octaves = torch.zeros(part.channels or 0, OCTAVE_BINS, dtype=torch.int64, device="cpu")

    def drop(self) -> None:
        """Hold no more of it."""
        for _, part, field in self._large():
            setattr(part, field, None)

    def _large(self) -> Iterator[tuple[str, Any, str]]:
        for i, part in enumerate(self.parts):
            yield from ((f"{i}", part, field) for field in _LARGE if field in vars(part))

    def small(self) -> Iterator[tuple[str, Any, str]]:
        """List what it holds all the time."""
        for i, part in enumerate(self.parts):
            yield from ((f"{i}.{field}", part, field) for field in vars(part) if field not in _LARGE)


class Observed:
    """What calibration has seen of a model whose weights are in files.

    Args:
        folder: where it is kept, which need not be there yet.
        weights: those in files.
    """

    def __init__(self, folder: Path, weights: FileWeights) -> None:
        self.folder, self.weights = folder, weights
        self.spilled: dict[str, tuple[str, Spilled]] = {}
        self.seen: list[int] = []  # of each batch that was run, a sum of its bytes

    def run(self, model: nn.Module, watches: Watches, data: Data, progress: bool | None) -> Calibration:
        """Let the watches see the batches, those that they have seen already left out."""
        inputs, moments = (self._spill(each, kind) for kind, each in zip("im", watches, strict=True))
        additions = Additions(dict(named_modules(model)))
        if self._restored(additions):
            finish = partial(self._check_same, data)
        else:
            left = data if isinstance(data, Callable) else self._left(data, additions)
            body = partial(collect, model, left, inputs, moments, progress, "calibration", additions)
            try:
                for_a_while(self.weights.steps(), body)
            except RuntimeError as error:
                if "meta" in str(error):
                    error.add_note("what the model keeps as a plain attribute has no values there: make it a buffer")
                raise
            finish = partial(self._keep, additions, complete=True)
        sum_over_ranks(lambda: finish() or [], 0)
        reached = [{w.name: w.observer.observer for w in each if w.observer.inputs} for each in (inputs, moments)]
        return Calibration(reached[0], moments=reached[1], terms=additions.ranges)

    def with_values(self, names: Collection[str], body: Callable[[], T]) -> T:
        """Call body() while what was seen of these layers is held whole."""
        chosen = [spilled for name, spilled in self.spilled.values() if name in names]
        try:
            for spilled in chosen:
                spilled.load()
            return body()
        finally:
            for spilled in chosen:
                spilled.drop()

    def _spill(self, watches: list[Watch], kind: str) -> list[Watch]:
        made = []
        for i, watch in enumerate(watches):
            key = f"{kind}{i}"
            spilled = Spilled(watch.observer, self.folder / key, lambda: len(self.seen))
            self.spilled[key] = watch.name, spilled
            made.append(watch._replace(observer=spilled))
        return made

    # --- Batches

    def _left(self, data: Any, additions: Additions) -> Iterator[Any]:
        """Give the batches that were not run yet, and keep what came of them before the next one begins."""
        for own, batch in self._unseen(data):
            if self.seen and rank_count() == 1:
                self._keep(additions, complete=False)
            yield batch
            self.seen.append(own)

    def _unseen(self, data: Any) -> Iterator[tuple[int, Any]]:
        """Give the batches that were not run yet, with their sums; the others must be those that were."""
        check_data(data, "calibration")
        number, done = -1, len(self.seen)
        for number, batch in enumerate([data] if isinstance(data, Tensor) else data):
            own = checksum(batch)
            if number >= done:
                yield own, batch
            elif self.seen[number] != own:
                raise ValueError(self._begun_otherwise(f"batch {number} is another one"))
        if number + 1 < done:
            raise ValueError(self._begun_otherwise(f"there were {done} batches and more, not {number + 1}"))

    def _check_same(self, data: Data) -> None:
        """Refuse other batches than those that were run; a callable's are not seen before it runs."""
        if not isinstance(data, Callable) and next(self._unseen(data), None) is not None:
            raise ValueError(self._begun_otherwise(f"there were {len(self.seen)} batches, and now there are more"))

    def _begun_otherwise(self, what: str) -> str:
        work = self.folder.parent
        return (
            f"{work.parent}: what is unfinished there was begun with other calibration: {what}; give the same batches"
            f" in the same order, or remove {work}"
        )

    # --- What is kept

    def _keep(self, additions: Additions, *, complete: bool) -> None:
        """Write what was seen, so that it can be gone on from here; what was there for earlier batches goes."""
        from safetensors.torch import save_file

        tensors, numbers, written = {}, {}, {}
        for key, (_, spilled) in self.spilled.items():
            written[key] = spilled.written
            for field, part, name in spilled.small():
                value = getattr(part, name)
                (tensors if isinstance(value, Tensor) else numbers)[f"{key}.{field}"] = value
        said = {"seen": self.seen, "complete": complete, "numbers": numbers, "written": written}
        said["ranges"] = [[*term, *found] for term, found in additions.ranges.items()]
        names = {name for files in written.values() for name, _ in files.values()}
        with replacing(self.folder / _STATE) as partial_file:
            save_file(tensors, partial_file, metadata={"ocs": json.dumps(said)})
        for path in self.folder.glob("*.npy"):
            if path.name not in names:
                path.unlink()

    def _restored(self, additions: Additions) -> bool:
        """Take up what was kept, of several ranks if each has all; tell whether that is all."""
        kept: list[tuple[dict[str, Any], dict[str, Tensor]]] = []

        def read() -> list[float]:
            self.folder.mkdir(exist_ok=True)
            kept.extend(self._kept())
            return [sum(said["complete"] for said, _ in kept)]

        complete = sum_over_ranks(read, 1)[0] == rank_count()
        if not kept or not (complete or rank_count() == 1):
            return False
        said, tensors = kept[0]
        self.seen = said["seen"]
        additions.ranges = {Term(*each[:2]): tuple(each[2:]) for each in said["ranges"]}
        for key, (_, spilled) in self.spilled.items():
            spilled.written = {part: tuple(file) for part, file in said["written"][key].items()}
            for field, part, name in spilled.small():
                found = f"{key}.{field}"
                setattr(part, name, tensors[found] if found in tensors else said["numbers"][found])
        return complete

    def _kept(self) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
        """Read what was kept; nothing where that is damaged, as when the machine stopped, not we."""
        from safetensors import safe_open

        if (self.folder / _STATE).exists():
            with safe_open(self.folder / _STATE, "pt") as file:
                said = json.loads(file.metadata()["ocs"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            if all(self._holds(*each) for files in said["written"].values() for each in files.values()):
                yield said, tensors

    def _holds(self, name: str, expected: int) -> bool:
        """Tell whether a file is undamaged."""
        try:
            return checksum(torch.from_numpy(np.load(self.folder / name))) == expected
        except (OSError, ValueError, EOFError):
            return False


def checksum(batch: Any, start: int = 0) -> int:
    """Compute a CRC-32 of what a batch holds: tensors, numbers and texts in tuples, lists and dicts."""
    if isinstance(batch, Tensor):
        text = f"{batch.dtype} {[*batch.shape]}".encode()
        values = batch.detach().cpu().contiguous().flatten()
        return zlib.crc32(values.view(torch.uint8).numpy() if values.numel() else b"", zlib.crc32(text, start))
    if isinstance(batch, Mapping):
        batch = [each for pair in batch.items() for each in pair]
    if isinstance(batch, tuple | list):
        for each in batch:
            start = checksum(each, start)
        return start
    return zlib.crc32(repr(batch).encode(), start) if isinstance(batch, str | int | float | None) else start
