"""What is measured: a float model, its data, and how well a quantized copy of it does on them."""

from __future__ import annotations

import bisect
import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from language_model import losses
from torch import Tensor, nn

import ocs

Options = Mapping[str, Any]
Advance = Callable[[int], object]
Measured = tuple[Tensor, dict[str, Any], dict[str, float]]  # sums over this rank's share, details, seconds by part
Z = 1.959964  # of a 95 % interval
SYNTHETIC = 512  # inputs


@dataclass(frozen=True)
class Metric:
    """What a cell's number is, and how it follows from sums that add up over batches and ranks."""

    name: str
    higher_is_better: bool
    digits: int
    estimate: Callable[[list[float]], tuple[float, float, float]]  # the value, and its 95 % interval
    relative: bool = False  # a size: no float model's to compare with, and no best

    def best(self, results: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The best result, the first where several are; None of none."""
        sign = 1 if self.higher_is_better else -1
        return max(results, key=lambda result: sign * result["value"], default=None)


def wilson(sums: list[float]) -> tuple[float, float, float]:
    """Percent and Wilson's interval, from [count, right answers]."""
    n, right = sums
    p, z2 = right / n, Z * Z
    center, half = (p + z2 / (2 * n)) / (1 + z2 / n), Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return 100 * p, 100 * max(center - half, 0.0), 100 * min(center + half, 1.0)


def perplexity(sums: list[float]) -> tuple[float, float, float]:
    """exp of the mean loss, and an interval from how much windows of text differ.

    sums: over all windows of text, with loss s and t words each: of s, s^2, s t, t, t^2, and their number. Words of one
    window are not independent, windows nearly are.
    """
    s, ss, st, t, tt, windows = sums
    mean = s / t
    spread = max(ss - 2 * mean * st + mean * mean * tt, 0.0)
    half = Z * math.sqrt(spread * windows / max(windows - 1, 1)) / t
    return tuple(math.exp(x) if x < 700 else math.inf for x in (mean, mean - half, mean + half))


TOP1 = Metric("top-1 %", True, 1, wilson)
PERPLEXITY = Metric("perplexity", False, 2, perplexity)
SIZE = Metric("relative size", False, 3, lambda sums: (sums[0] / sums[1],) * 3, relative=True)


class Task(ABC):
    """A float model and how its quantized copies are judged."""

    name: str
    what: str  # the data, in words
    identity: list[Any]  # besides the options, all that a result depends on
    metric: Metric
    unit: str
    count: int  # units of this rank's share, for the progress bar

    def prepare(self, options: Options | None) -> None:  # noqa: B027 - most need nothing
        """Do once what measuring under these options needs; ranks wait for each other here."""

    @abstractmethod
    def measure(self, options: Options | None, advance: Advance) -> Measured:
        """Judge a quantized copy of the float model (None: the float model) on this rank's share of the data."""


def _suffices(options: Options) -> bool:
    """Whether statistics of inputs are enough: how much layers count is measured, integers are learned, on inputs."""
    return options.get("allocate") != "error" and "size_of" not in options and options.get("rounding") != "learned"


def _needs_statistics(options: Options) -> bool:
    """Whether inputs are quantized by statistics alone: what `calibrated` shows tells of them, too."""
    return "abits" in options and not options.get("calibrated")


class Evaluation(Task):
    """A network on batches; subclasses say what a batch tells."""

    model: nn.Module  # float, in eval mode, on its device
    batches: Iterable[Any]
    sums: int  # how many numbers score() adds up
    _synthetic: list[Tensor] | None = None

    @property
    def left_float(self) -> dict[str, Any]:
        """The option skip, where the network has more to leave float than its first convolution."""
        return {}

    @cached_property
    def _seen(self) -> dict[bool | str, ocs.Calibration]:
        """What calibration told, by the option `calibrated`."""
        return {}

    @abstractmethod
    def score(self, model: nn.Module, batch: Any, size: int | None) -> Iterator[tuple[int, Tensor]]:
        """Units done, and float64 sums for the metric, bit by bit; size: how many images may run at once."""

    def shown(self) -> Any:
        """What calibrates, as ocs.quantize takes it; nothing of it is scored."""
        raise ValueError(f"{self.name}: there is nothing to calibrate with; give --calibration")

    def shape(self) -> tuple[int, ...]:
        """Of one input of a network with BatchNorms."""
        raise ValueError(f"{self.name}: its inputs cannot be synthesized")

    def prepare(self, options: Options | None) -> None:
        """Once for all settings that need it: inputs synthesized, or all that calibration can tell."""
        options = options or {}
        shown = options.get("calibrated")
        if self._synthetic is None and "synthetic" in (options.get("norms"), shown):
            self._synthetic = ocs.synthesize(self.model, self.shape(), images=SYNTHETIC, progress=False)
        if shown and shown not in self._seen and _suffices(options):
            self._seen[shown] = ocs.calibrate(self.model, self._calibrating(shown), moments=True, progress=False)

    def _calibrating(self, shown: bool | str) -> Any:
        """The inputs of the option `calibrated`."""
        return self._synthetic if shown == "synthetic" else self.shown()

    def quantized(self, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
        """A folded copy (the same values as expanded, at the float model's cost), and what its report says.

        Besides those of ocs.quantize, options may be `calibrated` (True: with what calibrates; or with "synthetic"
        inputs), `norms` (estimated again by what calibrates, "measured", or on "synthetic" inputs), `size_of`
        (wbits="auto" in the size of so many bits), `within_group` (the largest r in the size of scales for groups of so
        many channels).
        """
        suffices = _suffices(options)
        norms, size_of, shown = (options.pop(name, None) for name in ("norms", "size_of", "calibrated"))
        given: dict[str, Any] = {"expand": False, "progress": False, "explain": False, **self.left_float}
        if "within_group" in options:
            options["r"] = self._largest_r(options, options.pop("within_group"))
        if size_of is not None:
            uniform = {name: value for name, value in options.items() if name != "rounding"}  # which may want inputs
            report = ocs.quantize(copy.deepcopy(self.model), wbits=size_of, **uniform, **given)
            given |= {"wbits": "auto", "budget": report.packed_bytes}
        if shown:
            given["calibration"] = self._seen[shown] if suffices else self._calibrating(shown)
        with torch.inference_mode(False):  # which learning cannot do with
            model = copy.deepcopy(self.model)
            report = ocs.quantize(model, **options, **given)
        if norms == "measured":
            ocs.reestimate_batchnorm(model, self.shown(), progress=False)
        elif norms == "synthetic":
            ocs.reestimate_batchnorm(model, self._synthetic, reference=self.model, progress=False)
        return model, {"mean_sqnr_db": report.mean_sqnr_db, "r": options.get("r", 0.0)}

    def _largest_r(self, options: Options, group: int) -> float:
        """The largest expand ratio, in thousandths, that takes no more bytes than groups without splits."""

        def size(**given: Any) -> int:
            common = {"wbits": options["wbits"], "explain": False, "progress": False, **self.left_float}
            return ocs.quantize(copy.deepcopy(self.model), expand=False, **common, **given).packed_bytes

        budget = size(granularity="group", group=group)
        scales = {name: options[name] for name in ("granularity", "group") if name in options}
        return bisect.bisect_right(range(1000), budget, key=lambda r: size(r=r / 1000, **scales)) / 1000 - 0.001

    @torch.inference_mode()
    def measure(self, options: Options | None, advance: Advance) -> Measured:
        """See Task."""
        begin = time.perf_counter()
        settings = dict(options or {})
        size = settings.pop("batch", None)
        model, details = (self.model, {}) if options is None else self.quantized(settings)
        sums = torch.zeros(self.sums, dtype=torch.float64, device=next(model.parameters()).device)
        ready = time.perf_counter()
        data, last = 0.0, ready
        for batch in self.batches:
            data += time.perf_counter() - last
            for done, part in self.score(model, batch, size):
                sums += part
                advance(done)
            last = time.perf_counter()
        sums = sums.cpu()  # waits for the device
        seconds = {"planning": ready - begin, "data": data, "forward": time.perf_counter() - ready - data}
        return sums, details, seconds


class Classification(Evaluation):
    """Top-1 accuracy of a network on images, and statistics of its layers' inputs from others."""

    metric, unit, sums = TOP1, "image", 2

    @property
    def left_float(self) -> dict[str, Any]:
        """The first convolution, as in the paper's tables; that of patches, too, which quantize would take."""
        first = (name for name, module in self.model.named_modules() if isinstance(module, nn.Conv2d))
        return {"skip": next(first, None)}

    def __init__(
        self, name: str, what: str, identity: list[Any], model: nn.Module, batches: Any, calibration: Any,
        normalize: Callable[[Tensor], Tensor], shape: tuple[int, ...],
    ) -> None:  # fmt: skip
        """batches, calibration: data.Batches, this rank's share; normalize: makes floats; shape: (C, H, W)."""
        self.name, self.what, self.identity, self.model, self.count = name, what, identity, model, batches.images
        self.batches, self.calibration, self._normalize, self._shape = batches, calibration, normalize, shape
        self.device = next(model.parameters()).device
        self._statistics: ocs.Calibration | None = None

    def _ready(self, images: Tensor) -> Tensor:
        return self._normalize(images.to(self.device)).contiguous(memory_format=torch.channels_last)

    def shown(self) -> Any:
        """The calibration images, batch by batch."""
        if self.calibration is None:
            super().shown()
        return [self._ready(images) for images, _ in self.calibration]

    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self._shape

    def prepare(self, options: Options | None) -> None:
        """Look at the calibration images once, for every setting with quantized inputs; ranks add their shares up."""
        super().prepare(options)
        if self._statistics is None and _needs_statistics(options or {}):
            self._statistics = ocs.calibrate(self.model, self.shown(), progress=False)

    def quantized(self, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
        """See Evaluation; with the statistics where inputs are quantized."""
        if _needs_statistics(options):
            options["calibration"] = self._statistics
        return super().quantized(options)

    def score(self, model: nn.Module, batch: Any, size: int | None) -> Iterator[tuple[int, Tensor]]:
        """[images, right answers]."""
        images, labels = batch
        for x, y in zip(self._ready(images).split(size or len(images)), labels.split(size or len(labels)), strict=True):
            right = (model(x).argmax(1) == y.to(self.device)).sum()
            yield len(y), torch.stack((torch.full_like(right, len(y)), right)).double()


class LanguageModelling(Evaluation):
    """Perplexity of a language model on streams of text, a group of streams at a time."""

    metric, unit, sums = PERPLEXITY, "word", 6

    @property
    def left_float(self) -> dict[str, Any]:
        """The head that is tied to the embedding, which is looked up in floats."""
        tied = getattr(self.model, "config", {}).get("tied", False)
        return {"skip": "decoder"} if tied else {}

    def __init__(
        self, name: str, what: str, identity: list[Any], model: nn.Module, groups: list[Tensor], shown: Tensor | None
    ) -> None:
        """groups: int64 [T, B] each, this rank's share; shown: int64 [T, B], what calibrates."""
        self.text = shown
        self.name, self.what, self.identity, self.model, self.batches = name, what, identity, model, groups
        self.count = sum((len(group) - 1) * group.shape[1] for group in groups)

    def shown(self) -> Any:
        """Reads the text that calibrates, window by window."""
        text = self.text
        if text is None:
            super().shown()
        return lambda model: list(losses(model, text.to(next(model.parameters()).device)))

    def score(self, model: nn.Module, batch: Any, size: int | None) -> Iterator[tuple[int, Tensor]]:
        """The six sums of perplexity(), window by window."""
        for loss in losses(model, batch.to(next(model.parameters()).device)):
            steps, streams = loss.shape
            s = loss.double().sum(0)
            sums = torch.stack([s.sum(), (s * s).sum(), steps * s.sum()])
            known = torch.tensor([steps * streams, steps * steps * streams, streams], dtype=s.dtype, device=s.device)
            yield loss.numel(), torch.cat([sums, known])
