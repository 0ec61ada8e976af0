"""ocs.compare: what is kept of outputs, layer by layer."""

from __future__ import annotations

import copy
import json
import math
from itertools import pairwise

import pytest
import torch
from conftest import Everything, SmallNet
from torch import Tensor, nn

import ocs


def batches() -> list[Tensor]:
    """Three batches of images."""
    torch.manual_seed(1)
    return [torch.randn(4, 3, 8, 8) for _ in range(3)]


def literal(x: Tensor, y: Tensor) -> tuple[float, float]:
    """SQNR in dB and cosine of two tensors, by their definitions."""
    x, y = x.detach().double().flatten(), y.detach().double().flatten()
    return 10 * math.log10(float((x**2).sum() / ((x - y) ** 2).sum())), float(x @ y / (x.norm() * y.norm()))


def test_outputs(net: SmallNet) -> None:
    quantized, data = copy.deepcopy(net), batches()
    ocs.quantize(quantized, wbits=4)
    comparison = ocs.compare(net, quantized, data)
    x, y = (torch.cat([model(batch) for batch in data]) for model in (net, quantized))
    (output,) = comparison.outputs
    assert (output.sqnr_db, output.cosine) == pytest.approx(literal(x, y), rel=1e-6)
    assert comparison.top1 == float((x.argmax(1) == y.argmax(1)).double().mean())
    assert comparison.batches == 3


def test_layers_in_running_order(net: SmallNet) -> None:
    """Of a folded BatchNorm's convolution, what the BatchNorm gave is compared."""
    quantized, data = copy.deepcopy(net), batches()[0]
    ocs.quantize(quantized, wbits=4, fold_bn=True)
    comparison = ocs.compare(net, quantized, data)
    assert [each.name for each in comparison.layers] == ["body.0", "body.3", "body.5", "head"]
    assert [each.kind for each in comparison.layers] == ["Conv2d", "Conv2d", "Conv2d", "Linear"]
    float_stem = net.stem(data).relu()
    expected = literal(net.body[:2](float_stem), quantized.body[0](float_stem))
    assert (comparison.layers[0].sqnr_db, comparison.layers[0].cosine) == pytest.approx(expected, rel=1e-6)
    assert comparison.layers[-1].sqnr_db == pytest.approx(comparison.outputs[0].sqnr_db)


def test_the_layer_that_breaks_a_model_is_named(net: SmallNet) -> None:
    quantized = copy.deepcopy(net)
    ocs.quantize(quantized, wbits=8, overrides={"body.3": {"wbits": 2}})
    comparison = ocs.compare(net, quantized, batches())
    assert comparison.worst().name == "body.3"
    assert "most is lost at body.3" in comparison.summary()


def test_a_model_against_itself(net: SmallNet) -> None:
    before = repr(net)
    comparison = ocs.compare(net, lambda x: net(x), batches())
    assert comparison.outputs[0].sqnr_db == math.inf
    assert comparison.top1 == 1.0
    assert comparison.layers == ()
    assert "100 %" in comparison.summary()
    assert json.loads(comparison.to_json())["outputs"][0]["sqnr_db"] is None
    assert repr(net) == before
    assert not any(module._forward_hooks for module in net.modules())


def test_lowered_and_exported_models(net: SmallNet) -> None:
    quantized, data = copy.deepcopy(net), batches()
    ocs.quantize(quantized, wbits=5, abits=8, calibration=data)
    expected = ocs.compare(net, quantized, data).outputs[0]
    lowered = ocs.lower(copy.deepcopy(quantized))
    exported = torch.export.export(lowered, (data[0],)).module()
    for model in (lowered, exported):
        found = ocs.compare(net, model, data)
        assert found.layers == ()
        assert found.outputs[0].sqnr_db == pytest.approx(expected.sqnr_db, abs=1)


def test_several_outputs_and_dicts_of_arguments() -> None:
    torch.manual_seed(0)
    model = Everything().eval()
    quantized, (image, words) = copy.deepcopy(model), Everything.inputs()
    ocs.quantize(quantized, wbits=6, embeddings=True)
    comparison = ocs.compare(model, quantized, [{"image": image, "words": words}])
    assert [each.name for each in comparison.outputs] == [f"the model, {i}" for i in range(5)]
    assert {"lstm", "cell", "attention", "decoder"} <= {each.name for each in comparison.layers}


def test_table_and_plot(net: SmallNet) -> None:
    quantized = copy.deepcopy(net)
    ocs.quantize(quantized, wbits=4)
    comparison = ocs.compare(net, quantized, batches())
    lines = str(comparison).splitlines()
    assert " ".join(lines[: lines.index("")]) == comparison.summary()
    rows = lines[lines.index("") + 1 :]
    assert rows[0].split() == ["output", "of", "kind", "SQNR", "dB", "lost", "dB", "cosine"]
    assert [row.split()[0] for row in rows[1:]] == ["body.0", "body.3", "body.5", "head", "the"]
    lost = [f"{a.sqnr_db - b.sqnr_db:.1f}" for a, b in pairwise(comparison.layers)]
    assert [row.split()[3] for row in rows[2:5]] == lost
    pytest.importorskip("matplotlib")
    (axes,) = comparison.plot().axes
    assert list(axes.lines[0].get_ydata()) == [each.sqnr_db for each in comparison.layers]
    with pytest.raises(ValueError, match="no layers"):
        ocs.compare(net, lambda x: net(x), batches()).plot()


def test_errors(net: SmallNet) -> None:
    quantized = copy.deepcopy(net)
    ocs.quantize(quantized, wbits=4)
    with pytest.raises(ValueError, match="nothing to compare"):
        ocs.compare(net, quantized, [])
    with pytest.raises(TypeError, match="float_model is int"):
        ocs.compare(3, quantized, batches())
    with pytest.raises(ValueError, match=r"batches, batch 0: stem: its input has 4 channels"):
        ocs.compare(net, quantized, [torch.randn(1, 4, 8, 8)])
    with pytest.raises(ValueError, match="no layer in common"):
        ocs.compare(nn.Sequential(nn.Linear(2, 2)), quantized, batches())
    with pytest.raises(ValueError, match=r"the model: its output is \[4, 2\], of the float model \[4, 5\]"):
        ocs.compare(net, lambda x: net(x)[:, :2], batches())


class WritesToThem(nn.Module):
    """A residual block, which adds and activates in place, or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.in_place = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return y.add_(x).relu_() if self.in_place else (y + x).relu()


@pytest.mark.parametrize("fold_bn", [False, True])
def test_outputs_of_layers_are_as_these_gave_them(fold_bn: bool) -> None:
    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(WritesToThem(in_place), WritesToThem(in_place)).eval()
        quantized = copy.deepcopy(net)
        ocs.quantize(quantized, wbits=3, skip=None, fold_bn=fold_bn)
        found.append(ocs.compare(net, quantized, batches()).layers)
    assert found[0] == found[1]
