"""Products with packed k-bit weights equal their twin bit for bit: every instruction set, any threads, both doors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_kernels import assert_same, both

from ocs import _C
from ocs.kernels import composite_product, ops
from ocs.kernels import reference_product as reference
from ocs.kernels.constants import qmax

NONE = np.zeros(0, np.float32)

# outputs, channels, copies of which channels
SHAPES = {
    "no outputs": (0, 33, ()),
    "one output": (1, 31, (30, 0, 30)),
    "no channels": (16, 0, ()),
    "one channel": (17, 1, (0,)),
    "one tile": (16, 32, ()),
    "copies begin a tile": (16, 32, (31,)),
    "a channel beyond a tile": (37, 33, (2, 32)),
    "many tiles": (37, 130, (5, 129, 5, 5, 64)),
}

# bits of rows, their scale, whether they are signed
GRIDS = {
    "floats": (0, NONE, True),
    "own scale": (8, NONE, True),
    "own scale, 4 bits": (4, NONE, True),
    "signed": (8, np.float32([0.02]), True),
    "signed, 4 bits": (4, np.asarray(0.3, np.float32), True),
    "unsigned": (8, np.asarray(0.01, np.float32), False),
    "unsigned, 4 bits": (4, np.asarray(0.2, np.float32), False),
}


# a tile and one of 1 to 8 lines of 4 channels
LAST_TILES = [(17, 32 + channels) for channels in (1, 8, 10, 16, 19, 24, 27, 32)]


def integers(shape: tuple[int, int], bits: int) -> np.ndarray:
    """Any integers of so many bits."""
    limit = qmax(bits)
    return np.random.default_rng(0).integers(-limit, limit + 1, shape).astype(np.int8)


def packed_weight(outputs: int, channels: int, copies: tuple, bits: int, group: int = 0, scale: tuple = ()) -> tuple:
    """The six arguments of a packed weight; scale is the shape of its scale."""
    packed = _C.product_pack(integers((outputs, channels + len(copies)), bits), bits)
    scales = np.random.default_rng(1).uniform(0.01, 0.1, scale).astype(np.float32)
    return packed, np.asarray(scales), np.int32(copies), outputs, group, bits


def rows(*shape: int) -> np.ndarray:
    """Inputs of a layer."""
    return np.random.default_rng(2).standard_normal(shape).astype(np.float32)


def check(x: np.ndarray, weight: tuple, grid: tuple, bias: np.ndarray = NONE) -> np.ndarray:
    """The product through both doors, after comparing it with its twin."""
    args = (x, *weight, bias, *grid)
    y = both("product", *args)
    assert_same(y, reference.product(*args))
    return y


# --- Packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (16, 32), (17, 31), (37, 130), (300, 400), *LAST_TILES])
def test_packing_equals_its_twin_and_comes_back(isa: str, shape: tuple[int, int], bits: int) -> None:
    q = integers(shape, bits)
    packed = both("product_pack", q, bits)
    assert_same(packed, reference.product_pack(q, bits))
    planes = [-(-shape[1] // 4) * width for width in (8, 4, 2, 1) if bits & width]
    assert packed.size == -(-shape[0] // 16) * 64 * sum(-(-plane // 8) for plane in planes)
    assert_same(both("product_unpack", packed, *shape, bits), q)
    assert_same(reference.product_unpack(packed, *shape, bits), q)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("at", [(0, 0), (15, 31), (16, 32), (17, 36), (3, 34)])
def test_integers_that_do_not_fit_are_refused_wherever_they_are(isa: str, at: tuple[int, int], bits: int) -> None:
    q = np.zeros((18, 37), np.int8)
    for outside in {-qmax(bits) - 1, min(qmax(bits) + 1, 127) if bits < 8 else -128}:
        q[at] = outside
        with pytest.raises(ValueError, match="product_pack: an integer is outside"):
            _C.product_pack(q, bits)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("at", [(0, 0), (15, 31), (16, 32), (31, 39)])
def test_codes_of_no_integer_are_refused_beyond_the_weight_too(isa: str, at: tuple[int, int], bits: int) -> None:
    """All bits of a code are 1; (31, 39) is what fills up the last line."""
    codes = np.full((32, 40), qmax(bits), np.uint8)
    codes[at] = 2**bits - 1
    q = (codes - qmax(bits)).astype(np.int8)
    with pytest.raises(ValueError, match="product_unpack: an integer is outside"):
        _C.product_unpack(reference.product_pack(q, bits), 18, 37, bits)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("lines", range(1, 9))
def test_a_short_tile_has_the_first_lines_of_each_plane(lines: int, bits: int) -> None:
    """Of a tile that zeros make whole; what other fields these lines have is not read."""
    q = integers((16, 4 * lines), bits)
    whole = _C.product_pack(np.pad(q, [(0, 0), (0, 32 - q.shape[1])]), bits).reshape(bits, 64)
    hostile = reference.product_pack(np.pad(q, [(0, 0), (0, 32 - q.shape[1])], constant_values=-qmax(bits) - 1), bits)
    kept, first = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            kept += range(first, first + -(-lines * width // 8))
            first += width
    assert_same(_C.product_pack(q, bits), whole[kept].ravel())
    packed = hostile.reshape(bits, 64)[kept].ravel()
    assert_same(both("product_unpack", packed, *q.shape, bits), q)
    assert_same(reference.product_unpack(packed, *q.shape, bits), q)
    assert_same(composite_product.product_unpack(torch.from_numpy(packed), *q.shape, bits).numpy(), q)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("channels", [200, 650, 663, 1000])
def test_little_is_padded(channels: int, bits: int) -> None:
    assert _C.product_pack(integers((32, channels), bits), bits).size <= 1.08 * 32 * channels * bits / 8


def test_sizes_without_elements_end_at_once() -> None:
    nothing, many = np.zeros(0, np.uint8), 2**44
    assert _C.product_unpack(nothing, many, 0, 4).shape == (many, 0)
    assert _C.product_pack(np.zeros((many, 0), np.int8), 4).size == 0
    others = (nothing, np.asarray(1, np.float32), np.int32([]))
    assert _C.product(rows(0, 0), *others, many, 0, 4, NONE, *GRIDS["own scale"]).shape == (0, many)
    assert _C.product(np.zeros((many, 0), np.float32), *others, 0, 0, 4, NONE, *GRIDS["own scale"]).size == 0


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("group", "scale"), [(0, ()), (0, (37,)), (32, (3, 5, 16)), (64, (3, 3, 16)), (160, (3, 1, 16))]
)
def test_rows_of_a_weight_equal_their_twin(isa: str, group: int, scale: tuple, bits: int) -> None:
    for index in ([0, 3, 3, 17, 36, 16, 15], [], [36]):
        args = (np.int64(index), *packed_weight(*SHAPES["many tiles"], bits, group, scale), 130)
        assert_same(both("product_rows", *args), reference.product_rows(*args))


# --- Products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_products_equal_their_twin(isa: str, bits: int, shape: str, grid: str) -> None:
    outputs, channels, _ = SHAPES[shape]
    weight = packed_weight(*SHAPES[shape], bits)
    check(rows(1, channels), weight, GRIDS[grid])
    check(rows(6, channels), weight, GRIDS[grid], rows(outputs))


@pytest.mark.parametrize("shape", LAST_TILES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_last_tiles_of_any_number_of_lines(isa: str, bits: int, shape: tuple[int, int]) -> None:
    """One to four rows have kernels of their own, as have more than 16 of floats."""
    outputs, channels = shape
    for group, scale in ((0, (outputs,)), (32, (-(-outputs // 16), 2, 16))):
        weight = packed_weight(outputs, channels - 1, (0,), bits, group, scale)
        for grid in ("floats", "own scale", "unsigned"):
            for count in (1, 2, 3, 4, 6, 17):
                check(rows(count, channels - 1), weight, GRIDS[grid])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("group", "scale"), [(0, (37,)), (32, (3, 5, 16)), (64, (3, 3, 16)), (96, (3, 2, 16)), (160, (3, 1, 16))]
)
def test_scales_of_outputs_and_groups(isa: str, group: int, scale: tuple, grid: str) -> None:
    for bits in (3, 8):
        check(rows(3, 130), packed_weight(*SHAPES["many tiles"], bits, group, scale), GRIDS[grid], rows(37))


@pytest.mark.parametrize("grid", ["floats", "own scale", "unsigned"])
@pytest.mark.parametrize("count", [0, *range(1, 18), 40, 259])
def test_any_number_of_rows(isa: str, count: int, grid: str) -> None:
    """16 share each read of the weights, 256 are prepared at a time."""
    for bits in (3, 8):
        check(rows(count, 33), packed_weight(*SHAPES["a channel beyond a tile"], bits), GRIDS[grid])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("value", [0.0, -0.0, np.nan, np.inf, -np.inf, 3e38, 1e-44, -1e-45, 1e-40])
def test_rows_of_any_values(isa: str, value: float, grid: str) -> None:
    """A whole row of it, a row with one in its own channels or in one that has copies, and rows beside them."""
    x = rows(4, 130)
    x[0], x[1, 77], x[2, 5] = value, value, value
    weight = packed_weight(*SHAPES["many tiles"], 5)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        y = check(x, weight, GRIDS[grid], rows(37))
        check(np.full((2, 130), value, np.float32), weight, GRIDS[grid])
    unknown = np.isnan(value) or (np.isinf(value) and "own" in grid)
    assert np.isnan(y).all(1)[:3].tolist() == [unknown] * 3 or grid == "floats"
    assert np.isfinite(y[3]).all()


@pytest.mark.parametrize("channels", [32768, 33000, 65600])
@pytest.mark.parametrize("grid", ["floats", "own scale", "unsigned"])
def test_many_channels_are_added_up_in_segments(isa: str, grid: str, channels: int) -> None:
    x = np.abs(rows(2, channels))
    for group in (0, 32800, 65536) if grid != "floats" else (0,):  # the twin adds floats one by one
        scale = (2, -(-(channels + 2) // group), 16) if group else (17,)
        args = (x, *packed_weight(17, channels, (7, channels - 1), 8, group, scale), NONE, *GRIDS[grid])
        y = check(x, args[1:7], GRIDS[grid])
        if grid != "floats":
            tensors = [torch.from_numpy(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
            assert_same(composite_product.product(*tensors).numpy(), y)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(("signed", "extremes"), [(True, (-127, 127)), (False, (255,))])
def test_the_largest_sums_are_exact(isa: str, signed: bool, extremes: tuple, count: int, bits: int) -> None:
    """Nothing saturates and nothing wraps around: whole segments of the largest integers, and a mix of both signs."""
    one = np.asarray(1, np.float32)
    for q in (-qmax(bits), qmax(bits)):
        weight = np.full((17, 32768), q, np.int8)
        weight[3, ::2] *= -1
        packed = (_C.product_pack(weight, bits), one, np.int32([]), 17, 0, bits)
        for extreme in extremes:
            x = np.full((count, 32768), extreme, np.float32)
            expected = (x.astype(np.int64) @ weight.T.astype(np.int64)).astype(np.float32)
            assert_same(_C.product(x, *packed, NONE, 8, one, signed), expected)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_of_no_integer_give_the_same_everywhere(bits: int, count: int, grid: str) -> None:
    """A product does not look for them; whatever they stand for, the plain kernel says."""
    weight = packed_weight(*SHAPES["many tiles"], bits)
    hostile = (np.random.default_rng(3).integers(0, 256, weight[0].size).astype(np.uint8) | 0x81, *weight[1:])
    found = []
    for name in _C.isas():
        ops.set_isa(name)
        found.append(both("product", np.abs(rows(count, 130)), *hostile, NONE, *GRIDS[grid]))
        assert_same(found[-1], found[0])
    ops.set_isa("auto")
    assert np.isfinite(found[0]).all()


# --- Arrays and threads -----------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable] = {
    "one row": lambda x: x[0],
    "three axes": lambda x: x.reshape(2, 3, 33),
    "every other row": lambda x: x[::2],
    "transposed": lambda x: x.reshape(33, 6).T,
    "one row for all": lambda x: x[:1] + 0 * x[:, :1],
}


@pytest.mark.parametrize("grid", ["floats", "own scale", "unsigned"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, grid: str) -> None:
    x, weight = LAYOUTS[layout](rows(6, 33)), packed_weight(*SHAPES["a channel beyond a tile"], 4)
    expected = check(np.ascontiguousarray(x), weight, GRIDS[grid], rows(37))
    args = (*weight, rows(37), *GRIDS[grid])
    assert_same(_C.product(x, *args), expected)
    tensors = [torch.from_numpy(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
    of_torch = torch.ops.ocs.product(LAYOUTS[layout](torch.from_numpy(rows(6, 33))), *tensors)
    assert of_torch.is_contiguous()
    assert_same(of_torch.numpy(), expected)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_rounded_at_the_end(isa: str, dtype: torch.dtype, grid: str) -> None:
    """Rows become floats, and the result of float32 is rounded once; NaN, Inf and ties are among them."""
    x = torch.from_numpy(rows(5, 130)).to(dtype)
    x[1, 3], x[2, 4] = torch.nan, torch.inf
    args = (*packed_weight(*SHAPES["many tiles"], 5), rows(37), *GRIDS[grid])
    tensors = [torch.from_numpy(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
    ours = torch.ops.ocs.product(x, *tensors)
    expected = torch.ops.ocs.product(x.float(), *tensors).to(dtype)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def test_bfloat16_rounds_half_to_even() -> None:
    """Sums of two channels that lie between two of its numbers, 2 apart from 256 on."""
    x = torch.tensor([[256, 1], [256, 3], [-256, -1], [-256, -3]], dtype=torch.bfloat16)
    weight = (_C.product_pack(np.ones((1, 2), np.int8), 2), np.asarray(1, np.float32), np.int32([]))
    none = torch.zeros(0)
    y = torch.ops.ocs.product(x, *(torch.from_numpy(part) for part in weight), 1, 0, 2, none, 0, none, True)
    assert y.flatten().tolist() == [256, 260, -256, -260]


def test_results_do_not_depend_on_threads(isa: str, threads: int) -> None:
    weight = packed_weight(500, 300, (1, 2), 5, 0, (500,))
    for grid in ("floats", "own scale"):
        check(rows(20, 300), weight, GRIDS[grid])
        check(rows(1, 300), packed_weight(500, 300, (1, 2), 4, 32, (32, 10, 16)), GRIDS[grid])
        check(rows(20, 300), packed_weight(500, 300, (1, 2), 4), GRIDS[grid])
    check(rows(700, 300), packed_weight(17, 300, (), 4), GRIDS["unsigned"])
    index = np.arange(500)[::-1].copy()
    assert_same(both("product_rows", index, *weight, 300), reference.product_rows(index, *weight, 300))
