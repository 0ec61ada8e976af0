"""Recurrent layers on packed weights equal their twin bit for bit: every cell, instruction set, thread count, door."""

from __future__ import annotations

import numpy as np
import pytest
from test_kernels import assert_same, both
from test_product import NONE, packed_weight, rows

from ocs import _C
from ocs.kernels import reference_recurrent as reference

NO_PROJECTION = (np.zeros(0, np.uint8), np.asarray(1, np.float32), np.int32([]), 0, 0, 8)
NO_STATE = np.zeros((0, 0), np.float32)
LSTM, GRU, RNN_TANH, RNN_RELU = range(4)

# hidden units, size of the state where it is projected
SIZES = {"one unit": (1, 0), "a vector": (16, 0), "some": (21, 0), "projected": (40, 13)}


def layer_call(
    cell: int, units: int, size: int, batch_sizes: list[int], bits: int = 5, row_bits: int = 8, reverse: bool = False
) -> tuple:
    """The arguments of recurrent."""
    state, gates, N = size or units, reference.GATES[cell], max(batch_sizes, default=2)
    hidden = packed_weight(gates * units, state, (0, state - 1), bits, 0, (gates * units,))
    projection = packed_weight(size, units, (1,), 4) if size else NO_PROJECTION
    c = 2 * rows(N, units) if cell == LSTM else NO_STATE
    bias = rows(gates * units)
    from_x = 3 * rows(sum(batch_sizes), gates * units)
    return (from_x, *hidden, bias, *projection, rows(N, state), c, np.int64(batch_sizes), row_bits, cell, reverse)


def check(*args: object) -> None:
    for ours, twin in zip(both("recurrent", *args), reference.recurrent(*args), strict=True):
        assert_same(ours, twin)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("row_bits", [0, 8, 4])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("cell", range(4))
def test_layers_equal_their_twin(isa: str, cell: int, sizes: str, row_bits: int, reverse: bool) -> None:
    if sizes == "projected" and cell != LSTM:
        return
    for batch_sizes in ([1, 1, 1], [5, 5, 5], [4, 4, 2, 1], [3, 0], [0], []):
        check(*layer_call(cell, *SIZES[sizes], batch_sizes, row_bits=row_bits, reverse=reverse))


@pytest.mark.parametrize("bits", range(2, 9))
def test_any_bits_and_no_bias(isa: str, bits: int) -> None:
    args = layer_call(LSTM, 33, 0, [17, 17], bits)
    check(*args[:7], NONE, *args[8:])


def test_sequences_that_have_ended_keep_their_state() -> None:
    args = layer_call(LSTM, 5, 0, [3, 1], row_bits=0)
    y, h, c = _C.recurrent(*args)
    assert_same(h, np.concatenate([y[3:], y[1:3]]))
    first = (args[0][:3], *args[1:16], np.int64([3]), *args[17:])
    assert_same(c[1:], _C.recurrent(*first)[2][1:])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, 1e-40, -0.0])
@pytest.mark.parametrize("cell", range(4))
def test_states_of_any_values(isa: str, cell: int, value: float) -> None:
    args = layer_call(cell, 21, 0, [3, 2], row_bits=0)
    for i in (0, 14, 15):
        if args[i].size:
            args[i][1, ::3] = value
    with np.errstate(over="ignore", invalid="ignore"):
        check(*args)


def test_results_do_not_depend_on_threads(isa: str, threads: int) -> None:
    check(*layer_call(LSTM, 150, 100, [40, 40, 39]))
    check(*layer_call(GRU, 100, 0, [40, 3]))


# --- The functions inside ---------------------------------------------------------------------------------------------

X = np.concatenate([np.linspace(-100, 100, 200_001), np.linspace(-1, 1, 20_001), [np.inf, -np.inf, np.nan, -0.0]])


def cells(cell: int, from_x: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple:
    """One step whose state gives nothing to the gates; every row of [N, gates H] is a sequence's."""
    packed = packed_weight(from_x.shape[1], h.shape[1], (), 2)
    hidden = (_C.product_pack(np.zeros((from_x.shape[1], h.shape[1]), np.int8), 2), *packed[1:])
    batch = np.int64([len(from_x)])
    return _C.recurrent(from_x, *hidden, NONE, *NO_PROJECTION, h, c, batch, 8, cell, False)


def test_sigmoid_and_tanh_are_exact_to_2e_7(isa: str) -> None:
    """As an RNN gives tanh, and an LSTM whose other gates are wide open gives sigmoid."""
    x = X.astype(np.float32).reshape(-1, 1)
    exact = x.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        assert_same(reference.tanh(x), cells(RNN_TANH, x, np.zeros_like(x), NO_STATE)[0])
        np.testing.assert_allclose(reference.tanh(x), np.tanh(exact), rtol=0, atol=2e-7)
        gates = np.concatenate([x * 0 - 100, x, x * 0, x * 0 + 100], axis=1)
        gates[np.isinf(x[:, 0])] = [[-100, np.inf, 0, 100], [-100, -np.inf, 0, 100]]
        forgotten = cells(LSTM, gates.astype(np.float32), np.zeros_like(x), np.ones_like(x))[2]
        assert_same(reference.sigmoid(x), forgotten)
        np.testing.assert_allclose(forgotten, 1 / (1 + np.exp(-exact)), rtol=0, atol=2e-7)


# --- Hostile calls ----------------------------------------------------------------------------------------------------


def test_calls_that_fit_nothing_are_refused() -> None:
    args = layer_call(LSTM, 21, 7, [3, 2])
    wrong = {
        "from_x": {0: args[0][:4]}, "gates": {0: args[0][:, 1:]}, "bias": {7: args[7][1:]},
        "state": {14: args[14][:, 1:]}, "sequences": {14: args[14][:2]}, "c": {15: args[15][:, 1:]},
        "c of fewer": {15: args[15][:2]}, "sizes that rise": {16: np.int64([2, 3])},
        "negative sizes": {16: np.int64([3, -1, 3])}, "sizes that overflow": {16: np.int64([2**62, 2**62])},
        "more than there are": {16: np.int64([5])}, "bits": {17: 9}, "cell": {18: 4}, "negative cell": {18: -1},
        "large cell": {18: 2**32}, "projection of a GRU": {18: GRU}, "outputs": {4: 85}, "hidden bits": {6: 4},
        "group": {5: 16}, "copies": {3: np.int32([7, 0])}, "negative copies": {3: np.int32([0, -1])},
        "no projection": {11: 0}, "negative projection": {11: -1}, "more projected": {11: 8},
        "copies of the projection": {10: np.int32([21])}, "its bits": {13: 5},
        "its scale": {9: np.asarray(np.nan, np.float32)},
    }  # fmt: skip
    for what, arguments in wrong.items():
        call = [arguments.get(i, arg) for i, arg in enumerate(args)]
        with pytest.raises(ValueError, match="recurrent: "):
            print(what, _C.recurrent(*call))
    _C.recurrent(*args)
