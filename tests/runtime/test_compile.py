"""ocs.compile: integer products really run, in each engine, and compute what the quantized model does."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable

import pytest
import torch
from conftest import Everything, SmallNet
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import ocs

ENGINES = ["inductor", "onnxruntime", "openvino"]


def needs(engine: str) -> None:
    """Skip where an engine is not installed."""
    if engine != "inductor":
        for name in ("onnxscript", engine):
            if importlib.util.find_spec(name) is None:
                pytest.skip(f"{name} is not installed")


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def profiled(run: Callable[..., object], x: Tensor) -> dict[str, int]:
    """How often each operator runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.10 warns of every profile
        with profile(activities=[ProfilerActivity.CPU]) as found:
            run(x)
    return {each.key: each.count for each in found.key_averages()}


class Residual(nn.Module):
    """Two blocks with residual additions, a pooling before, and products of 1 x 1, 3 x 3 and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.first = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64)
        )
        self.down = nn.Sequential(nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64))
        self.second = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 3, H, W] -> [N, 10]."""
        x = self.pool(self.stem(x))
        x = (self.first(x) + self.down(x)).relu()
        x = (self.second(x) + x).relu()
        return self.head(x.mean((2, 3)))


def residual(**options: object) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(4, 3, 16, 16)
    settings = {"wbits": 5, "r": 0.05, "abits": 8, "act_signed": "auto", "fold_bn": True, "skip": None} | options
    ocs.quantize(model, calibration=[x], **settings)
    return model, x


@pytest.fixture(scope="module")
def compiled_residual() -> tuple[nn.Module, Tensor, ocs.Compiled]:
    """A residual network, its input, and what Inductor makes of it."""
    model, x = residual()
    return model, x, ocs.compile(model, x)


def test_inductor_runs_integer_kernels(compiled_residual: tuple[nn.Module, Tensor, ocs.Compiled]) -> None:
    """Off the profile: six convolutions, two of which add a residual, and a linear layer; none in floats."""
    _, x, compiled = compiled_residual
    compiled(x)
    calls = profiled(compiled, x)
    fused = calls.get("onednn::qconv2d_pointwise", 0)
    assert calls.get("onednn::qconv_pointwise", 0) + fused == 5
    assert fused == 2
    assert calls.get("onednn::qlinear_pointwise", 0) == 1
    assert not any("mkldnn" in name or "aten::convolution" in name or "addmm" in name for name in calls)


def test_inductor_passes_8_bit_tensors_on(compiled_residual: tuple[nn.Module, Tensor, ocs.Compiled]) -> None:
    """In the program: what is pooled and added was rounded, but for one product of each addition."""
    from ocs.runtime.program import as_example, lowered_copy, program_of

    model, x, _ = compiled_residual
    lowered = lowered_copy(model, "this")
    program = program_of(lowered, as_example(lowered, x), additions="one", dynamic=False)
    dequantized = "quantized_decomposed.dequantize_per_tensor.default"
    adds = [node for node in program.graph.nodes if str(node.target) == "aten.add.Tensor"]
    assert [sum(str(term.target) == dequantized for term in node.args) for node in adds] == [1, 1]
    (pool,) = [node for node in program.graph.nodes if str(node.target) == "aten.max_pool2d.default"]
    assert str(pool.args[0].target) == dequantized
    both = program_of(lowered, as_example(lowered, x), additions="all")
    adds = [node for node in both.graph.nodes if str(node.target) == "aten.add.Tensor"]
    assert [sum(str(term.target) == dequantized for term in node.args) for node in adds] == [2, 2]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_scale_for_each_row(engine: str) -> None:
    needs(engine)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 5)).eval()
    ocs.quantize(model, wbits=5, r=0.1, abits=8, act_scale="dynamic")
    x = torch.randn(4, 12) * torch.tensor([1.0, 100.0, 0.0, 0.01]).view(4, 1)
    compiled = ocs.compile(model, x, engine=engine)
    assert all(relative(ours, theirs) < 1e-4 for ours, theirs in zip(compiled(x), model(x), strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_residual_network(engine: str, compiled_residual: tuple[nn.Module, Tensor, ocs.Compiled]) -> None:
    needs(engine)
    model, x, compiled = compiled_residual
    compiled = compiled if engine == "inductor" else ocs.compile(model, x, engine=engine)
    before = [type(module) for module in model.modules()]
    assert relative(compiled(x), model(x)) < 0.02
    assert not compiled(x).requires_grad
    assert engine in repr(compiled)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_any_batch_size(engine: str) -> None:
    needs(engine)
    model, x = residual()
    compiled = ocs.compile(model, x[:1], engine=engine, additions=False)
    assert relative(compiled(x[:3]), model(x[:3])) < 0.01


def test_inductor_compiles_for_a_new_shape(compiled_residual: tuple[nn.Module, Tensor, ocs.Compiled]) -> None:
    model, x, compiled = compiled_residual
    assert relative(compiled(x[:1]), model(x[:1])) < 0.02
    assert "2 compiled" in repr(compiled)


@pytest.mark.parametrize("engine", ENGINES)
def test_everything(engine: str) -> None:
    needs(engine)
    if engine != "inductor" and torch.__version__ < "2.11":
        pytest.skip("torch 2.10 gives the states of an LSTM one dimension more, and its ONNX files are wrong")
    torch.manual_seed(0)
    model, inputs = Everything().eval(), Everything.inputs()
    ocs.quantize(model, wbits=5, r=0.1, embeddings=True, abits=8, calibration=[inputs])
    found = ocs.compile(model, inputs, engine=engine)(*inputs)
    assert isinstance(found, list)
    for ours, theirs in zip(found, model(*inputs), strict=True):
        assert relative(ours, theirs) < 0.03


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    "options", [{"wbits": 3, "abits": 4}, {"wbits": 4, "abits": 6, "act_signed": True}, {"wbits": 8, "r": 0.5}]
)
def test_few_bits(engine: str, options: dict[str, object]) -> None:
    needs(engine)
    model, x = residual(**options)
    assert relative(ocs.compile(model, x, engine=engine, additions=False)(3 * x), model(3 * x)) < 0.05


def test_few_bits_in_inductor() -> None:
    """Grids narrower than 8 bits saturate where they end, and products stay integer."""
    model, x = residual(wbits=4, abits=5)
    compiled = ocs.compile(model, x, additions=False)
    compiled(x)
    assert relative(compiled(3 * x), model(3 * x)) < 0.05
    assert sum(count for name, count in profiled(compiled, 3 * x).items() if "qconv" in name) == 5


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent(kind: type[nn.Module], engine: str) -> None:
    needs(engine)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = kind(10, 12, 2, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(5, 2, 10)
    ocs.quantize(model, wbits=5, r=0.1)
    compiled = ocs.compile(model, x, engine=engine)
    assert relative(compiled(x), model(x)) < 1e-4
    assert relative(compiled(x[:, :1]), model(x[:, :1])) < 1e-4


def test_keyword_arguments(net: SmallNet) -> None:
    needs("onnxruntime")
    x = torch.randn(2, 3, 8, 8)
    ocs.quantize(net, wbits=5)
    compiled = ocs.compile(net, {"x": x}, engine="onnxruntime")
    torch.testing.assert_close(compiled(x=x), net(x))


def test_batch_size_as_a_constant_is_said() -> None:
    needs("onnxruntime")
    model, x = nn.Sequential(Fixed()), torch.randn(3, 8)
    ocs.quantize(model, wbits=5)
    with pytest.warns(UserWarning, match=r"takes shapes \[\['3', '8'\]\] only"):
        ocs.compile(model, x, engine="onnxruntime")


class Fixed(nn.Module):
    """A layer that takes three rows only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """x [3, 8] -> [3, 4]."""
        return self.layer(x.view(3, 8))


def test_errors(net: SmallNet) -> None:
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"call ocs\.quantize"):
        ocs.compile(net, x)
    ocs.quantize(net, wbits=5)
    with pytest.raises(ValueError, match="engine='tvm': use 'inductor' or 'onnxruntime' or 'openvino'"):
        ocs.compile(net, x, engine="tvm")
    with pytest.raises(TypeError, match="example is a str without tensors: use a tensor, a tuple"):
        ocs.compile(net, "image")
    with pytest.raises(TypeError, match="str"):
        ocs.compile("net", x)


def test_engine_that_is_missing(net: SmallNet, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    ocs.quantize(net, wbits=5)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with warnings.catch_warnings(), pytest.raises(ImportError, match=r"pip install torch-ocs\[openvino\]"):
        ocs.compile(net, torch.randn(1, 3, 8, 8), engine="openvino")
