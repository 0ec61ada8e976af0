"""What people do with models: copy, move, compile, export, wrap, train. With every kind of layer at once."""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from conftest import Everything, SmallNet
from torch import Tensor, nn

import ocs
from ocs.nn.base import QuantizedLayer
from ocs.nn.packed.layer import PackedLayer


@pytest.fixture(params=["expanded", "folded", "packed"])
def model(request: pytest.FixtureRequest) -> Everything:
    torch.manual_seed(0)
    model = Everything().eval()
    ocs.quantize(model, wbits=5, r=0.2, expand=request.param == "expanded")
    return ocs.pack(model) if request.param == "packed" else model


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return Everything.inputs()


def assert_close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-5) -> None:
    for ours, theirs in zip(a, b, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def quantized_layers(model: nn.Module) -> list[QuantizedLayer]:
    return [module for module in model.modules() if isinstance(module, QuantizedLayer)]


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_a_state_dict(model: nn.Module) -> nn.Module:
    """The state alone, into a model with other weights, quantized with the same settings."""
    other = Everything().eval()
    ocs.quantize(other, wbits=5, r=0.2, expand=model.lstm.expand)
    if isinstance(model.lstm, PackedLayer):
        ocs.pack(other)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    "travel", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_a_file, through_a_state_dict]
)
def test_copies_are_the_same_model(model: Everything, inputs: tuple, travel: Callable) -> None:
    with torch.no_grad():
        assert_close(travel(model)(*inputs), model(*inputs), 0)


def test_expanded_and_folded_share_their_state(inputs: tuple) -> None:
    torch.manual_seed(0)
    expanded = Everything().eval()
    folded = copy.deepcopy(expanded)
    ocs.quantize(expanded, wbits=4, r=0.2)
    ocs.quantize(folded, wbits=4, r=0.2, expand=False)
    assert list(expanded.state_dict()) == list(folded.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(expanded.state_dict().values(), folded.state_dict().values(), strict=True)
    )
    with torch.no_grad():
        assert_close(expanded(*inputs), folded(*inputs))


@pytest.mark.filterwarnings("ignore:Casting complex values to real")  # Module.to casts every buffer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_casting(model: Everything, inputs: tuple, dtype: torch.dtype) -> None:
    before = model(*inputs)
    running = [b.clone() for layer in quantized_layers(model) for b in layer.buffers(recurse=False)]
    model.to(dtype)
    assert all(output.dtype == dtype for output in model(*(x.to(dtype) for x in inputs)))
    for layer in quantized_layers(model):
        for name in layer.channels:
            assert [tensor.dtype for tensor in layer.weight_state(name)] == [torch.int8, torch.float32, torch.int64]
    if dtype == torch.float64:
        assert_close(model.float()(*inputs), before)
        after = [b for layer in quantized_layers(model) for b in layer.buffers(recurse=False)]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(after, running, strict=True))


def test_compile_whole_graph(model: Everything, inputs: tuple) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(*inputs), model(*inputs))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own use
def test_compiled_code(model: Everything, inputs: tuple) -> None:
    """By torch's own compiler, which the machine needs a C++ compiler for, as our build does."""
    torch._dynamo.reset()
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True)(*inputs), model(*inputs), 1e-4)


def test_export_with_a_dynamic_batch(model: Everything, inputs: tuple) -> None:
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, inputs, dynamic_shapes=({0: batch}, None))
    image, words = torch.randn(5, 3, 8, 8), inputs[1]
    assert_close(program.module()(image, words), model(image, words))


def test_data_parallel(model: Everything, inputs: tuple) -> None:
    with torch.no_grad():
        assert_close(nn.DataParallel(model)(*inputs), model(*inputs), 0)


def test_distributed_data_parallel(model: Everything, inputs: tuple) -> None:
    """One process; its gradients are those of the plain model."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    twin = copy.deepcopy(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        outputs = wrapped(*inputs)
        sum(output.square().sum() for output in outputs).backward()
    finally:
        dist.destroy_process_group()
    expected = twin(*inputs)
    assert_close(outputs, expected)
    sum(output.square().sum() for output in expected).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_quantizing_a_wrapped_model(inputs: tuple) -> None:
    torch.manual_seed(0)
    model = Everything().eval()
    report = ocs.quantize(nn.DataParallel(model), wbits=5, r=0.2)
    assert not any(line.name.startswith("module.") for line in report.layers)  # names of the model inside
    assert len(quantized_layers(model)) == len({line.name for line in report.quantized})


def test_inference_mode(model: Everything, inputs: tuple) -> None:
    with torch.no_grad():
        expected = model(*inputs)
    with torch.inference_mode():
        assert_close(model(*inputs), expected, 0)


def test_quantizing_in_inference_mode(inputs: tuple) -> None:
    torch.manual_seed(0)
    model, twin = Everything().eval(), Everything().eval()
    twin.load_state_dict(model.state_dict())
    with torch.inference_mode():
        ocs.quantize(model, wbits=5, r=0.2)
        outputs = model(*inputs)
    ocs.quantize(twin, wbits=5, r=0.2)
    assert_close(outputs, [output.detach() for output in twin(*inputs)])
    sum(output.square().sum() for output in model(*inputs)).backward()  # it may still be trained on


def test_symbolic_trace(net: SmallNet) -> None:
    """As feature extractors do; torch's recurrent layers are leaves to it, ours are not."""
    net.body.append(nn.Conv2d(16, 16, 1))
    ocs.quantize(net, wbits=5, r=0.2)
    for x in (torch.randn(2, 3, 8, 8), torch.randn(5, 3, 8, 8)):
        torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), net(x))


def test_requires_grad() -> None:
    """Quantized weights are no parameters; what was frozen stays frozen, and the rest trains."""
    model = Everything()
    model.net.head.bias.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    ocs.quantize(model, wbits=5, r=0.2)
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert after == {name: before[name] for name in after}
    assert all(name.endswith("bias") or "bias_" in name for name in after if "lstm" in name or "up" in name)
    inputs = [x.requires_grad_() for x in Everything.inputs()]
    sum(output.square().sum() for output in model(*inputs)).backward()
    assert all(x.grad.any() for x in inputs)
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in model.requires_grad_(False).parameters())


def test_autocast(model: Everything, inputs: tuple) -> None:
    """As the float model: products in bfloat16."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        image = model.net(inputs[0])
    assert image.dtype == torch.bfloat16
    torch.testing.assert_close(image.float(), model.net(inputs[0]).detach(), rtol=0.05, atol=0.05)


def test_module_methods_and_functional_call(model: Everything, inputs: tuple) -> None:
    with torch.no_grad():
        expected = model(*inputs)
        assert_close(torch.func.functional_call(model, dict(model.named_parameters()), inputs), expected, 0)
        assert_close(model.train().eval()(*inputs), expected, 0)
        assert_close(model.to(memory_format=torch.channels_last)(*inputs), expected)
