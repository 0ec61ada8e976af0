"""Layers with quantized inputs are copied, saved, loaded, packed, compiled and cast; wrong states are refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from conftest import SmallNet, assert_unchanged, header_of, state
from test_quantized_input import CASES
from torch import nn

import ocs
from ocs.formats import reader
from ocs.model.batchnorm_folding import FoldedBatchNorm


@pytest.fixture(params=["static", "oracle", "no splits", "unsigned", "repeated", "by error"])
def model(request: pytest.FixtureRequest, net: SmallNet) -> nn.Module:
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    if "act_select" in CASES[request.param]:
        with torch.no_grad():
            net.stem.weight[2] *= 40
            net.body[0].weight[:, 2] /= 40
    net.options = {"abits": 4, "wbits": 5, "r": 0.1, **CASES[request.param]}
    ocs.quantize(net, **net.options, calibration=x)
    if request.param == "repeated":
        assert net.body[0].input_source[8:].tolist() == [2] * 4
    return net


def test_copies_states_and_files(model: nn.Module, tmp_path) -> None:
    x = torch.randn(3, 3, 8, 8)
    again = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    torch.manual_seed(5)
    other = SmallNet().eval()
    ocs.quantize(other, **model.options, calibration=torch.randn(8, 3, 8, 8) * 3)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    ocs.save(model, tmp_path / "model.safetensors")
    loaded = ocs.load(tmp_path / "model.safetensors", SmallNet().eval())
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    for each in (*again, other, loaded):
        assert torch.equal(each(x), model(x))
        assert repr(each) == repr(model)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch's own tracer
def test_compile_export_and_trace(model: nn.Module) -> None:
    if model.head.input_grid.oracle:
        pytest.skip("each batch has a plan of its own")
    x = torch.randn(3, 3, 8, 8)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)


def test_dtypes_and_gradients(model: nn.Module) -> None:
    x = torch.randn(3, 3, 8, 8, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0
    scale = None if model.head.input_scale is None else float(model.head.input_scale)
    half = copy.deepcopy(model).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(
        half(x.bfloat16()).float(), model(x), rtol=0.2, atol=0.2 * float(model(x).detach().abs().max())
    )
    assert scale is None or (half.head.input_scale.dtype, float(half.head.input_scale)) == (torch.float32, scale)


def test_states_that_cannot_be_are_refused(net: SmallNet) -> None:
    ocs.quantize(net, abits=4, act_r=0.2, calibration=torch.randn(8, 3, 8, 8))
    before = state(net)
    good = net.state_dict()
    for name, value, message in (
        ("head.input_scale", torch.tensor(-1.0), "head: input_scale is not positive and finite"),
        ("head.input_scale", torch.tensor(torch.nan), "head: input_scale is not positive and finite"),
        ("head.input_source", good["head.input_source"] + 1, "head: input_source is no split plan"),
        ("head.input_source", good["head.input_source"][:-1], "head: input_source has a size mismatch"),
        ("head.input_source", torch.tensor([*range(16), 3, 3, 3, 16]), "head: input_source is no split plan"),
        ("head.input_source", torch.tensor([*range(15), 3, 3, 3, 3, 15]), "head: input_source is no split plan"),
        ("head.input_source", good["head.input_source"].float(), "head: input_source is no split plan"),
        ("head.input_scale", None, "head: input_scale is missing"),
        ("head.input_form", torch.tensor([4, 0, 1, 0]).byte(), "head: input_form is .*: the state is of another input"),
        ("head.input_form", torch.tensor([4, 1, 0, 0]).byte(), "head: input_form is .*: the state is of another input"),
    ):
        bad = dict(good)
        bad.pop(name)
        if value is not None:
            bad[name] = value
        with pytest.raises(RuntimeError, match=message):
            net.load_state_dict(bad)
        assert_unchanged(net, before)


def test_files_with_repeated_splits_tell_older_readers(net: SmallNet, tmp_path, monkeypatch) -> None:
    x = torch.randn(8, 3, 8, 8)
    x[:, 1] *= 40
    formats = {}
    for select in ("percentile", "max"):
        ours, path = copy.deepcopy(net), tmp_path / select
        ocs.quantize(ours, abits=4, act_r=1.0, act_select=select, skip=None, calibration=x)
        ocs.save(ours, path)
        header = header_of(path)
        formats[select] = header["format"]
        assert set(header["layers"]["stem"]["input"]) == {"bits", "signed", "splits", "split", "act_split", "clip"}
        for packed in (False, True):
            loaded = ocs.load(path, SmallNet().eval(), packed=packed)
            assert loaded.stem.input_source.tolist() == ours.stem.input_source.tolist()
            torch.testing.assert_close(loaded(x), ours(x))
    assert ours.stem.input_source.tolist() == [0, 1, 2, 1, 1, 1]
    assert formats == {"percentile": 2, "max": 5}
    monkeypatch.setattr(reader, "FORMAT", 4)
    ocs.load(tmp_path / "percentile", SmallNet())
    with pytest.raises(ValueError, match="wrote it in format 5, newer than 4: upgrade torch-ocs"):
        ocs.load(tmp_path / "max", SmallNet())


def test_packed_layers_take_the_state_of_repeated_splits(net: SmallNet) -> None:
    x = torch.randn(8, 3, 8, 8)
    x[:, 1] *= 40
    other = copy.deepcopy(net)
    for ours, data in ((net, x), (other, torch.randn(8, 3, 8, 8))):
        ocs.quantize(ours, abits=4, act_r=1.0, act_select="max", skip=None, calibration=data)
        ocs.pack(ours)
    expected = net(x)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), expected)
    ocs.unpack(net)
    torch.testing.assert_close(net(x), expected)


def test_a_model_with_folded_batch_norms_is_saved_and_loaded(net: SmallNet, tmp_path) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        net.body[1].running_mean.normal_()
        net.body[1].running_var.uniform_(0.5, 2)
    x = torch.randn(8, 3, 8, 8)
    expected = copy.deepcopy(net)(x)
    report = ocs.quantize(net, wbits=8, fold_bn=True, abits=8, calibration=x)
    assert report.batch_norms == {"body.1": ""}
    assert "1 of 1 batch norms folded" in str(report)
    assert isinstance(net.body[1], FoldedBatchNorm)
    assert net.body[0].bias is not None
    assert (net(x) - expected).abs().max() < 0.05 * expected.abs().max()
    ocs.save(net, tmp_path / "folded.safetensors")
    for target in (SmallNet().eval(), SmallNet().eval().to("meta")):
        loaded = ocs.load(tmp_path / "folded.safetensors", target)
        assert torch.equal(loaded(x), net(x))
    plain = nn.Sequential(nn.Conv2d(3, 8, 3))
    before = state(plain)
    with pytest.raises(ValueError, match=r"has no batch norm 'body\.1' to fold"):
        ocs.load(tmp_path / "folded.safetensors", plain)
    assert_unchanged(plain, before)
