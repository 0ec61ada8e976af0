"""Calibration: statistics are exact and merge exactly, whatever the batches; the model comes out as it went in."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SmallNet, assert_unchanged, state
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ocs
from ocs import functional
from ocs.calibration.statistics import BINS, Statistics

NAMES = ("limit", "largest", "smallest", "highest", "zeros", "inputs")
TENSORS = ("counts", "negative", "octaves", "channel_max")


def images(count: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def activations() -> list[Tensor]:
    """Batches [N, 8, H, W] of very different size, some all zeros."""
    generator = torch.Generator().manual_seed(0)
    by_channel = torch.linspace(0.2, 3, 8)[:, None, None]
    draws = [torch.randn(n, 8, 30, 30, generator=generator).relu() * by_channel for n in (4, 1, 7, 2, 3)]
    return [torch.zeros(1, 8, 30, 30)] + [x * size for x, size in zip(draws, (1e-3, 1, 30, 1e-30, 5), strict=True)]


def statistics_of(batches: list[Tensor], axis: int = -3) -> Statistics:
    statistics = Statistics(axis, 8)
    for x in batches:
        statistics.update(x)
    return statistics


def assert_equal(a: Statistics, b: Statistics, *, but: str = "") -> None:
    assert all(getattr(a, name) == getattr(b, name) for name in NAMES if name != but)
    assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS)


# --- Statistics -------------------------------------------------------------------------------------------------------


def test_batches_in_any_order_or_at_once_give_the_same() -> None:
    batches = activations()
    ours = statistics_of(batches)
    assert_equal(ours, statistics_of(batches[::-1]))
    assert_equal(ours, statistics_of([torch.cat(batches)]), but="inputs")
    left, right = statistics_of(batches[:3]), statistics_of(batches[3:])
    left.merge(right)
    assert_equal(ours, left)


def test_they_are_those_of_the_values() -> None:
    batches = activations()
    x, ours = torch.cat(batches), statistics_of(batches)
    assert (ours.largest, ours.smallest) == (float(x.max()), 0.0)
    assert ours.zeros == int((x == 0).sum())
    assert ours.limit / 2 <= ours.largest < ours.limit
    assert torch.equal(ours.counts, torch.ops.ocs.histogram(x[x != 0], BINS, ours.limit))
    assert torch.equal(ours.channel_max, x.abs().amax((0, 2, 3)))
    beyond = (x > np.percentile(x.numpy(), 99)).sum((0, 2, 3))
    torch.testing.assert_close(ours.outliers(), beyond.double(), rtol=0.03, atol=10)
    assert ours.outliers().argsort(descending=True)[:4].tolist() == beyond.argsort(descending=True)[:4].tolist()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats_and_dtypes(memory_format: torch.memory_format) -> None:
    batches = [x.to(memory_format=memory_format) for x in activations()]
    assert_equal(statistics_of(batches), statistics_of(activations()))
    halves = [x.bfloat16() for x in activations()]
    assert_equal(statistics_of(halves), statistics_of([x.float() for x in halves]))
    last = [x.movedim(1, -1) for x in activations()]
    assert_equal(statistics_of(last, axis=-1), statistics_of(activations()))
    assert_equal(statistics_of([x[::2, :, 3:] for x in batches]), statistics_of([x[::2, :, 3:] for x in activations()]))


def test_memory_does_not_grow() -> None:
    statistics = Statistics(-3, 8)
    for size in (1e-20, 1, 1e20):
        statistics.update(activations()[2] * size)
        held = [getattr(statistics, name) for name in TENSORS]
        assert sum(t.untyped_storage().nbytes() for t in held) == 2 * 8 * BINS + 8 * (8 * 128) + 4 * 8


@pytest.mark.parametrize("method", ["none", 0.5, *functional.CLIP_METHODS])
@pytest.mark.parametrize("signed", [True, False])
def test_thresholds_are_those_of_the_values(method: str | float, signed: bool) -> None:
    """The histogram ends at a power of two instead of at the largest value, so that its bins are others.

    That moves the minimum of the divergence, which is flat, and with it the threshold more than it moves others.
    """
    x = torch.cat(activations()[1:3]) + 1e-3
    ours = statistics_of([x])
    for bits in (8, 4):
        exact = functional.clip_threshold(x, bits, method, signed)
        tolerance = 0.15 if method in ("kl", "kl-release") else 0.01
        assert ours.threshold(bits, method, signed) == pytest.approx(exact, rel=tolerance)
        assert ours.threshold(bits, method, signed) <= ours.largest


@pytest.mark.parametrize("method", [0.5, *functional.METHODS])
def test_thresholds_after_splitting_are_those_of_the_split_values(method: str | float) -> None:
    """Where it must know how values are spread within a channel's eighths of octaves, to 8 %; the maximum is exact."""
    x = torch.cat([activations()[1] * 1e3, activations()[3]]) + 1e-3
    chosen = torch.tensor([7, 2])
    split = torch.cat([x, x[:, chosen]], 1)
    split[:, [7, 2, 8, 9]] /= 2
    ours, exact = statistics_of([x]), functional.clip_threshold(split, 4, method)
    assert ours.threshold(4, method, True, chosen) == pytest.approx(exact, rel=0 if method in ("none", 0.5) else 0.08)


def test_next_to_nothing_counts_as_zero() -> None:
    statistics = statistics_of([torch.full((3, 8, 4, 4), 1e-38), torch.ones(1, 8, 4, 4)])
    assert (statistics.zeros, statistics.largest, int(statistics.counts.sum())) == (3 * 8 * 16, 1.0, 8 * 16)
    assert statistics_of([torch.full((3, 8, 4, 4), 1e-38)]).threshold(4, "mse", True) == 0


def test_only_zeros() -> None:
    statistics = statistics_of([torch.zeros(3, 8, 4, 4)])
    assert statistics.threshold(8, "mse", True) == 0
    assert len(set(statistics.outliers().tolist())) == 1


def test_an_input_of_zeros_is_said() -> None:
    """Behind a ReLU that lets nothing through; the others, and one of its own scale per batch, need no note."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.constant_(model[0].bias, -100)
    nn.init.zeros_(model[2].bias)
    report = ocs.quantize(
        model,
        abits=8,
        calibration=[torch.randn(8, 4)],
        overrides={"3": {"act_split": "oracle"}, "4": {"rounding": "squant"}},
    )
    said = {
        layer.name: "its input was all zeros in calibration: its scale is 1" in layer.reason for layer in report.layers
    }
    assert said == {"0": False, "2": True, "3": False, "4": False}
    assert next(layer.act_scale for layer in report.layers if layer.name == "2") == 1
    assert "its input was all zeros in calibration" in str(report)


# --- The model is run, and left alone ---------------------------------------------------------------------------------

x = images()
DATA: dict[str, Callable[[], Any]] = {
    "batches": lambda: list(x.split(5)),
    "pairs": lambda: [(part, torch.zeros(len(part))) for part in x.split(5)],
    "lists of one": lambda: [[part] for part in x.split(5)],
    "dicts": lambda: [{"x": part} for part in x.split(5)],
    "a generator": lambda: (part for part in x.split(5)),
    "a loader": lambda: DataLoader(TensorDataset(x, torch.arange(len(x))), batch_size=5),
    "one tensor": lambda: x,
    "a callable": lambda: lambda model: [model(part) for part in x.split(5)],
}


@pytest.mark.parametrize("data", DATA)
def test_kinds_of_data(net: SmallNet, data: str) -> None:
    expected = copy.deepcopy(net)
    ocs.quantize(expected, abits=5, act_r=0.1, act_clip="mse", calibration=list(x.split(5)))
    ocs.quantize(net, abits=5, act_r=0.1, act_clip="mse", calibration=DATA[data]())
    assert torch.equal(net(x), expected(x))


def test_one_calibration_serves_many_settings(net: SmallNet) -> None:
    calibration = ocs.calibrate(net, x.split(5))
    assert list(calibration) == ["stem", "body.0", "body.3", "body.5", "head"]
    for options in ({"abits": 4}, {"abits": 6, "act_r": 0.2, "act_clip": "kl"}, {"abits": 5, "act_signed": "auto"}):
        ours, expected = copy.deepcopy(net), copy.deepcopy(net)
        ocs.quantize(ours, **options, calibration=calibration)
        ocs.quantize(expected, **options, calibration=x.split(5))
        assert torch.equal(ours(x), expected(x))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_undisturbed(net: SmallNet, fails: bool) -> None:
    net.train()
    net.body[1].eval()
    before, flags = state(net), [module.training for module in net.modules()]
    seen: list[tuple[bool, bool]] = []

    def batches() -> Iterator[Tensor]:
        yield x
        seen.append((any(module.training for module in net.modules()), torch.is_grad_enabled()))
        if fails:
            raise OSError("disk on fire")
        yield x * 2

    if fails:
        with pytest.raises(OSError, match="disk on fire"):
            ocs.quantize(net, abits=8, calibration=batches())
    else:
        ocs.calibrate(net, batches())
    assert_unchanged(net, before)
    assert seen == [(False, False)]
    assert [module.training for module in net.modules()] == flags
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (lambda: [], ValueError, "calibration is empty"),
        (lambda: iter([]), ValueError, "calibration is empty"),
        (lambda: [(x, x, x)], ValueError, "gave 3 things at once: use a callable"),
        (lambda: 7, TypeError, "calibration=7: use batches"),
        (lambda: "images", TypeError, "calibration='images': use batches"),
        (lambda: [x, x * torch.nan], ValueError, "body.0: its input holds NaN"),
        (lambda: {"x": x}, TypeError, "calibration is one dict: put it in a list"),
        (lambda: (x, torch.zeros(len(x))), TypeError, r"calibration is one \(batch, target\) pair: put it in a list"),
        (lambda: x.numpy(), TypeError, "calibration is one ndarray: put it in a list"),
        (lambda: [x.numpy()], TypeError, "gave a numpy array: give tensors"),
        (lambda: lambda model: None, ValueError, r"calibration reached none of the layers body\.0, body\.3"),
        (lambda: ocs.Calibration(), ValueError, "calibration is of another model"),
        (lambda: [x * torch.inf], ValueError, "body.0: its input holds NaN"),
        (lambda: [x * 2.0**126], ValueError, "its input holds NaN, Inf or values that float32 hardly holds"),
        (lambda: None, ValueError, "body.0: abits=4 needs calibration=: batches"),
    ],
)
def test_bad_data_is_one_clear_error(net: SmallNet, data: Callable, error: type[Exception], message: str) -> None:
    before = state(net)
    with pytest.raises(error, match=message):
        ocs.quantize(net, abits=4, calibration=data())
    assert_unchanged(net, before)


def test_a_layer_never_reached_stays_float() -> None:
    net = SmallNet().eval()
    net.spare = nn.Linear(4, 4)
    spare = net.spare
    report = ocs.quantize(net, abits=4, calibration=x)
    assert net.spare is spare
    line = next(layer for layer in report.layers if layer.name == "spare")
    assert (line.status, line.reason) == ("float", "calibration never reached it")
    assert net.head.input_grid is not None


def test_only_what_is_quantized_is_looked_at() -> None:
    """Not the initial state of a recurrent layer, nor a mask; by position or by name."""
    net = nn.ModuleDict({"gru": nn.GRU(4, 6), "attention": nn.MultiheadAttention(6, 2)}).eval()
    words = torch.randn(5, 2, 4)

    def run(model: nn.ModuleDict) -> None:
        y, _ = model["gru"](words, torch.full((1, 2, 6), 50.0))
        model["attention"](y, attn_mask=torch.full((5, 5), 70.0), value=y, key=3 * y)

    calibration = ocs.calibrate(net, run)
    assert calibration["gru"].largest == float(words.abs().max())
    assert calibration["attention"].inputs == 2
    assert calibration["attention"].largest < 50


def test_a_model_whose_train_does_more_than_set_flags() -> None:
    """As layers that merge a low-rank update into their weight for evaluation: a round trip would round."""

    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> nn.Module:
            raise AssertionError("not for us to call")

    net = nn.Sequential(nn.Linear(4, 4), Merging(4, 4))
    ocs.calibrate(net, torch.randn(3, 4))


@pytest.mark.parametrize("ran_before", [False, True])
def test_compiled_models_are_looked_into(net: SmallNet, ran_before: bool) -> None:
    """Compiled code would not call the hooks."""
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    expected = copy.deepcopy(net)
    with torch.no_grad():
        if ran_before:
            compiled(x)
        ocs.quantize(compiled, abits=6, calibration=x)
        ocs.quantize(expected, abits=6, calibration=x)
        torch.testing.assert_close(compiled(x), expected(x))


def test_in_inference_mode() -> None:
    """With a batch made there, and a layer that works in place."""
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    with torch.inference_mode():
        calibration = ocs.calibrate(net, torch.randn(3, 4))
        ocs.quantize(copy.deepcopy(net), abits=8, calibration=calibration)
        ocs.quantize(net, abits=8, calibration=[torch.randn(3, 4), torch.randn(3, 4)])
    calibration["1"].update(torch.randn(2, 4))
    net(torch.randn(3, 4)).sum().backward()
    assert net[1].bias.grad is not None


def test_packed_sequences_pairs_and_lazy_layers() -> None:
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 4), [5, 3])
    for batch in (packed, (packed, 0), ({"input": packed}, 0)):
        calibration = ocs.calibrate(Wrapped(), [batch])
        assert calibration["lstm"].largest == float(packed.data.abs().max())
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="0: its weight holds no values yet"):
        ocs.quantize(lazy, abits=8, calibration=torch.randn(2, 4))
    with pytest.raises(ValueError, match="0: its weight holds no values yet"):
        ocs.quantize(lazy, rounding="gptq", calibration=torch.randn(2, 4))
    with pytest.raises(ValueError, match="0: its weight holds no values yet"):
        ocs.quantize(nn.Sequential(nn.Linear(4, 4)).to("meta"), rounding="gptq", calibration=torch.randn(2, 4))
    assert isinstance(lazy[0], nn.LazyLinear)


class Wrapped(nn.Module):
    """A recurrent layer in a model."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3)

    def forward(self, input: Any) -> Any:
        return self.lstm(input)


def test_fused_transformer_layers_are_looked_into() -> None:
    """In eval mode torch's own would not call its children."""
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 8)).eval()
    words = torch.randn(2, 5, 8)
    calibration = ocs.calibrate(net, words)
    assert {"0.linear1", "0.linear2", "1"} <= set(calibration)
    report = ocs.quantize(net, abits=8, calibration=calibration)
    notes = {line.label: (line.act_bits, line.reason) for line in report.quantized}
    assert notes["1"] == (8, "")
    assert all("input stays float" in notes[name][1] for name in notes if name.startswith("0."))
    assert torch.isfinite(net(words)).all()


def test_padded_sequences_do_not_become_nested() -> None:
    """As the fused encoder makes them of a padding mask; nested tensors have no statistics."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    calibration = ocs.calibrate(net, [{"src": torch.randn(2, 5, 8), "src_key_padding_mask": padding}])
    assert {f"layers.{i}.{name}" for i in (0, 1) for name in ("self_attn", "linear1", "linear2")} <= set(calibration)


# --- Several ranks ----------------------------------------------------------------------------------------------------

RANK = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, os.environ["TESTS"])
from conftest import SmallNet
import ocs
from ocs.tune import learned_rounding
learned_rounding.EPOCHS, learned_rounding.STEPS = 1, 60
dist.init_process_group("gloo")
x = torch.load(os.environ["FOLDER"] + "/images")
uneven = [x[:7], x[7:]]
cases = {"uneven": uneven, "release": uneven, "moments": uneven, "learned": uneven, "gptq": uneven}
cases |= {"one empty": [x[:0], x], "failing": [x, x * torch.nan]}
for case, shares in cases.items():
    share, out = shares[dist.get_rank()], f"{os.environ['FOLDER']}/{case}{dist.get_rank()}"
    torch.manual_seed(0)
    net = SmallNet().eval()
    try:
        if case == "moments":
            moments = ocs.calibrate(net, share.split(3), moments=True).moments
            kept = {name: (m["weight"].count, m["weight"].products) for name, m in moments.items()}
        elif case in ("learned", "gptq"):
            ocs.quantize(net, wbits=2, r=0.1, granularity="channel", rounding=case, calibration=share.split(3))
            kept = net.state_dict()
        else:
            clip = "kl-release" if case == "release" else "mse"
            options = {"abits": 4, "act_r": 0.2, "act_clip": clip, "correct_bias": True}
            ocs.quantize(net, **options, calibration=share.split(3) if len(share) else [])
            kept = net.state_dict()
        torch.save(kept, out)
    except Exception as error:
        open(out, "w").write(str(error))
dist.barrier()
dist.destroy_process_group()
running = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
assert not any("gloo" in name for name in running), running  # who kept the group? Its threads may abort the process
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """What two ranks left of a case: all of them in one launch, which takes longer than they do."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(x, folder / "images")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = folder / "rank.py"
    script.write_text(RANK)
    tests = str(Path(__file__).resolve().parents[1])
    env = os.environ | {"TESTS": tests, "FOLDER": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(script)], env=env, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return lambda case: [folder / f"{case}{rank}" for rank in range(2)]


def test_two_ranks_have_the_integers_that_one_learned(ranks: Callable[[str], list[Path]]) -> None:
    first, second, before = (torch.load(path) for path in (*ranks("learned"), ranks("gptq")[0]))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in first.items())


@pytest.mark.parametrize("case", ["uneven", "one empty", "release"])
def test_two_ranks_give_what_one_process_gives(net: SmallNet, ranks: Callable[[str], list[Path]], case: str) -> None:
    """With uneven shares, and to the last bit, but for sums in another order."""
    first, second = (torch.load(path) for path in ranks(case))
    clip = "kl-release" if case == "release" else "mse"
    ocs.quantize(net, abits=4, act_r=0.2, act_clip=clip, correct_bias=True, calibration=x)
    for name, tensor in net.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        tolerance = 1e-5 if name.endswith("bias") else 0
        torch.testing.assert_close(first[name], tensor, rtol=tolerance, atol=tolerance)


def test_second_moments_of_two_ranks(net: SmallNet, ranks: Callable[[str], list[Path]]) -> None:
    """The same on both, and those of one process but for the order of summation."""
    first, second = (torch.load(path) for path in ranks("moments"))
    moments = ocs.calibrate(net, x, moments=True).moments
    assert set(first) == set(moments)
    for name, (count, products) in first.items():
        assert count == second[name][0] == moments[name]["weight"].count
        assert torch.equal(products, second[name][1])
        sums = moments[name]["weight"].products  # float32: each off by a few units of its largest term
        torch.testing.assert_close(products, sums, rtol=1e-5, atol=1e-6 * float(sums.max()))


def test_no_rank_waits_for_one_that_failed(ranks: Callable[[str], list[Path]]) -> None:
    first, second = (path.read_text() for path in ranks("failing"))
    assert "calibration failed on 1 other rank" in first
    assert "body.0: its input holds NaN" in second
