"""Lowering, compiling and exporting what testers brought: each was wrong once, or unclear."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from test_compile import needs, relative
from torch import Tensor, nn

import ocs


def quantized(model: nn.Module, *inputs: Tensor, **options: object) -> nn.Module:
    """Quantize weights and inputs, calibrated on these inputs."""
    settings = {"wbits": 5, "r": 0.02, "abits": 8, "act_signed": "auto", "fold_bn": True, "skip": None} | options
    ocs.quantize(model.eval(), calibration=lambda each: each(*inputs), **settings)
    return model


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Two(nn.Module):
    """Takes two inputs that differ in what is done to them, the second optional, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """x, y [N, 8] -> [N, 8]."""
        return (self.a(x) - (0 if y is None else self.b(y))) * scale


# --- Arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["inductor", "onnxruntime"])
def test_arguments_are_those_of_forward_however_they_come(engine: str) -> None:
    needs(engine)
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    model = quantized(Two(), x, y)
    compiled = ocs.compile(model, {"y": y, "x": x}, engine=engine, additions=False)
    for args, kwargs in (((x, y), {}), ((x,), {"y": y}), ((), {"y": y, "x": x})):
        assert relative(compiled(*args, **kwargs), model(*args, **kwargs)) < 0.01
    with pytest.raises(TypeError, match=r"do not fit Two\.forward: got an unexpected keyword argument 'nonsense'"):
        compiled(x, nonsense=x)


@pytest.mark.parametrize("engine", ["inductor", "onnxruntime"])
def test_numbers_and_missing_arguments_are_not_those_of_the_example(engine: str) -> None:
    needs(engine)
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    model = quantized(Two(), x, y)
    compiled = ocs.compile(model, (x, y), engine=engine, additions=False)
    assert relative(compiled(x, y, 3.0), model(x, y, 3.0)) < 0.01
    assert relative(compiled(x), model(x)) < 0.01
    assert relative(compiled(x, y, 1), model(x, y, 1)) < 0.01


@pytest.mark.parametrize("engine", ["inductor", "onnxruntime"])
def test_one_tensor_for_two_arguments_of_the_example(engine: str) -> None:
    needs(engine)
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    model = quantized(Two(), x, y)
    compiled = ocs.compile(model, (x, x), engine=engine, additions=False)
    assert relative(compiled(x, y), model(x, y)) < 0.01


def test_inductor_takes_any_strides() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = quantized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), x)
    compiled = ocs.compile(model, x)
    for given in (x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[..., ::2].repeat(1, 1, 1, 2)):
        assert relative(compiled(given), model(given)) < 0.01


def test_a_mask_of_one_row_is_no_batch() -> None:
    needs("onnxruntime")

    class Masked(Two):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.a(x) * mask + self.b(x)

    model = quantized(Masked(), torch.randn(1, 8), torch.ones(1, 8))
    compiled = ocs.compile(model, (torch.randn(3, 8), torch.ones(1, 8)), engine="onnxruntime", additions=False)
    x = torch.randn(5, 8)
    assert relative(compiled(x, torch.ones(1, 8)), model(x, torch.ones(1, 8))) < 0.01


# --- Residual additions -----------------------------------------------------------------------------------------------


class Sum(nn.Module):
    """Adds a layer's output to its input."""

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        nn.init.normal_(self.second.weight, std=1e-2)
        self.head, self.alpha = nn.Linear(16, 4), alpha

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 3, H, W] -> [N, 4]."""
        x = self.first(x)
        x = torch.add(x, self.second(x), alpha=self.alpha) if self.alpha != 1 else x + self.second(x)
        return self.head(x.relu().mean((2, 3)))


@pytest.mark.parametrize(
    "options", [{"abits": 4}, {"abits": 2}, {"act_clip": 0.3}, {"overrides": {"second": {"abits": 3}}}]
)
def test_terms_are_rounded_to_8_bits_whatever_their_reader_has(options: dict[str, object]) -> None:
    """Only the reader's own grid may be coarse or clipped, not what is added."""
    needs("onnxruntime")
    x = torch.randn(4, 3, 8, 8)
    model = quantized(Sum(), x, **options)
    exact, rounded = (ocs.compile(model, x, engine="onnxruntime", additions=each)(x) for each in (False, True))
    assert relative(rounded, exact) < 0.02


def test_alpha_of_an_addition() -> None:
    needs("onnxruntime")
    x = torch.randn(4, 3, 8, 8)
    model = quantized(Sum(alpha=8.0), x)
    assert relative(ocs.compile(model, x, engine="onnxruntime")(x), model(x)) < 0.02


def test_a_term_that_was_zero_in_calibration_stays_float() -> None:
    needs("onnxruntime")

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
            self.gate = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(self.gate * x) + self.other(x)

    x = torch.randn(4, 8)
    model = quantized(Gated(), x)
    model.gate.data.fill_(1.0)
    assert relative(ocs.compile(model, x, engine="onnxruntime")(x), model(x)) < 0.02


class Dead(nn.Module):
    """A convolution two of whose channels a BatchNorm makes next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.next, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm.weight.data[:2] = torch.tensor([1e-5, -3e-7])
        self.norm.bias.data[:2] = torch.tensor([0.4, 0.7])

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 3, H, W] -> [N, 8, H, W]."""
        return self.last(self.next(self.norm(self.conv(x)).relu()).relu())


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_biases_of_dead_channels(engine: str) -> None:
    """Their scale is so small that the bias leaves int32, in which ONNX Runtime holds it."""
    needs(engine)
    x = torch.randn(4, 3, 8, 8)
    model = quantized(Dead(), x, granularity="channel")
    assert relative(ocs.compile(model, x, engine=engine, additions=False)(x), model(x)) < 0.02


@pytest.mark.parametrize("small", [1e-30, 1e-8])
def test_inputs_next_to_nothing(small: float) -> None:
    needs("onnxruntime")
    x = small * torch.randn(4, 8)
    model = quantized(nn.Sequential(nn.Linear(8, 8)), x)
    assert relative(ocs.compile(model, x, engine="onnxruntime")(x), model(x)) < 0.02


class Shared(nn.Module):
    """Calls one layer twice, and looks words up in the weight of another."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.twice, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, index: Tensor) -> Tensor:
        """index [N, L] -> [N, L, 20]."""
        return self.head(self.twice(self.twice(self.words(index)).relu()))


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_a_weight_of_two_readers(bits: int) -> None:
    """A layer that is called twice, and a head that is tied to an embedding, in one file."""
    needs("onnxruntime")
    index = torch.randint(0, 20, (3, 5))
    model = quantized(Shared(), index, wbits=bits, embeddings=True, r=0.0)
    assert relative(ocs.compile(model, index, engine="onnxruntime")(index), model(index)) < 0.05


# --- What lowered models are asked ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [lambda: nn.Linear(8, 8), lambda: nn.Linear(8, 6, bias=False)])
def test_weights_are_read_as_floats(layer: object) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer()

        def forward(self, x: Tensor) -> Tensor:
            weight = self.layer.weight
            return self.layer(x.to(weight.dtype)) / weight.shape[1] + x @ weight.T

    x = torch.randn(4, 8)
    model = quantized(Reads(), x, wbits=8, r=0.5)
    expected = model(x)
    assert relative(ocs.lower(model)(x), expected) < 0.01
    needs("onnxruntime")
    assert relative(ocs.compile(model, x, engine="onnxruntime")(x), expected) < 0.01


def test_hooks_survive_a_copy() -> None:
    x = torch.randn(4, 8)
    model = quantized(nn.Sequential(nn.Linear(8, 8)), x)
    model[0].register_forward_hook(lambda module, args, output: 10 * output)
    expected = model(x)
    assert relative(copy.deepcopy(ocs.lower(model))(x), expected) < 1e-5


def test_transformer_encoder_with_a_padding_mask() -> None:
    """torch's encoder reads weights of attention before it decides not to fuse it."""
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = quantized(nn.TransformerEncoder(layer, 2), x)
    expected = model(x, src_key_padding_mask=mask)
    lowered = ocs.lower(model)
    assert relative(lowered(x, src_key_padding_mask=mask)[~mask], expected[~mask]) < 0.05


def test_buffers_of_the_model_are_its_own() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(x) * self.calls

    x = torch.randn(4, 8)
    model = quantized(Counts(), x)
    before = float(model.calls)
    compiled = ocs.compile(model, x, additions=False)
    compiled(x)
    assert float(model.calls) == before
    needs("onnxruntime")
    with pytest.raises(ValueError, match=r"calls: forward changes it.*\.pt2"):
        ocs.compile(model, x, engine="onnxruntime")


# --- One clear error --------------------------------------------------------------------------------------------------


def test_another_target_than_that_it_was_lowered_for(tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    model = ocs.lower(quantized(Two(), x, torch.randn(4, 8)), target="vnni")
    with pytest.raises(ValueError, match="target='tensorrt': the model was lowered for 'vnni'"):
        ocs.export(model, tmp_path / "model.onnx", x, target="tensorrt")


def test_a_model_that_is_partly_lowered_is_lowered_whole() -> None:
    needs("onnxruntime")
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    model = quantized(Two(), x, y)
    model.a = ocs.lower(model.a)
    assert relative(ocs.compile(model, (x, y), engine="onnxruntime")(x, y), model(x, y)) < 0.02


def test_a_layer_in_a_closure_is_named_as_the_problem() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.call = lambda x, layer=self.layer: layer(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.call(x)

    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match="held where lowering does not find it"):
        ocs.compile(quantized(Hidden(), x), x)


def test_what_cannot_be_copied_can_be_lowered() -> None:
    needs("onnxruntime")
    x = torch.randn(4, 8)
    model = quantized(Two(), x, torch.randn(4, 8))
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"Two cannot be copied.*ocs\.lower\(model\)"):
        ocs.compile(model, x, engine="onnxruntime")
    expected = model(x)
    assert relative(ocs.compile(ocs.lower(model), x, engine="onnxruntime")(x), expected) < 0.02


def test_precisions_that_no_engine_takes(tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    model = quantized(Two(), x, torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"a: it is in float64.*model\.float\(\)"):
        ocs.lower(copy.deepcopy(model).double())
    with pytest.raises(ValueError, match=r"computes in torch\.bfloat16: for ONNX use model\.float\(\)"):
        ocs.export(copy.deepcopy(model).bfloat16(), tmp_path / "model.onnx", x.bfloat16())


def test_examples_that_do_not_fit() -> None:
    x = torch.randn(4, 8)
    model = quantized(Two(), x, torch.randn(4, 8))
    with pytest.raises(TypeError, match=r"example: the arguments do not fit Two\.forward: too many"):
        ocs.compile(model, (x, x, 1.0, x))
    with pytest.raises(ValueError, match="additions='no': use True or False"):
        ocs.compile(model, x, additions="no")
    with pytest.raises(ValueError, match=r"form='program': that is of a \.pt2"):
        ocs.export(model, "model.onnx", x, form="program")


def test_compare_refuses_other_numbers_of_outputs() -> None:
    x = torch.randn(4, 8)
    model = Two().eval()
    with pytest.raises(ValueError, match="the model returns 2 float tensors, the float model 1"):
        ocs.compare(model, lambda *args: (model(*args), model(*args)), [x])
