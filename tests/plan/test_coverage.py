"""Quantizing nothing is an error, less than half a warning; which convolution is the first."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import assert_unchanged, state
from torch import Tensor, nn

import ocs
from ocs.plan.coverage import matmul_weights


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Free(nn.Module):
    """A module of an unknown kind: of its parameters one is multiplied."""

    def __init__(self, rows: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, 8))
        self.pos_embed, self.cls_token = nn.Parameter(torch.randn(1, 9, 8)), nn.Parameter(torch.randn(1, 1, 8))
        self.gain, self.relative_position_bias_table = nn.Parameter(torch.randn(8, 1)), nn.Parameter(torch.ones(9, 2))


def tied(rows: int) -> nn.Module:
    model = nn.ModuleDict({"wte": nn.Embedding(rows, 4), "head": nn.Linear(4, rows), "other": nn.Linear(4, 4)})
    model["head"].weight = model["wte"].weight
    return model


NOTHING = {
    "one convolution": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), {},
                        "skipped: first convolution .0; 216 of the 216 .*; skip=None skips nothing"),
    "subclass": (lambda: nn.Sequential(Doubled(8, 8), nn.Conv2d(3, 2, 1)), {},
                 r"float: Doubled has a forward of its own; ocs.register\(Doubled, .* .0; 64 of the 70"),
    "grouped": (lambda: nn.Sequential(Doubled(4, 4), Doubled(4, 4), nn.utils.weight_norm(nn.Linear(5, 4))), {},
                "float: Doubled .*0, 1; 32 of the 52"),
    "all skipped": (lambda: nn.Sequential(nn.Linear(4, 4)), {"skip": "*"}, r"skipped: skip='\*'"),
    "not reached": (lambda: nn.Sequential(nn.Identity(), nn.Linear(4, 4)),
                    {"abits": 8, "calibration": lambda model: None}, "reached none"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("case", NOTHING)
def test_nothing_is_an_error_that_names_the_largest_cause(case: str) -> None:
    build, options, cause = NOTHING[case]
    model = build()
    before = state(model)
    with pytest.raises(ValueError, match=cause):
        ocs.quantize(model, **options)
    assert_unchanged(model, before)


LITTLE = {
    "half": (lambda: nn.Sequential(Doubled(4, 4), nn.Linear(4, 4)), None),
    "tied": (lambda: tied(8), "only 33% .*: its weight is shared with wte.weight .head; 32 of the 32"),
    "unknown kind": (lambda: nn.Sequential(Free(9), nn.Linear(8, 8)), "only 47% .*Free.* .0; 72 of the 72"),
    "unknown kind, half": (lambda: nn.Sequential(Free(), nn.Linear(8, 8)), None),
    "first convolution": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)), "only 7% .*first conv"),
    "embedding": (lambda: nn.Sequential(nn.Embedding(1000, 4), nn.Linear(4, 4)), None),
}


@pytest.mark.parametrize("case", LITTLE)
def test_less_than_half_is_a_warning(case: str) -> None:
    build, cause = LITTLE[case]
    if cause is None:  # warnings are errors here
        assert ocs.quantize(build()).quantized
    else:
        with pytest.warns(UserWarning, match=cause) as caught:
            ocs.quantize(build())
        assert caught[0].filename == __file__  # where the caller is


def test_what_skip_names_is_no_cause() -> None:
    model = nn.Sequential(nn.Linear(80, 80), nn.Linear(4, 4), Doubled(3, 3))
    assert len(ocs.quantize(model, skip="0").quantized) == 1


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was() -> None:
    model = tied(8)
    before = state(model)
    with pytest.raises(UserWarning, match="only 33%"):
        ocs.quantize(model)
    assert_unchanged(model, before)


def test_matmul_weights() -> None:
    layers = [
        nn.Linear(3, 4),
        nn.Embedding(3, 4),
        nn.Conv2d(4, 4, 3, groups=4),
        Free(),
        nn.LSTM(3, 2),
        nn.LazyLinear(2),
    ]
    assert [matmul_weights(layer) for layer in layers] == [12, 0, 36, 64, 40, 0]
    assert matmul_weights(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))) == 12


# --- The first layer --------------------------------------------------------------------------------------------------

FIRST = {
    "image": (nn.Conv2d(3, 8, 3), True),
    "grey image": (nn.Conv2d(1, 8, 5, stride=2), True),
    "with an alpha channel": (nn.Conv2d(4, 8, 3), True),
    "sound": (nn.Conv1d(1, 8, 10, stride=5), True),
    "pointwise": (nn.Conv2d(3, 8, 1), True),
    "video": (nn.Conv3d(3, 8, 3), True),
    "patches": (nn.Conv2d(3, 8, 4, stride=4), False),
    "mel bands": (nn.Conv1d(80, 8, 3), False),
    "Mamba's": (nn.Conv1d(8, 8, 4, groups=8), False),
    "depthwise of three": (nn.Conv1d(3, 3, 4, groups=3), False),
    "latent": (nn.ConvTranspose2d(100, 8, 4), False),
}


@pytest.mark.parametrize("case", FIRST)
def test_the_first_layer_sees_the_input(case: str) -> None:
    layer, is_first = FIRST[case]
    model = nn.Sequential(copy.deepcopy(layer), nn.Conv2d(3, 8, 3), nn.Linear(100, 100))
    lines = ocs.quantize(model).layers
    assert [line.status == "skipped" for line in lines] == [is_first, False, False]
