"""ocs.pack and ocs.unpack: all or nothing, to the bit and back, and k bits take k bits."""

from __future__ import annotations

import copy
import io
import json
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Everything, SmallNet, assert_unchanged, state
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ocs
from ocs.nn.base import QuantizedLayer
from ocs.nn.packed.layer import PackedLayer
from ocs.nn.packed.weight import PackedWeight

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"wbits": 5, "r": 0.2, "embeddings": True, "overrides": {"lstm": {"wbits": 3, "granularity": "channel"}}}


def everything() -> Everything:
    torch.manual_seed(0)
    return Everything().eval()


@pytest.fixture
def quantized() -> Everything:
    model = everything()
    ocs.quantize(model, **OPTIONS)
    return model


@pytest.fixture
def packed(quantized: Everything) -> nn.Module:
    return ocs.pack(copy.deepcopy(quantized))


def layers_of(model: nn.Module) -> list[QuantizedLayer]:
    return [module for module in model.modules() if isinstance(module, QuantizedLayer)]


def outputs(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(*Everything.inputs())


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-5) -> None:
    for each in zip(ours, theirs, strict=True):
        torch.testing.assert_close(*each, rtol=tolerance, atol=tolerance)


def assert_same_model(ours: nn.Module, theirs: nn.Module) -> None:
    """Of one class each, with the same tensors and outputs."""
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == theirs.state_dict()[name].dtype
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    assert_close(outputs(ours), outputs(theirs), 0)


# --- There and back ---------------------------------------------------------------------------------------------------


def test_there_and_back(quantized: Everything) -> None:
    model = copy.deepcopy(quantized)
    biases = {name: id(p) for name, p in model.named_parameters()}
    assert ocs.pack(model) is model
    assert all(isinstance(layer, PackedLayer) for layer in layers_of(model))
    assert {name: id(p) for name, p in model.named_parameters()} == biases
    assert_close(outputs(model), outputs(quantized))
    assert ocs.unpack(model) is model
    assert not any(isinstance(layer, PackedLayer) for layer in layers_of(model))
    assert_same_model(model, quantized)


def test_what_else_a_layer_has_goes_along(quantized: Everything) -> None:
    layer = quantized.net.head
    layer.note, layer.child = {"mine": 1}, nn.ReLU()
    layer.register_buffer("own", torch.ones(2))
    layer.register_parameter("factor", nn.Parameter(torch.ones(3)))
    names = [*quantized.state_dict()]
    packed = ocs.pack(quantized).net.head
    assert quantized.again is packed  # under its second name, too
    assert (packed.note, packed.child, packed.own, packed.factor) == (layer.note, layer.child, layer.own, layer.factor)
    assert packed.settings == layer.settings
    assert [*ocs.unpack(quantized).state_dict()] == names


def test_a_tie_stays_one(quantized: Everything) -> None:
    def tied(model: Everything) -> bool:
        embedding, decoder = (layer._buffers for layer in (model.embedding, model.decoder))
        return all(decoder[name] is embedding[name] for name in model.decoder.buffers_of("weight")[:2])

    assert tied(quantized)
    packed = ocs.pack(quantized)
    assert tied(packed)
    for travelled in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), copy.deepcopy(packed).bfloat16()):
        assert tied(travelled)
    assert tied(ocs.unpack(packed))


def test_a_model_that_is_a_layer() -> None:
    model, x = nn.Sequential(nn.Linear(40, 24)), torch.randn(3, 40)
    ocs.quantize(model, wbits=4, r=0.1)
    layer = model[0]
    packed = ocs.pack(layer)
    assert isinstance(packed, PackedLayer)
    assert type(ocs.unpack(packed)) is type(layer)
    torch.testing.assert_close(packed(x), layer(x))
    compiled = torch.compile(layer, backend="eager")
    assert ocs.pack(compiled) is not packed
    torch.testing.assert_close(compiled(x), layer(x))


def test_wrapped_models(quantized: Everything) -> None:
    expected, wrapper = outputs(quantized), nn.DataParallel(quantized)
    assert ocs.pack(wrapper) is wrapper
    assert all(isinstance(layer, PackedLayer) for layer in layers_of(wrapper))
    assert_close(outputs(wrapper), expected)


def test_a_layer_that_is_compiled_by_itself_runs_the_packed_one() -> None:
    model, x = nn.Sequential(nn.Linear(40, 24)), torch.randn(3, 40)
    ocs.quantize(model)
    model[0].compile(backend="eager")
    expected = model(x)
    ocs.pack(model)
    torch.testing.assert_close(model(x), expected)
    model[0].bias.data += 1
    torch.testing.assert_close(model(x), expected + 1)
    model[0].compile(backend="eager")
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), expected + 1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_wherever_it_is_called(quantized: Everything, mode: Callable[[], Any]) -> None:
    model = copy.deepcopy(quantized)
    with mode():
        ocs.pack(model)
    assert_close(outputs(model), outputs(quantized))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    model.net(x).sum().backward()
    assert x.grad.any()
    with mode():
        ocs.unpack(model)
    assert_same_model(model, quantized)


# --- All or nothing ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_packed_is_said_and_changes_nothing(quantized: Everything) -> None:
    quantized.decoder.weight_int = quantized.embedding.weight_int = torch.full_like(quantized.decoder.weight_int, 99)
    before = state(quantized)
    with pytest.raises((ValueError, RuntimeError), match=r"(?s)an integer is outside.*in embedding"):
        ocs.pack(quantized)
    assert_unchanged(quantized, before)


@pytest.mark.parametrize("at", [1, 5, 9])
@pytest.mark.parametrize("call", [ocs.pack, ocs.unpack])
def test_an_error_in_the_middle(
    quantized: Everything, packed: nn.Module, call: Callable, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = quantized if call is ocs.pack else packed, 0
    step = "of" if call is ocs.pack else "integers"
    whole = getattr(PackedWeight, step)

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise MemoryError
        return whole(*args)

    before = state(model)
    monkeypatch.setattr(PackedWeight, step, staticmethod(failing) if call is ocs.pack else failing)
    with pytest.raises(MemoryError):
        call(model)
    monkeypatch.undo()
    assert_unchanged(model, before)


def test_a_forward_of_its_own_would_be_lost() -> None:
    model, x = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 8)), torch.randn(3, 40)
    ocs.quantize(model)
    own = model[1].forward
    model[1].forward = lambda x: own(x) + 1
    expected = model(x)
    with pytest.raises(ValueError, match=r"^1: this QuantLinear has a forward of its own, as wrappers give it"):
        ocs.pack(model)
    assert torch.equal(model(x), expected)


def refusals() -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    small = nn.Sequential(nn.Linear(40, 24))
    ocs.quantize(small)
    packed = ocs.pack(copy.deepcopy(small))
    return {
        "pack twice": (lambda: ocs.pack(packed), ValueError, "quantized and not yet packed"),
        "pack floats": (lambda: ocs.pack(nn.Linear(3, 3)), ValueError, "call ocs.quantize or ocs.load first"),
        "pack no module": (lambda: ocs.pack("model"), TypeError, "model is str: use a quantized nn.Module"),
        "pack on meta": (
            lambda: ocs.pack(copy.deepcopy(small).to("meta")),
            ValueError,
            "0: its weight holds no values",
        ),
        "unpack what is not packed": (lambda: ocs.unpack(small), ValueError, "no layer of the model is packed"),
        "unpack no module": (lambda: ocs.unpack(None), TypeError, "model is NoneType"),
        "quantize": (lambda: ocs.quantize(packed), ValueError, "0: already quantized; use a fresh float model"),
        "calibrate": (lambda: ocs.calibrate(packed, [torch.ones(2, 40)]), ValueError, "0: already quantized"),
        "script": (lambda: torch.jit.script(packed[0]), RuntimeError, r"PackedLinear: torch.jit.script cannot take it"),
    }


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("case", refusals())
def test_refusals(case: str) -> None:
    call, error, text = refusals()[case]
    with pytest.raises(error, match=text):
        call()


# --- Memory -----------------------------------------------------------------------------------------------------------


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


@pytest.mark.parametrize("r", [0, 0.02])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("size", [650, 1280])
def test_k_bits_take_k_bits(size: int, bits: int, r: float) -> None:
    model = nn.Sequential(nn.Linear(size, size, bias=False))
    ocs.quantize(model, wbits=bits, r=r)
    ocs.pack(model)
    assert sum(t.numel() * t.element_size() for t in tensors_of(model)) <= 1.08 * size * size * bits / 8


def test_a_recurrent_layer_takes_no_more() -> None:
    model = nn.Sequential(nn.LSTM(650, 650, bias=False))
    ocs.quantize(model, wbits=4, r=0.02)
    ocs.pack(model)
    assert sum(t.numel() * t.element_size() for t in tensors_of(model)) <= 1.08 * 2 * 4 * 650 * 650 * 4 / 8


# --- Files ------------------------------------------------------------------------------------------------------------


def content(path: Path) -> tuple[Any, bytes]:
    """A file's header, whose two entries come in any order, and all of its tensors' bytes."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def test_its_file_is_that_of_the_quantized_model(quantized: Everything, packed: nn.Module, tmp_path: Path) -> None:
    ocs.save(quantized, tmp_path / "quantized")
    ocs.save(packed, tmp_path / "packed")
    assert content(tmp_path / "quantized") == content(tmp_path / "packed")
    loaded = ocs.load(tmp_path / "packed", everything())
    assert_same_model(loaded, quantized)
    again = ocs.load(tmp_path / "packed", everything(), packed=True)
    assert_same_model(again, packed)
    ocs.save(again, tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "packed")


class FloatsMade(TorchDispatchMode):
    """Note the largest tensor of floats with values that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, Tensor) and each.is_floating_point() and not each.is_meta:
                self.largest = max(self.largest, each.numel())
        return result


class Language(nn.Module):
    """A small language model, its weights far larger than all else."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.decoder = nn.Embedding(90, 64), nn.LSTM(64, 64), nn.Linear(64, 90)
        self.attention = nn.MultiheadAttention(64, 4)
        self.decoder.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        x, _ = self.lstm(self.embedding(words))
        return self.decoder(self.attention(x, x, x, need_weights=False)[0])


def language() -> tuple[Language, Tensor]:
    torch.manual_seed(0)
    model = Language().eval()
    ocs.quantize(model, wbits=4, r=0.02, embeddings=True)
    return model, torch.randint(0, 90, (3, 2))


def test_no_float_weight_is_made_on_the_way(tmp_path: Path) -> None:
    """Neither by loading onto the meta device, nor by calls."""
    model, words = language()
    ocs.save(model, tmp_path / "model")
    with torch.device("meta"):
        empty = Language().eval()
    empty.decoder.weight = empty.embedding.weight
    with FloatsMade() as made, torch.no_grad():
        ocs.load(tmp_path / "model", empty, packed=True)
        found = empty(words)
    assert 0 < made.largest < 64 * 64
    torch.testing.assert_close(found, model(words), rtol=1e-5, atol=1e-5)
    assert not any(tensor.is_meta for tensor in tensors_of(empty))
    with FloatsMade() as made:
        _ = empty.decoder.weight
    assert made.largest == 64 * 90


def test_loads_in_the_dtype_of_the_model(tmp_path: Path) -> None:
    model, words = language()
    ocs.save(model, tmp_path / "model")
    other = Language().eval().bfloat16()
    ocs.load(tmp_path / "model", other, packed=True)
    assert other(words).dtype == other.decoder.weight.dtype == torch.bfloat16
    assert torch.equal(other.float().decoder.weight, model.decoder.weight)


def test_torch_save(packed: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    assert_same_model(torch.load(file, weights_only=False), packed)


# --- What runs it -----------------------------------------------------------------------------------------------------


def test_compile_of_a_dynamic_batch() -> None:
    model, _ = language()
    ocs.pack(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (2, 3, 5):
            words = torch.randint(0, 90, (3, batch))
            torch.testing.assert_close(compiled(words), model(words))


def test_export_runs_what_is_packed(tmp_path: Path) -> None:
    """With a dynamic batch, through a file; the program holds no float weight."""
    model, words = language()
    ocs.pack(model)
    program = torch.export.export(model, (words,), dynamic_shapes=({1: torch.export.Dim("batch", min=2)},))
    assert {str(node.target) for node in program.graph.nodes} >= {"ocs.product.default", "ocs.recurrent.default"}
    assert all(t.numel() < 64 * 64 for t in program.state_dict.values() if t.is_floating_point())
    torch.export.save(program, tmp_path / "model.pt2")
    words = torch.randint(0, 90, (3, 5))
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(words), model(words))


def test_engines_take_it(quantized: Everything, packed: nn.Module) -> None:
    """As they take the quantized model."""
    x = torch.randn(2, 3, 8, 8)
    expected = packed.net(x)
    torch.testing.assert_close(ocs.lower(copy.deepcopy(packed)).net(x), expected)
    torch.testing.assert_close(ocs.compile(packed.net, x, engine="inductor")(x), expected, rtol=1e-4, atol=1e-4)
    (*_, head) = ocs.compare(quantized.net, packed.net, [x]).layers
    assert head.sqnr_db > 90


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:DeprecationWarning")
def test_jit_trace() -> None:
    model, x = SmallNet().eval(), torch.randn(2, 3, 8, 8)
    ocs.quantize(model, wbits=4, r=0.1)
    ocs.pack(model)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(torch.cat([x, x])), model(torch.cat([x, x])))


def test_threads_at_once(packed: nn.Module) -> None:
    expected, found = outputs(packed), []
    torch.manual_seed(1)
    inputs = Everything.inputs()

    def run() -> None:
        with torch.no_grad():
            found.append(packed(*inputs))

    workers = [threading.Thread(target=run) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    for each in found:
        assert_close(each, expected, 0)


def test_any_number_of_threads(packed: nn.Module, threads: int) -> None:
    found = outputs(packed)
    torch.set_num_threads(1)
    assert_close(outputs(packed)[2:], found[2:], 0)  # convolutions are torch's


# --- What users do with it --------------------------------------------------------------------------------------------


def test_adapters_train_around_it() -> None:
    """As peft's: the packed layer is frozen inside, and gradients pass it."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base
            self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 8)), torch.randn(6, 40)
    ocs.quantize(model)
    grads = []
    for each in (model, ocs.pack(copy.deepcopy(model))):
        torch.manual_seed(1)
        adapted = nn.Sequential(Adapted(each[0]), nn.ReLU(), Adapted(each[2])).train()
        checkpoint(adapted, x, use_reentrant=False).square().sum().backward()
        grads.append([p.grad for p in adapted.parameters()])
    assert_close(grads[1], grads[0], 1e-4)


def test_functional_call_and_shared_memory(packed: nn.Module) -> None:
    torch.manual_seed(1)
    inputs, expected = Everything.inputs(), outputs(packed)
    with torch.no_grad():
        assert_close(torch.func.functional_call(packed, dict(packed.named_buffers()), inputs), expected, 0)
        shifted = torch.func.functional_call(packed, {"decoder.bias": packed.decoder.bias + 1}, inputs)
    torch.testing.assert_close(shifted[4], expected[4] + 1)
    assert packed.share_memory().lstm.weight_hh_l0_packed.is_shared()
    assert_close(outputs(packed), expected, 0)


def test_under_another_default_dtype(quantized: Everything) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = ocs.unpack(ocs.pack(copy.deepcopy(quantized)))
        ocs.pack(quantized)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(outputs(quantized), outputs(model))
    assert model.net.head.scale.dtype == quantized.net.head.scale.dtype == torch.float32


def test_casts_keep_what_is_packed(packed: nn.Module) -> None:
    """Weights are read in the new dtype, and nothing is lost on the way back."""
    head, weight, expected = packed.net.head, packed.net.head.weight + 0, outputs(packed)
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda model: model.to(torch.float16)):
        cast(packed.net)
        assert head.weight.dtype == head.bias.dtype
        assert head.scale.dtype == torch.float32
        assert torch.equal(head.weight, weight.to(head.weight.dtype))
    assert torch.equal(packed.net.float().head.weight, weight)
    assert_close(outputs(packed), expected, 0.05)  # biases were rounded
