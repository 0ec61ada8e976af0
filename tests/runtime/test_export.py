"""ocs.export: .pt2 and .onnx files that run without ocs and compute what the quantized model does."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SmallNet
from test_compile import Residual, relative, residual
from torch import Tensor, nn

import ocs

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    """What ONNX Runtime makes of a file."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    return [torch.as_tensor(each) for each in found]


def initializers(path: Path) -> dict[str, object]:
    return {each.name: each for each in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(("bits", "kind"), [(2, "INT4"), (4, "INT4"), (5, "INT8"), (8, "INT8")])
def test_weights_are_in_the_narrowest_integers(bits: int, kind: str, granularity: str, tmp_path: Path) -> None:
    model, x = residual(wbits=bits, r=0, granularity=granularity)
    ocs.export(model, tmp_path / "model.onnx", x, additions=False)
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    found = initializers(tmp_path / "model.onnx")
    for name in ("stem.0.weight", "first.3.weight", "head.weight"):  # names are those of the float model
        assert onnx.TensorProto.DataType.Name(found[name].data_type) == kind
    (y,) = run(tmp_path / "model.onnx", x)
    assert relative(y, model(x)) < 0.03


def test_channels_of_sums_beyond_4_bits_are_held_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(64, 32, 3), nn.Flatten(), nn.Linear(288, 16)), torch.randn(2, 64, 5, 5)
    with torch.no_grad():
        for layer, channels in ((model[0], [3, 9]), (model[2], [7])):
            layer.weight[:, channels] *= 2
    ocs.quantize(model, wbits=4, r=0.05, skip=None)
    lowered = ocs.lower(copy.deepcopy(model))
    ocs.export(model, tmp_path / "model.onnx", x)
    found = {name: onnx.numpy_helper.to_array(each) for name, each in initializers(tmp_path / "model.onnx").items()}
    for name in ("0.weight", "2.weight"):
        (ints,) = [each for own, each in lowered.named_buffers() if own == f"{name}_int"]
        wide = [each for own, each in found.items() if own.startswith(f"{name}_int.wide")]
        assert found[name].dtype.name == "int4"
        assert found[name].size + wide[0].size == ints.numel()
        assert 0 < wide[0].shape[1] <= math.ceil(0.05 * ints.shape[1])
        assert (abs(wide[0]) > 7).any((0, *range(2, ints.dim()))).all()
    torch.testing.assert_close(run(tmp_path / "model.onnx", x)[0], model(x).detach(), rtol=1e-4, atol=1e-5)


def test_export_shows_its_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(4, 16)
    ocs.quantize(model, wbits=4)
    ocs.export(model, tmp_path / "model.onnx", x)
    assert "export" not in capsys.readouterr().err
    ocs.export(model, tmp_path / "model.onnx", x, progress=True)
    assert "export: write |" in capsys.readouterr().err
    ocs.compile(model, x, engine="onnxruntime", progress=True)
    assert "compile: onnxruntime |" in capsys.readouterr().err


def test_form_of_the_file(tmp_path: Path) -> None:
    model, x = residual()
    ocs.export(model, tmp_path / "model.onnx", x[:1])
    found = onnx.load(tmp_path / "model.onnx")
    (opset,) = [each.version for each in found.opset_import if each.domain == ""]
    assert opset >= 21
    assert [dim.dim_param or dim.dim_value for dim in found.graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        3,
        16,
        16,
    ]
    assert [dim.dim_param or dim.dim_value for dim in found.graph.output[0].type.tensor_type.shape.dim] == ["batch", 10]
    assert {each.key: each.value for each in found.metadata_props}["ocs"] == ocs.__version__
    assert found.graph.input[0].name == "x"
    assert str(Path(__file__).parent).encode() not in (tmp_path / "model.onnx").read_bytes()
    (y,) = run(tmp_path / "model.onnx", x)
    assert relative(y, model(x)) < 0.03


def test_all_products_are_integer_in_onnxruntime(tmp_path: Path) -> None:
    """Once it has fused what it knows, no convolution is left in floats, nor an addition."""
    model, x = residual()
    ocs.export(model, tmp_path / "model.onnx", x)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    assert kinds.count("QLinearConv") == 5
    assert kinds.count("QLinearAdd") == 2
    assert not {"Conv", "Add"} & {*kinds}


def test_copies_that_do_not_fit_are_gathered_in_8_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(4, 16)
    ocs.quantize(model, wbits=8, r=0.3, abits=8, calibration=[x])
    ocs.export(model, tmp_path / "model.onnx", x)
    nodes = {node.op_type: node for node in onnx.load(tmp_path / "model.onnx").graph.node}
    (quantized,) = nodes["QuantizeLinear"].output
    assert nodes["Gather"].input[0] == quantized
    assert relative(run(tmp_path / "model.onnx", x)[0], model(x)) < 0.01


def test_grids_of_few_bits_saturate_where_they_end(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(4, 16)
    ocs.quantize(model, wbits=5, abits=4, calibration=[x])
    ocs.export(model, tmp_path / "model.onnx", x)
    assert relative(run(tmp_path / "model.onnx", 5 * x)[0], model(5 * x)) < 0.01


# --- TensorRT ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 6])
def test_tensorrt_takes_int8_with_zero_point_0(bits: int, tmp_path: Path) -> None:
    model, x = residual(act_signed=True, abits=bits, wbits=8, r=0.1)
    ocs.export(model, tmp_path / "model.onnx", x, target="tensorrt")
    graph = onnx.load(tmp_path / "model.onnx").graph
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    dequantized = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantizers) >= 6
    for node in quantizers:
        scale, zero_point = (constants[name] for name in node.input[1:3])
        assert scale.size == 1
        assert (str(zero_point.dtype), int(zero_point)) == ("int8", 0)
        assert node.output[0] in dequantized
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            assert str(constants[node.input[0]].dtype) == "int8"
            assert constants[node.input[1]].ndim == 1
            assert not constants[node.input[2]].any()
    assert not {"Cast", "Clip"} & {node.op_type for node in graph.node} or bits < 8
    (y,) = run(tmp_path / "model.onnx", x)
    assert relative(y, model(x)) < 0.05


def test_tensorrt_refuses_8_bits_without_sign(tmp_path: Path) -> None:
    model, x = residual()
    with pytest.raises(ValueError, match=r"first\.0: its inputs are 8 bits without sign.*act_signed=True"):
        ocs.export(model, tmp_path / "model.onnx", x, target="tensorrt")
    assert not list(tmp_path.iterdir())


# --- Recurrent layers -------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A recurrent layer that gives its outputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Outputs alone."""
        return self.layer(x)[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("options", [{"bidirectional": True}, {"batch_first": True}, {"bias": False, "num_layers": 1}])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_lstm_and_gru_hold_integers(
    kind: type[nn.RNNBase], options: dict[str, object], granularity: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = Recurrent(kind(10, 12, **{"num_layers": 2, **options})).eval(), torch.randn(5, 2, 10)
    ocs.quantize(model, wbits=5, r=0.1, granularity=granularity)
    ocs.export(model, tmp_path / "model.onnx", x)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert kind.__name__ in {node.op_type for node in graph.node}
    floats = sum(onnx.numpy_helper.to_array(each).size for each in graph.initializer if each.data_type == 1)
    weights = sum(weight.numel() for weight in model.layer.buffers() if weight.dtype == torch.int8)
    assert floats < weights / 2  # biases and scales
    (y,) = run(tmp_path / "model.onnx", x)
    torch.testing.assert_close(y, model(x).detach(), rtol=1e-4, atol=1e-5)


def test_large_weights_are_put_together(tmp_path: Path) -> None:
    """Beyond the size up to which torch's exporter folds constants."""
    torch.manual_seed(0)
    model, x = Recurrent(nn.LSTM(300, 300)).eval(), torch.randn(3, 2, 300)
    ocs.quantize(model, wbits=5)
    ocs.export(model, tmp_path / "model.onnx", x)
    assert (tmp_path / "model.onnx").stat().st_size < 1.1 * 8 * 300 * 300
    torch.testing.assert_close(run(tmp_path / "model.onnx", x)[0], model(x).detach(), rtol=1e-4, atol=1e-5)


def test_dynamic_lstm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Recurrent(nn.LSTM(10, 12, 2, bidirectional=True)).eval(), torch.randn(5, 2, 10)
    ocs.quantize(model, wbits=5, r=0.1)
    ocs.export(model, tmp_path / "model.onnx", x, dynamic_lstm=True)
    assert "DynamicQuantizeLSTM" in {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert 1e-5 < relative(run(tmp_path / "model.onnx", x)[0], model(x)) < 0.05
    compiled = ocs.compile(model, x, engine="onnxruntime", dynamic_lstm=True)
    assert relative(compiled(x), model(x)) < 0.05
    with pytest.raises(ValueError, match="use 'onnxruntime'"):
        ocs.compile(model, x, dynamic_lstm=True)
    with pytest.raises(ValueError, match=r"no \.onnx file"):
        ocs.export(model, tmp_path / "model.pt2", x, dynamic_lstm=True)


def test_projections_are_refused(tmp_path: Path) -> None:
    model, x = Recurrent(nn.LSTM(10, 12, proj_size=5)), torch.randn(5, 2, 10)
    ocs.quantize(model, wbits=5)
    with pytest.raises(ValueError, match="layer: ONNX has no LSTM with projections"):
        ocs.export(model, tmp_path / "model.onnx", x)


# --- .pt2 -------------------------------------------------------------------------------------------------------------

_LOAD = """
import sys
sys.modules["ocs"] = None
import torch, torch.ao.quantization.fx._decomposed
x, y = torch.load("pair.pt")
run = {}
torch.testing.assert_close(run(x), y, rtol=0, atol=0.05 * float(y.abs().max()))
"""


@pytest.mark.parametrize(
    ("form", "load"),
    [
        ("program", 'torch.export.load("model.pt2").module()'),
        ("package", 'torch._inductor.aoti_load_package("model.pt2")'),
    ],
)
def test_pt2_runs_without_ocs(form: str, load: str, tmp_path: Path) -> None:
    model, x = residual()
    torch.save((x, model(x).detach()), tmp_path / "pair.pt")
    ocs.export(model, tmp_path / "model.pt2", x, form=form)
    subprocess.run([sys.executable, "-W", "ignore", "-c", _LOAD.format(load)], check=True, cwd=tmp_path)


def test_program_is_of_standard_operators(tmp_path: Path) -> None:
    model, x = residual()
    part = torch.cat([x, torch.zeros(10000, *x.shape[1:])])[: len(x)]  # of much data, which must stay out of the file
    ocs.export(model, tmp_path / "model.pt2", part, form="program")
    assert (tmp_path / "model.pt2").stat().st_size < 500_000
    program = torch.export.load(tmp_path / "model.pt2")
    namespaces = {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")}
    assert namespaces == {"aten", "quantized_decomposed"}
    assert {t.dtype for name, t in program.state_dict.items() if name.endswith(".weight_int")} == {torch.int8}
    assert relative(program.module()(x[:3]), model(x[:3])) < 0.02  # any batch size
    sizes = {name: t.numel() * t.element_size() for name, t in program.state_dict.items()}
    assert sum(sizes.values()) < 0.4 * sum(4 * p.numel() for p in Residual().parameters())


# --- Errors and what stays --------------------------------------------------------------------------------------------


def test_errors(net: SmallNet, tmp_path: Path) -> None:
    x = torch.randn(1, 3, 8, 8)
    ocs.quantize(net, wbits=5)
    with pytest.raises(ValueError, match=r"use a name that ends in \.pt2 or \.onnx"):
        ocs.export(net, tmp_path / "model.pth", x)
    with pytest.raises(ValueError, match="form='aot': use 'package' or 'program'"):
        ocs.export(net, tmp_path / "model.pt2", x, form="aot")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ocs.export(net, tmp_path / "missing" / "model.onnx", x)
    with pytest.raises(ValueError, match=r"call ocs\.quantize"):
        ocs.export(SmallNet(), tmp_path / "model.onnx", x)
    assert not list(tmp_path.iterdir())


def test_what_torch_replaces_while_it_traces_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt may keep torch itself from putting it back."""
    model, x = residual()
    call = nn.Module.__call__

    def interrupted(*args: object, **kwargs: object) -> None:
        nn.Module.__call__ = lambda *args, **kwargs: call(*args, **kwargs)
        torch.fx._symbolic_trace._is_fx_tracing_flag = True
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.export, "export", interrupted)
    for name in ("model.onnx", "model.pt2"):
        with pytest.raises(KeyboardInterrupt):
            ocs.export(model, tmp_path / name, x)
        assert nn.Module.__call__ is call
        assert not torch.fx._symbolic_trace._is_fx_tracing_flag


def test_the_model_stays(tmp_path: Path) -> None:
    model, x = residual()
    before, y = json.dumps(sorted(model.state_dict())), model(x)
    ocs.export(model, tmp_path / "model.onnx", x)
    assert json.dumps(sorted(model.state_dict())) == before
    assert torch.equal(model(x), y)


def test_ranges_of_outputs_are_saved(tmp_path: Path) -> None:
    """A model that was loaded is exported as the one that was saved."""
    pytest.importorskip("safetensors")
    model, x = residual()
    assert model.first[3].output_range is not None
    ocs.save(model, tmp_path / "model.safetensors")
    loaded = ocs.load(tmp_path / "model.safetensors", Residual().eval())
    assert loaded.first[3].output_range == model.first[3].output_range
    for name, each in (("first", model), ("second", loaded)):
        ocs.export(each, tmp_path / f"{name}.onnx", x)
    assert torch.equal(*(run(tmp_path / f"{name}.onnx", x)[0] for name in ("first", "second")))
