"""correct_bias: outputs keep their mean, measured or from the norms, and what is unknown stays as it was."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from conftest import Everything, SmallNet, assert_unchanged, state
from fashion_mnist import load, load_model
from torch import Tensor, nn

import ocs
from ocs.calibration.run import Statistics
from ocs.nn import QuantConv2d, QuantLinear

LAYERS = {
    "linear": (nn.Linear(6, 5), (50, 6)),
    "linear, no bias": (nn.Linear(6, 5, bias=False), (10, 5, 6)),
    "conv1d": (nn.Conv1d(6, 4, 3, padding=1, padding_mode="circular"), (4, 6, 12)),
    "conv2d, groups": (nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular", groups=2, bias=False), (4, 6, 8, 8)),
    "conv2d, depthwise": (nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular", groups=6), (4, 6, 8, 8)),
    "conv3d": (nn.Conv3d(6, 4, 1), (4, 6, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(6, 4, 3, stride=3), (4, 6, 5, 5)),
    "transposed, groups": (nn.ConvTranspose1d(6, 4, 2, stride=2, groups=2, bias=False), (4, 6, 9)),
}
OPTIONS = [{"expand": True}, {"expand": False}, {"granularity": "channel", "rounding": "squant"}]


def means(y: Tensor, layer: nn.Module) -> Tensor:
    """Of each output channel."""
    axis = -1 if isinstance(layer, nn.Linear | QuantLinear) else 1
    return y.detach().double().movedim(axis, 0).flatten(1).mean(1)


def inputs(*shape: int) -> Tensor:
    """With a mean of its own in each channel."""
    axis = len(shape) - 1 if len(shape) < 4 and shape[-1] == 6 else 1
    x = torch.rand(*shape, generator=torch.Generator().manual_seed(1))
    return x + torch.linspace(-1, 3, shape[axis]).view(-1, *[1] * (len(shape) - 1 - axis))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_keep_their_mean(name: str, options: dict[str, object]) -> None:
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    model, x = nn.Sequential(copy.deepcopy(layer)), inputs(*shape)
    before, plain = model(x), copy.deepcopy(model)
    options = {"wbits": 3, "r": 0.3, "skip": None, **options}
    ocs.quantize(plain, **options)
    report = ocs.quantize(model, correct_bias=True, calibration=x.split(3), **options)
    expected = means(before, layer)
    torch.testing.assert_close(means(model(x), layer), expected, rtol=0, atol=1e-5)
    assert float((means(plain(x), layer) - expected).abs().max()) > 1e-3
    assert report.layers[0].bias_from == "calibration"
    assert "bias" not in report.layers[0].reason


def test_norms_give_nearly_what_512_images_give() -> None:
    model, images = load_model(), load("calibration")[0]
    measured, of_norms, plain = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    ocs.quantize(measured, wbits=3, correct_bias=True, calibration=images.split(128))
    report = ocs.quantize(of_norms, wbits=3, correct_bias=True)
    ocs.quantize(plain, wbits=3)
    assert [line.bias_from for line in report.layers] == ["", *["norms"] * 19]
    assert report.layers[0].status == "skipped"
    for name, layer in of_norms.named_modules():
        if isinstance(layer, QuantConv2d):
            expected = measured.get_submodule(name).bias
            assert plain.get_submodule(name).bias is None
            assert float((layer.bias - expected).detach().norm() / expected.detach().norm()) < 0.4, name
    assert model.layer1[0].conv1.bias is None


def test_unknown_means_leave_the_bias(net: SmallNet) -> None:
    bias = {name: p for name, p in net.named_parameters() if "bias" in name}
    report = ocs.quantize(net, wbits=4, correct_bias=True, skip=None)
    unknown = "bias not corrected: the mean of its input is not known, or only guessed"
    assert {line.name: (line.bias_from, line.reason) for line in report.layers} == {
        "stem": ("", unknown),
        "body.0": ("", unknown),  # after the ReLU of a convolution: no guess is used
        "body.3": ("norms", ""),
        "body.5": ("", unknown),
        "head": ("", unknown),
    }
    same = {name for name, p in net.named_parameters() if bias.get(name) is p}
    assert same == {"stem.bias", "body.1.bias", "body.5.bias", "head.bias"}


def test_kinds_that_keep_their_bias() -> None:
    report = ocs.quantize(Everything().eval(), correct_bias=True, calibration=lambda model: model(*Everything.inputs()))
    found = {line.kind: (line.bias_from, line.reason) for line in report.quantized}
    for kind in ("LSTM", "GRUCell", "MultiheadAttention"):
        assert found[kind][0] == ""
        assert f"bias not corrected: not for {kind}" in found[kind][1]
    assert found["ConvTranspose2d"][0] == found["Linear"][0] == "calibration"


def corrected(model: nn.Module, x: Tensor, **options: object) -> nn.Module:
    ocs.quantize(model, **{"wbits": 3, "r": 0.1, "correct_bias": True, "calibration": x, "skip": None, **options})
    return model


class Pair(nn.Module):
    """Convolution, norm, linear layer, none of the layers with a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 3, bias=False)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 4, H, W] -> [N, 3]."""
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


X = inputs(8, 4, 6, 6)


def test_created_biases_survive(tmp_path: Path) -> None:
    model = corrected(Pair(), X)
    expected = model(X)
    assert {"conv.bias", "head.bias"} <= model.state_dict().keys()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    other = corrected(Pair(), X * 2)
    other.load_state_dict(model.state_dict())
    ocs.save(model, tmp_path / "model")
    with torch.device("meta"):
        empty = Pair()
    copies = {
        "copy": copy.deepcopy(model),
        "pickle": torch.load(buffer, weights_only=False),
        "state_dict": other,
        "file": ocs.load(tmp_path / "model", Pair()),
        "file into meta": ocs.load(tmp_path / "model", empty),
        "export": torch.export.export(model, (X,)).module(),
        "compiled": torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True),
    }
    for name, twin in copies.items():
        torch.testing.assert_close(twin(X), expected, msg=name)


def test_files_add_biases_only_where_they_were_corrected(tmp_path: Path) -> None:
    """A bias that the model lacks is else a sign of another model."""

    class Biased(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.head.bias = nn.Parameter(torch.zeros(3))

    model = Biased()
    ocs.quantize(model, skip=None)
    ocs.save(model, tmp_path / "model")
    with pytest.raises(ValueError, match=r"it has besides head\.bias"):
        ocs.load(tmp_path / "model", Pair())


def test_with_folded_norms(tmp_path: Path) -> None:
    model = Pair()
    expected = model.norm(model.conv(X)).mean((0, 2, 3))
    corrected(model, X, fold_bn=True)
    torch.testing.assert_close(model.conv(X).mean((0, 2, 3)), expected)
    ocs.save(model, tmp_path / "model")
    torch.testing.assert_close(ocs.load(tmp_path / "model", Pair())(X), model(X))


def test_a_new_bias_is_of_its_layer() -> None:
    """Neither the float model's bias nor one that layers share changes; dtype, and whether it is trained, stay."""
    first, second = nn.Linear(4, 4, dtype=torch.float64), nn.Linear(4, 4, dtype=torch.float64)
    second.bias = first.bias
    second.bias.requires_grad_(False)
    before = first.bias.clone()
    model = corrected(nn.Sequential(first, second), torch.rand(9, 4, dtype=torch.float64))
    assert torch.equal(first.bias, before)
    assert model[0].bias is not model[1].bias
    assert model[0].bias.dtype == torch.float64
    assert not model[0].bias.requires_grad
    model = corrected(nn.Sequential(nn.Linear(4, 4, bias=False)), torch.rand(9, 4))
    assert model[0].bias.requires_grad


def test_one_calibration_for_many_settings(net: SmallNet) -> None:
    x = torch.rand(6, 3, 8, 8)
    calibration = ocs.calibrate(net, x.split(2))
    other = copy.deepcopy(net)
    torch.testing.assert_close(corrected(net, calibration)(x), corrected(other, x)(x))
    assert calibration["stem"].mean().dtype == torch.float64
    torch.testing.assert_close(calibration["stem"].mean(), x.double().mean((0, 2, 3)))


def test_overrides_and_quantized_inputs(net: SmallNet) -> None:
    x = torch.rand(6, 3, 8, 8)
    options = {"abits": 4, "act_r": 0.1, "overrides": {"body.*": {"correct_bias": True}}, "calibration": x}
    report = ocs.quantize(net, wbits=4, skip=None, **options)
    assert {line.name for line in report.layers if line.bias_from} == {"body.0", "body.3", "body.5"}
    assert all(line.act_bits == 4 for line in report.quantized)


BAD = [
    ({"correct_bias": "yes"}, "correct_bias='yes': use True or False"),
    ({"correct_bias": False}, "calibration= has no effect on these options: add"),
    ({"calibration": []}, "calibration is empty"),
    ({"calibration": [torch.full((1, 3, 8, 8), torch.nan)]}, "its input holds NaN"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_options(net: SmallNet, options: dict[str, object], message: str) -> None:
    before = state(net)
    with pytest.raises(ValueError, match=message):
        corrected(net, torch.rand(6, 3, 8, 8), **options)
    assert_unchanged(net, before)


def test_a_bias_beyond_its_dtype() -> None:
    model = nn.Sequential(nn.Linear(4, 2).half())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[6e4, 2.5e4, 2.5e4, 2.5e4]] * 2))
    before = state(model)
    with pytest.raises(ValueError, match="0: correct_bias=True: the corrected bias is not finite"):
        corrected(model, lambda model: model(torch.full((1, 4), 9.0).half()), wbits=2, r=0.0)
    assert_unchanged(model, before)


def test_statistics_of_means() -> None:
    x = torch.randn(5, 3, 4, 6)
    whole, parts = Statistics(-3), [Statistics(-3), Statistics(-3), Statistics(-3)]
    whole.update(x)
    parts[0].update(x[:2].to(memory_format=torch.channels_last))
    parts[2].update(x[2:])
    for other in parts[1:]:
        parts[0].merge(other)
    torch.testing.assert_close(whole.mean(), x.double().mean((0, 2, 3)), rtol=0, atol=1e-7)
    torch.testing.assert_close(parts[0].mean(), whole.mean(), rtol=0, atol=1e-7)
    whole.update(torch.zeros(5, 3, 4, 6))
    torch.testing.assert_close(whole.mean(), x.double().mean((0, 2, 3)) / 2, rtol=0, atol=1e-7)
    assert Statistics(-1).mean() is None
    unlike = Statistics(-1)
    for width in (3, 4, 3):
        unlike.update(torch.randn(2, width))
    assert unlike.mean() is None
