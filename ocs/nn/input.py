"""How a layer quantizes its input: the grid that it is rounded to, and what calibration gave."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from ocs.kernels.constants import qmax
from ocs.weight.arguments import check_bits, check_choice, check_clip
from ocs.weight.types import Split

ActSplit = Literal["static", "oracle"]


@dataclass(frozen=True)
class InputGrid:
    """How a layer rounds and splits its input; files keep all of it."""

    bits: int
    signed: bool = True  # integers -qmax .. qmax, else 0 .. 2^k - 1
    splits: int = 0  # in each group
    split: Split = "qa"
    act_split: ActSplit = "static"
    clip: str | float = "none"  # which method gave the threshold, or gives it for each batch

    @property
    def qmax(self) -> int:
        """The largest integer of the grid."""
        return qmax(self.bits if self.signed else self.bits + 1)

    @property
    def oracle(self) -> bool:
        """Whether each batch has its own splits and scale."""
        return self.act_split == "oracle"

    def __str__(self) -> str:
        sign = "" if self.signed else " unsigned"
        kind = " oracle" if self.oracle else ""
        splits = f", {self.splits}{kind} splits" if self.splits else ""
        return f"{self.bits}{sign} bits{splits}"


def check_grid(grid: InputGrid) -> None:
    """Refuse a grid that cannot be: it may come from a stranger's file."""
    check_bits("bits", grid.bits)
    check_choice("split", grid.split, get_args(Split))
    check_choice("act_split", grid.act_split, get_args(ActSplit))
    check_clip("clip", grid.clip)
    if not isinstance(grid.signed, bool) or type(grid.splits) is not int or grid.splits < 0:
        raise ValueError(f"signed={grid.signed!r}, splits={grid.splits!r}: use a bool and a number of splits")


class QuantizedInput(NamedTuple):
    """The grid of a layer's input and, unless each batch has its own (Oracle OCS), what calibration gave."""

    grid: InputGrid
    scale: Tensor | None = None  # float32 []
    source: Tensor | None = None  # int64 [C + n]: the original channel of each expanded one, group by group
