"""How a layer quantizes its input: the grid that it is rounded to, and what calibration gave."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from ocs.kernels.constants import qmax
from ocs.weight.arguments import check_bits, check_choice, check_clip
from ocs.weight.types import Split

ActSplit = Literal["static", "oracle"]
ActScale = Literal["static", "dynamic"]


@dataclass(frozen=True)
class InputGrid:
    """How a layer rounds and splits its input; files keep all of it."""

    bits: int
    signed: bool = True  # integers -qmax .. qmax, else 0 .. 2^k - 1
    splits: int = 0  # in each group
    split: Split = "qa"
    act_split: ActSplit = "static"
    clip: str | float = "none"  # which method gave the threshold, or gives it for each batch
    act_scale: ActScale = "static"  # or "dynamic": each row, a vector over the channels, has a scale of its own

    @property
    def qmax(self) -> int:
        """The largest integer of the grid."""
        return qmax(self.bits if self.signed else self.bits + 1)

    @property
    def oracle(self) -> bool:
        """Whether each batch has its own splits and scale."""
        return self.act_split == "oracle"

    @property
    def dynamic(self) -> bool:
        """Whether each row of an input has its own scale, measured as it arrives."""
        return self.act_scale == "dynamic"

    @property
    def calibrated(self) -> bool:
        """Whether its scale comes from calibration."""
        return not self.oracle and not self.dynamic

    @property
    def split_once(self) -> bool:
        """Whether channels are split that calibration chose."""
        return self.splits > 0 and not self.oracle

    def __str__(self) -> str:
        sign = "" if self.signed else " unsigned"
        rows = ", a scale per row" if self.dynamic else ""
        kind = " oracle" if self.oracle else ""
        splits = f", {self.splits}{kind} splits" if self.splits else ""
        return f"{self.bits}{sign} bits{rows}{splits}"


def check_grid(grid: InputGrid) -> None:
    """Refuse a grid that cannot be: it may come from a stranger's file."""
    check_bits("bits", grid.bits)
    check_choice("split", grid.split, get_args(Split))
    check_choice("act_split", grid.act_split, get_args(ActSplit))
    check_choice("act_scale", grid.act_scale, get_args(ActScale))
    check_clip("clip", grid.clip)
    if not isinstance(grid.signed, bool) or type(grid.splits) is not int or grid.splits < 0:
        raise ValueError(f"signed={grid.signed!r}, splits={grid.splits!r}: use a bool and a number of splits")
    if grid.dynamic and grid != InputGrid(grid.bits, splits=grid.splits, split=grid.split, act_scale="dynamic"):
        raise ValueError("act_scale='dynamic': such a grid is signed, neither clipped nor split by each batch")


class QuantizedInput(NamedTuple):
    """The grid of a layer's input, and what calibration gave: no scale where each batch or row has its own."""

    grid: InputGrid
    scale: Tensor | None = None  # float32 []
    source: Tensor | None = None  # int64 [C + n]: the original channel of each expanded one, group by group
