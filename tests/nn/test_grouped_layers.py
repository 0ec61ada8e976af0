"""Layers with a scale for each group of input channels: expanded and folded, in files, packed, and what is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Everything, SmallNet, forge, header_of
from torch import Tensor, nn

import ocs
from ocs.nn.embedding import QuantEmbedding


class Wide(nn.Module):
    """Every kind of layer, with more input channels than a group has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(40, 36, 3, padding=1)
        self.grouped = nn.Conv2d(36, 80, 3, groups=1)
        self.up = nn.ConvTranspose2d(80, 40, 2, groups=2)
        self.depthwise = nn.Conv2d(40, 40, 3, groups=40)
        self.linear = nn.Linear(40, 70)
        self.lstm = nn.LSTM(70, 33, num_layers=2, bidirectional=True)
        self.gru = nn.GRU(66, 48)
        self.cell = nn.RNNCell(48, 64)
        self.attention = nn.MultiheadAttention(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.up(self.grouped(self.conv(x).relu()).relu()).relu())
        y = self.linear(y.mean(3).permute(2, 0, 1))
        y = self.gru(self.lstm(y)[0])[0]
        y = torch.stack([self.cell(step) for step in y])
        return self.attention(y, y, y)[0]


def wide() -> nn.Module:
    torch.manual_seed(0)
    model = Wide().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(parameter.sign() * parameter.abs() ** 1.5 * 3)
                parameter[:, -3:-2] *= 5
    return model


X = torch.randn(2, 40, 8, 8, generator=torch.Generator().manual_seed(1))
HOW: dict[str, Any] = {"wbits": 5, "r": 0.2, "granularity": "group", "group": 32, "skip": None, "explain": False}


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(X)


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    model = wide()
    ocs.quantize(model, **HOW)
    return model


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "naive": {"split": "naive", "clip": "mse"},
    "even, by error": {"split": "even", "select": "error"},
    "squant, auto": {"rounding": "squant", "clip": "auto"},
    "best": {"recipe": "best"},
    "gptq": {"rounding": "gptq", "clip": "auto", "calibration": X},
    "knapsack": {"allocate": "knapsack"},
    "inputs": {"abits": 6, "act_r": 0.2, "act_select": "max", "calibration": X},
    "rows": {"abits": 8, "act_scale": "dynamic", "overrides": {n: {"abits": None, "act_scale": "static"}
             for n in ("conv", "grouped", "up", "depthwise")}},
}  # fmt: skip


@pytest.mark.parametrize("how", OPTIONS)
def test_expanded_and_folded_agree_and_have_less_error_than_output_channels(how: str) -> None:
    models, expected = [wide() for _ in range(3)], output(wide())
    for model, expand in zip(models, (True, False), strict=False):
        report = ocs.quantize(model, **{**HOW, **OPTIONS[how], "expand": expand})
    torch.testing.assert_close(output(models[0]), output(models[1]), rtol=1e-3, atol=1e-4)
    layers = [module for module in models[0].modules() if isinstance(module, ocs.nn.QuantizedLayer)]
    assert {layer.scale_group for layer in layers} == {32}
    assert all(line.granularity == "group" for line in report.quantized)
    of_channels = {**HOW, **OPTIONS[how], "granularity": "channel", "group": 64}
    other = ocs.quantize(models[2], **of_channels)
    assert report.mean_sqnr_db > other.mean_sqnr_db + 0.3
    assert (output(models[0]) - expected).norm() < 1.1 * (output(models[2]) - expected).norm()


def test_the_report_counts_every_scale(quantized: nn.Module) -> None:
    model = wide()
    report = ocs.quantize(model, **{**HOW, "explain": True})
    line = next(line for line in report.quantized if line.name == "linear")
    assert len(line.scale) == len(line.threshold) == 70 * (2 + 1)
    assert line.packed_bytes == -(-70 * 48 * 5 // 8) + 4 * (210 + 8)
    assert [what for what, _ in line.steps] == ["nearest", "OCS", "groups of 32"]
    assert report.settings["group"] == 32
    steps = wide().linear.weight.detach() / model.linear.scale[:, torch.arange(40) // 32]
    assert line.histogram.reach == pytest.approx(float(steps.abs().max()), rel=1e-5)
    assert sum(line.histogram.before) == steps.numel()
    assert "scale per channel and 32 inputs" in repr(model.linear)
    assert str(report)
    torch.testing.assert_close(output(model), output(quantized))


def test_embeddings_keep_a_scale_for_each_row() -> None:
    torch.manual_seed(0)
    model = Everything().eval()
    ocs.quantize(model, wbits=5, r=0.3, granularity="group", group=32, embeddings=True)
    assert isinstance(model.embedding, QuantEmbedding)
    assert model.embedding.scale.shape == (20,)
    assert model.decoder.scale.shape == (20,)
    assert model.net.head.scale.shape == (5, 2)


# --- Files, states, packed layers -------------------------------------------------------------------------------------


def test_files_hold_it_in_a_format_of_their_own(quantized: nn.Module, tmp_path: Path) -> None:
    path, again = tmp_path / "model.safetensors", wide()
    ocs.save(quantized, path)
    header = header_of(path)
    assert header["format"] == 6
    assert header["layers"]["linear"]["group"] == 32
    ocs.load(path, again)
    assert torch.equal(output(again), output(quantized))
    for (name, ours), (other, theirs) in zip(again.state_dict().items(), quantized.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("group", [64, 0, 16, -32, 32.0, "32", 2**40])
def test_another_group_in_a_file_is_refused(quantized: nn.Module, tmp_path: Path, group: Any) -> None:
    path, model = tmp_path / "model.safetensors", wide()
    ocs.save(quantized, path)
    forge(path, lambda header, tensors: header["layers"]["linear"].update(group=group))
    with pytest.raises(ValueError, match=r"linear: scale is \[70, 3\]|linear.scale is \[70, 3\]|its header is damaged"):
        ocs.load(path, model)
    assert torch.equal(output(model), output(wide()))


def test_states_and_copies(quantized: nn.Module) -> None:
    again = wide()
    ocs.quantize(again, **{**HOW, "clip": "mse"})
    assert not torch.equal(output(again), output(quantized))
    again.load_state_dict(quantized.state_dict())
    assert torch.equal(output(again), output(quantized))
    assert torch.equal(output(pickle.loads(pickle.dumps(copy.deepcopy(quantized)))), output(quantized))
    half = copy.deepcopy(quantized).bfloat16()
    assert half.linear.scale.dtype == torch.float32
    assert half.linear.weight.dtype == torch.bfloat16
    other = wide()
    ocs.quantize(other, **{**HOW, "group": 64})
    with pytest.raises(RuntimeError, match="scale has a size mismatch"):
        other.load_state_dict(quantized.state_dict())


@pytest.mark.parametrize("how", ["plain", "rows"])
def test_packed_layers_multiply_by_groups(how: str, tmp_path: Path) -> None:
    """C is no multiple of 32: columns of zeros fill up the last group of the original channels, and go again."""
    model = wide()
    ocs.quantize(model, **{**HOW, **OPTIONS[how]})
    packed = copy.deepcopy(model)
    ocs.pack(packed)
    assert packed.linear.scale.shape == (5, 3, 16)
    assert packed.linear._buffers["copies"].numel() == 24 + 8
    torch.testing.assert_close(output(packed), output(model), rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(packed.linear.weight, model.linear.weight)
    assert torch.equal(packed.linear.source, model.linear.source)
    assert "scale per channel and 32 inputs" in repr(packed.linear)
    copied = copy.deepcopy(packed)
    copied.load_state_dict(packed.state_dict())
    assert torch.equal(output(copied), output(packed))
    for whole in (model, packed):
        ocs.save(whole, tmp_path / "file")
        loaded = wide()
        ocs.load(tmp_path / "file", loaded)
        assert torch.equal(output(loaded), output(model))
    straight = wide()
    ocs.load(tmp_path / "file", straight, packed=True)
    assert torch.equal(output(straight), output(packed))
    ocs.unpack(packed)
    for (name, ours), (other, theirs) in zip(packed.state_dict().items(), model.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs)


def test_without_copies_nothing_is_filled_up() -> None:
    model = nn.Sequential(nn.Linear(70, 40))
    ocs.quantize(model, **{**HOW, "r": 0.0})
    packed = copy.deepcopy(model)
    ocs.pack(packed)
    assert packed[0]._buffers["copies"].numel() == 0
    x = torch.randn(3, 70)
    torch.testing.assert_close(packed(x), model(x))


@pytest.mark.parametrize(
    "run", [ocs.lower, lambda model: ocs.compile(model, X), lambda model: ocs.export(model, "x.pt2", X)]
)
def test_engines_have_no_such_scales(run: Any, quantized: nn.Module) -> None:
    model = copy.deepcopy(quantized)
    with pytest.raises(ValueError, match=r"conv: granularity='group' has .*: quantize with granularity='channel', or"):
        run(model)
    assert torch.equal(output(model), output(quantized))


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "group", "group": 48}, "group=48: use a multiple of 32"),
        ({"granularity": "group", "group": 0}, "group=0: use a multiple of 32"),
        ({"group": 32}, "group=32 has no effect: it is for granularity='group'"),
        ({"group": 32, "granularity": "channel"}, "group=32 has no effect"),
        ({"overrides": {"head": {"group": 32}}}, "group=32 has no effect"),
        ({"overrides": {"head": {"group": "64", "granularity": "group"}}}, "group='64': use a multiple of 32"),
    ],
)
def test_what_cannot_be_is_refused(net: SmallNet, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ocs.quantize(net, wbits=4, **options)


def test_a_layer_may_have_groups_of_its_own() -> None:
    model = wide()
    ocs.quantize(
        model,
        wbits=4,
        r=0.1,
        group=96,
        overrides={"linear": {"granularity": "group"}, "gru": {"granularity": "channel"}},
    )
    assert model.linear.scale.shape == (70, 2)
    assert model.gru.scale_ih_l0.shape == (144,)
    assert model.cell.scale_ih.shape == ()


def test_an_option_of_other_tools_is_named(net: SmallNet) -> None:
    with pytest.raises(TypeError, match="no option 'group_size': the nearest is group"):
        ocs.quantize(net, group_size=64)


def test_sizes_decide_over_groups() -> None:
    uniform = ocs.quantize(wide(), **HOW)
    auto = ocs.quantize(wide(), **{**HOW, "wbits": "auto", "budget": uniform.packed_bytes})
    assert auto.packed_bytes <= uniform.packed_bytes
    assert {line.granularity for line in auto.quantized} == {"group"}
