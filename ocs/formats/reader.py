"""Read a file that ocs.save wrote, or that claims so: nothing in it is trusted."""

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ocs.formats.contents import crc32, full_name
from ocs.kernels.constants import MAX_BITS, MIN_BITS
from ocs.nn.input import InputGrid, check_grid
from ocs.nn.state import calibrated_buffers, weight_buffers
from ocs.weight.blocks import GROUP_STEP

FORMAT = 7  # 1 had neither quantized inputs nor folded batch norms, 2 no integers that two layers share, 3 no inputs
# with a scale for each row, 4 none of which a channel is split repeatedly, 5 no scales of groups of input channels, and
# none split into equal parts, 6 none that is split and has a scale for each row
MOST_LEVELS = 16  # of lists and dicts in a header; we write some 5


RANGES = ("input_range", "output_range")  # of layers, each in a table of its own


@dataclass(frozen=True)
class SavedLayer:
    """What a file's header says of a quantized layer."""

    kind: str
    bits: int
    expand: bool
    settings: dict[str, Any]
    weights: dict[str, list[int]]  # the shapes of the integers
    input: dict[str, Any] | None = None  # of an InputGrid
    tied: str = ""  # the embedding whose integers it has
    group: int = 0  # the input channels that share a scale, where there is one for each group of them

    def __post_init__(self) -> None:
        found = [type(each) for each in (self.kind, self.bits, self.expand, self.settings, self.weights, self.tied)]
        if type(self.group) is not int or self.group < 0 or self.group % GROUP_STEP:
            raise TypeError
        if found != [str, int, bool, dict, dict, str] or not MIN_BITS <= self.bits <= MAX_BITS:
            raise TypeError
        if type(self.input) not in (dict, type(None)) or not all(
            _is_list_of(int, each) for each in self.weights.values()
        ):
            raise TypeError

    def grid(self) -> InputGrid | None:
        """Give the grid of the input, None where that is not quantized; a ValueError where it cannot be so."""
        if self.input is None:
            return None
        try:
            grid = InputGrid(**self.input)
            check_grid(grid)
        except (TypeError, ValueError) as error:
            raise ValueError(f"its input is described wrongly ({str(error)[:200]})") from error
        return grid


class Reader:
    """An open file, every part of which is checked before it is used."""

    def __init__(self, file: Any) -> None:
        self.file = file
        metadata = file.metadata() or {}
        if "ocs" not in metadata:
            raise ValueError("it was not written by ocs.save")
        try:
            header = _checked_header(metadata)
            self.layers = {name: SavedLayer(**saved) for name, saved in header["layers"].items()}
            self.batch_norms = header.get("batch_norms", [])
            self.ranges = {what: _checked_ranges(header.get(f"{what}s", {})) for what in RANGES}
            self.sums = header["tensors"]
            if not _is_list_of(str, self.batch_norms) or not _is_list_of(int, [*self.sums.values()]):
                raise TypeError
        except (LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError("its header is damaged") from error
        if set(self.sums) != set(file.keys()):
            raise ValueError("its header is damaged")

    def of_layers(self) -> set[str]:
        """Name the tensors of quantized layers: integers, scales and sources of weights and inputs."""
        names = set()
        for layer, saved in self.layers.items():
            if not saved.tied:
                names |= {full_name(layer, buffer) for weight in saved.weights for buffer in weight_buffers(weight)}
            names |= {full_name(layer, buffer) for buffer in calibrated_buffers(saved.grid())}
        return names

    def shape(self, name: str) -> list[int]:
        """Tell the shape of a tensor without reading it."""
        if name not in self.sums:
            raise ValueError(f"it has no {name}")
        return self.file.get_slice(name).get_shape()

    def read(self, name: str, shape: list[int], dtype: str | None = None) -> Tensor:
        """Read a tensor, which must have just this shape (and safetensors dtype)."""
        found = self.shape(name)
        if found != shape:
            raise ValueError(f"{name} is {found}, the model needs {shape}")
        if dtype not in (None, self.file.get_slice(name).get_dtype()):
            raise ValueError(f"{name} is not {dtype}")
        tensor = self.file.get_tensor(name).clone()  # not a window on a file that may change
        if crc32(tensor) != self.sums[name]:
            raise ValueError(f"{name} is damaged")
        return tensor


def _checked_header(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Parse the header; a KeyError where format or sum are wrong, a ValueError where a newer version wrote it."""
    try:
        header = json.loads(metadata["ocs"])
    except ValueError as error:  # no JSON, or numbers of thousands of digits
        raise KeyError("ocs") from error
    if _is_deep(header, MOST_LEVELS):
        raise KeyError("levels")
    if type(header["format"]) is not int or header["format"] < 1:
        raise KeyError("format")
    if header["format"] > FORMAT:
        version, number = str(header["ocs"])[:20], str(header["format"])[:20]
        raise ValueError(f"ocs {version} wrote it in format {number}, newer than {FORMAT}: upgrade torch-ocs")
    if metadata["crc32"] != str(zlib.crc32(metadata["ocs"].encode())):
        raise KeyError("crc32")
    return header


def _checked_ranges(ranges: Any) -> dict[str, tuple[float, float]]:
    """Check the ranges of layers' outputs; a TypeError where one is none."""
    for bounds in ranges.values():
        if not _is_list_of(float, bounds) or len(bounds) != 2 or not -math.inf < bounds[0] <= bounds[1] < math.inf:
            raise TypeError
    return {name: (low, high) for name, (low, high) in ranges.items()}


def _is_list_of(kind: type, value: Any) -> bool:
    return type(value) is list and all(type(each) is kind for each in value)


def _is_deep(value: Any, levels: int) -> bool:
    """Tell whether lists and dicts are nested in more than so many levels: what copies or writes them may recurse."""
    if not isinstance(value, list | dict):
        return False
    return not levels or any(
        _is_deep(each, levels - 1) for each in (value.values() if isinstance(value, dict) else value)
    )
