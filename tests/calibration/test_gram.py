"""What the weights of each kind of layer meet, as gptq is told: against torch's own layers, step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import ocs
from ocs.calibration import gram
from ocs.calibration.gram import LayerMoments, SecondMoments, rows_of
from ocs.nn.registry import replacement_of

pytestmark = pytest.mark.usefixtures("one_thread")

LINEAR: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (3, 2, 5)),
    "one vector": (lambda: nn.Linear(5, 4), (5,)),
    "1d": (lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2, groups=2), (3, 4, 11)),
    "2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1)), (3, 4, 9, 7)),
    "3d": (lambda: nn.Conv3d(2, 4, 2, padding=1, stride=2), (2, 2, 5, 4, 6)),
    "same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=2), (3, 4, 9, 7)),
    "valid": (lambda: nn.Conv1d(4, 6, 3, padding="valid"), (3, 4, 9)),
    "reflect": (lambda: nn.Conv2d(4, 4, 3, padding=(1, 2), padding_mode="reflect", groups=4), (3, 4, 9, 7)),
    "circular": (lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), (3, 4, 9)),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 9, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, (3, 4), (2, 1), (1, 2), (1, 0), 2, dilation=(2, 1)), (3, 4, 5, 6)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, padding=4, dilation=1), (2, 4, 12)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, 2), (2, 3, 4, 3)),
}


@pytest.mark.parametrize("case", LINEAR)
def test_what_linear_layers_meet(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of the weight with these vectors are the layer's outputs, all of them; in however many pieces."""
    monkeypatch.setattr("ocs.calibration.gram.ELEMENTS", 300)
    make, shape = LINEAR[case]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    layer.bias = None
    rows = torch.cat([part for _, part in rows_of(layer, {"input": x})], 1)
    groups = getattr(layer, "groups", 1)
    kind = replacement_of(layer)
    w = kind.layout(layer.weight.detach(), groups).reshape(groups, -1, rows.shape[2])
    y = layer(x).detach()
    channels = y.dim() - len(getattr(layer, "kernel_size", ())) - 1
    expected = y.movedim(channels, 0).reshape(groups, len(w[0]), -1)
    torch.testing.assert_close(w @ rows.mT, expected, rtol=1e-4, atol=1e-5)


def test_moments_are_those_of_the_vectors() -> None:
    """In parts or at once. Half-precision inputs are summed up in float32."""
    layer, x = nn.Conv2d(4, 6, 3, groups=2), torch.randn(5, 4, 6, 6) + 1
    rows = torch.cat([part for _, part in rows_of(layer, {"input": x})], 1).double()
    at_once, in_parts = LayerMoments(layer), LayerMoments(layer)
    at_once.observe(layer, {"input": x})
    for part in (x[:2], x[2:]):
        in_parts.observe(layer, {"input": part})
    for moments in (at_once, in_parts):
        ours = moments["weight"]
        assert ours.count == moments.inputs == rows.shape[1] == 5 * 16
        torch.testing.assert_close(ours.products.double(), rows.mT @ rows, rtol=1e-5, atol=1e-4)
    half = SecondMoments(1, 4)
    half.update(torch.full((1, 3000, 4), 30.0, dtype=torch.float16))
    assert half.products.dtype == torch.float32
    assert half.products[0, 0, 0] == 3000 * 900


RECURRENT = {
    "lstm": lambda **options: nn.LSTM(4, 5, **options),
    "gru": lambda **options: nn.GRU(4, 5, **options),
    "rnn": lambda **options: nn.RNN(4, 5, **options),
    "relu": lambda **options: nn.RNN(4, 5, nonlinearity="relu", **options),
    "projected": lambda **options: nn.LSTM(4, 5, proj_size=3, **options),
}


def steps_of(layer: nn.RNNBase, x: Tensor, hx: tuple[Tensor, ...], suffix: str) -> tuple[dict[str, Tensor], Tensor]:
    """What the weights of one layer and direction meet in one sequence [T, C], and its outputs, by torch's cells."""
    cell = {
        "LSTM": torch.lstm_cell,
        "GRU": torch.gru_cell,
        "RNN_TANH": torch.rnn_tanh_cell,
        "RNN_RELU": torch.rnn_relu_cell,
    }
    ih, hh, *biases = (getattr(layer, f"{name}{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    hr = getattr(layer, f"weight_hr{suffix}", None)
    h, *c = hx
    met: dict[str, list[Tensor]] = {"ih": [], "hh": [], "hr": []}
    outputs = []
    reverse = suffix.endswith("reverse")
    for step in reversed(x) if reverse else x:
        met["ih"].append(step)
        met["hh"].append(h)
        if hr is not None:  # a cell knows no projection: it takes the product with the hidden state as its input
            both, bias = torch.cat([ih, hh], 1), biases[0] + biases[1]
            i, f, g, o = (both @ torch.cat([step, h]) + bias).chunk(4)
            c = [f.sigmoid() * c[0] + i.sigmoid() * g.tanh()]
            met["hr"].append(o.sigmoid() * c[0].tanh())
            h = hr @ met["hr"][-1]
        elif c:
            h, *c = (y[0] for y in cell[layer.mode](step[None], (h[None], c[0][None]), ih, hh, *biases))
        else:
            h = cell[layer.mode](step[None], h[None], ih, hh, *biases)[0]
        outputs.append(h)
    return {k: torch.stack(v) for k, v in met.items() if v}, torch.stack(outputs[::-1] if reverse else outputs)


def expected_rows(layer: nn.RNNBase, x: Tensor, hx: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Of all layers and directions in one sequence [T, C] with states [layers, H]."""
    rows = {}
    for i in range(layer.num_layers):
        outputs = []
        for d, suffix in enumerate([f"_l{i}", f"_l{i}_reverse"][: 1 + layer.bidirectional]):
            at = i * (1 + layer.bidirectional) + d
            met, out = steps_of(layer, x, tuple(state[at] for state in hx), suffix)
            rows |= {f"weight_{kind}{suffix}": of_kind for kind, of_kind in met.items()}
            outputs.append(out)
        x = torch.cat(outputs, -1)
    return rows


@pytest.mark.parametrize("form", ["batch", "batch first", "unbatched", "packed", "no state"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("case", RECURRENT)
def test_what_recurrent_layers_meet(case: str, bidirectional: bool, form: str) -> None:
    """Inputs, and the hidden states that every step starts from, initial ones too; as torch's cells compute them."""
    torch.manual_seed(0)
    layer = RECURRENT[case](num_layers=2, bidirectional=bidirectional, batch_first=form == "batch first").eval()
    lengths = [4, 6, 2] if form == "packed" else [6, 6, 6]
    x = torch.randn(6, 3, 4)
    sizes = [layer.proj_size or 5, 5][: 1 + (layer.mode == "LSTM")]
    hx = tuple(torch.randn(2 * (1 + bidirectional), 3, size) * (form != "no state") for size in sizes)
    if form == "unbatched":
        lengths, given, state = [6], x[:, 0], tuple(part[:, 0] for part in hx)
    elif form == "packed":
        given, state = pack_padded_sequence(x, lengths, enforce_sorted=False), hx
    else:
        given, state = x.transpose(0, 1) if form == "batch first" else x, hx
    arguments = {"input": given}
    if form != "no state":
        arguments["hx"] = state if layer.mode == "LSTM" else state[0]
    with torch.no_grad():
        ours = dict(rows_of(layer, arguments))
        parts = [expected_rows(layer, x[:T, n], tuple(s[:, n] for s in hx)) for n, T in enumerate(lengths)]
    assert set(ours) == set(replacement_of(layer).weight_names(layer))
    for name, rows in ours.items():
        expected = torch.cat([part[name] for part in parts])
        torch.testing.assert_close(rows[0].mT @ rows[0], expected.mT @ expected, rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(rows[0].sum(0), expected.sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_what_cells_meet(cell: type[nn.RNNCellBase]) -> None:
    layer, x, h = cell(4, 5), torch.randn(3, 4), torch.randn(3, 5)
    rows = dict(rows_of(layer, {"input": x, "hx": (h, h + 1) if cell is nn.LSTMCell else h}))
    assert torch.equal(rows["weight_ih"][0], x)
    assert torch.equal(rows["weight_hh"][0], h)
    rows = dict(rows_of(layer, {"input": x[0]}))
    assert torch.equal(rows["weight_hh"], torch.zeros(1, 1, 5))


@pytest.mark.parametrize("sizes", [{}, {"kdim": 3, "vdim": 7}])
def test_what_attention_meets(sizes: dict[str, int]) -> None:
    """One weight for all three projections meets all their inputs, once where they are one; the output's, its input."""
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2, **sizes)}).eval()
    query, key, value = (
        torch.randn(5, 2, 6),
        torch.randn(4, 2, sizes.get("kdim", 6)),
        torch.randn(4, 2, sizes.get("vdim", 6)),
    )
    moments = ocs.calibrate(net, lambda model: model["attention"](query, key, value=value), moments=True).moments
    of_input = moments["attention"]
    if sizes:
        seen = {"q_proj_weight": [query], "k_proj_weight": [key], "v_proj_weight": [value]}
    else:
        seen = {"in_proj_weight": [query, key, value]}
        again = ocs.calibrate(net, lambda model: model["attention"](query, query, query), moments=True).moments
        assert again["attention"]["in_proj_weight"].count == 10
    assert set(of_input) == set(seen)
    for name, inputs in seen.items():
        x = torch.cat([part.flatten(0, 1) for part in inputs])
        torch.testing.assert_close(of_input[name].products[0], x.mT @ x)
    out, of_output = net["attention"].out_proj, moments["attention.out_proj"]["weight"]
    with torch.no_grad():
        y = (net["attention"](query, key, value)[0] - out.bias).flatten(0, 1)
    expected = y.mT @ y
    torch.testing.assert_close(out.weight @ of_output.products[0] @ out.weight.mT, expected, rtol=1e-4, atol=1e-5)


# --- No more memory than is stated ------------------------------------------------------------------------------------


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes of all second moments."""
    moments = ocs.calibrate(model, x, moments=True).moments
    return sum(each.products.nbytes for of_layer in moments.values() for each in of_layer.values())


@pytest.mark.parametrize("widest", [1, 5, 8, 11, 12, 40])
def test_blocks_are_those_on_the_diagonal(widest: int) -> None:
    """Of every group; zeros where the last block ends."""
    layer, x = nn.Conv2d(6, 4, (2, 2), groups=2), torch.randn(3, 6, 4, 4)
    whole, cut = LayerMoments(layer)["weight"], LayerMoments(layer, widest=widest)["weight"]
    for _, rows in rows_of(layer, {"input": x}):
        whole.update(rows)
        cut.update(rows)
    assert cut.width <= widest
    assert cut.products.shape == (2 * cut.blocks, cut.width, cut.width)
    for g, H in enumerate(whole.products):
        expected = torch.nn.functional.pad(H, (0, cut.blocks * cut.width - 12) * 2)
        for b in range(cut.blocks):
            columns = slice(b * cut.width, (b + 1) * cut.width)
            torch.testing.assert_close(cut.products[g * cut.blocks + b], expected[columns, columns])


@pytest.mark.parametrize("bound", [2**40, 20_000, 3000])
def test_all_together_take_no_more_than_the_bound(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers there are; the report says what was cut, and compensation is still worth it."""
    monkeypatch.setattr(gram, "BYTES", bound)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 8))
    x = (torch.randn(500, 60) @ torch.randn(60, 60)).relu()
    assert kept(model, x) <= bound
    errors = {}
    for rounding in ("nearest", "gptq"):
        ours = copy.deepcopy(model)
        given = {"calibration": [x]} if rounding == "gptq" else {}
        report = ocs.quantize(ours, wbits=3, granularity="channel", rounding=rounding, **given)
        errors[rounding] = float((ours(x) - model(x)).detach().square().sum())
    reasons = [line.reason for line in report.quantized]
    if bound == 2**40:
        assert reasons == [""] * 3
    else:
        assert reasons[0].startswith("second moments in ")
        assert reasons[0].endswith("columns: whole they take 1.44e-05 GB")
    assert errors["gptq"] < errors["nearest"]


def test_wide_weights_are_cut_before_memory_is_taken() -> None:
    """A pitch tracker's convolution, whose second moments would take 17 GB, a classifier's 340 MB and a usual one."""
    shapes = [(1024 * 64, 16), (9216, 64), (512 * 9, 512)]
    layers = [nn.Linear(*shape, device="meta") for shape in shapes]
    assert gram.widest_block(layers) == gram.WIDEST
    moments = [LayerMoments(layer)["weight"] for layer in layers]
    assert [(each.blocks, each.width) for each in moments] == [(15, 4370), (2, 4608), (1, 4608)]
    assert all(each._sums is None for each in moments)
    many = [nn.Linear(11008, 4096, device="meta")] * 100
    width = gram.widest_block(many)
    assert width < 500
    assert sum(4 * each.blocks * each.width**2 for each in [SecondMoments(1, 11008, width)] * 100) <= gram.BYTES
