"""A quantized layer's weight is read as any tensor is, and no write is lost: each is one clear error."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import ocs

REFUSED = "cannot be written: change the float model"
LAYERS = {
    "folded": (nn.Linear(6, 4), "weight", {"expand": False}),
    "expanded": (nn.Linear(6, 4), "weight", {}),
    "convolution": (nn.Conv2d(6, 4, 3), "weight", {"granularity": "channel"}),
    "recurrent": (nn.LSTM(6, 4), "weight_hh_l0", {}),
    "embedding": (nn.Embedding(6, 4), "weight", {"embeddings": True}),
    "attention": (nn.MultiheadAttention(6, 2), "in_proj_weight", {}),
}
WRITES: dict[str, Callable[[Tensor], object]] = {
    "data +=": lambda w: w.data.add_(1),
    "data =": lambda w: setattr(w, "data", torch.zeros_like(w)),
    "data.copy_": lambda w: w.data.copy_(torch.zeros(w.shape)),
    "item": lambda w: w.__setitem__(0, 1),
    "a view": lambda w: w.detach().view(-1)[1:].mul_(2),
    "a row of several": lambda w: w.unbind()[0].zero_(),
    "out=": lambda w: torch.add(torch.ones(w.shape), 1, out=w),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "init": nn.init.xavier_uniform_,
    "inplace=True": lambda w: F.relu(w, inplace=True),
    "set_": lambda w: w.set_(torch.ones(2)),
    "resize_": lambda w: w.resize_(2),
    "requires_grad_": lambda w: w.requires_grad_(),
    "requires_grad =": lambda w: setattr(w, "requires_grad", True),
}


def quantized(name: str) -> tuple[nn.Module, str]:
    """The layer, and the name of a weight of it."""
    layer, weight, options = LAYERS[name]
    net = nn.Sequential(copy.deepcopy(layer))
    ocs.quantize(net, wbits=4, r=0.2, skip=None, **options)
    return net[0], weight


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", LAYERS)
def test_writes_are_refused(name: str, write: str) -> None:
    layer, weight = quantized(name)
    before = copy.deepcopy(getattr(layer, weight))
    with pytest.raises(RuntimeError, match=f"{type(layer).__name__}: its {weight} .*{REFUSED}"), torch.no_grad():
        WRITES[write](getattr(layer, weight))
    assert torch.equal(getattr(layer, weight), before)


def test_augmented_assignment() -> None:
    """Python takes a TypeError of += for an operand that does not know the operation, and goes on."""
    layer, _ = quantized("expanded")
    with pytest.raises(RuntimeError, match=REFUSED):
        layer.weight.data += 1
    w = layer.weight
    with pytest.raises(RuntimeError, match=REFUSED):
        w *= 2


@pytest.mark.parametrize("name", LAYERS)
def test_another_weight_is_refused(name: str) -> None:
    layer, weight = quantized(name)
    before = copy.deepcopy(getattr(layer, weight))
    with pytest.raises(RuntimeError, match=REFUSED):
        setattr(layer, weight, nn.Parameter(before.clone()))
    with pytest.raises(RuntimeError, match=REFUSED):
        setattr(layer, weight, before.clone())
    with pytest.raises(RuntimeError, match=REFUSED):
        delattr(layer, weight)
    with pytest.raises(RuntimeError, match=REFUSED):
        layer.register_parameter(weight, nn.Parameter(before.clone()))
    with pytest.raises(RuntimeError, match=REFUSED):
        layer.register_buffer(weight, before.clone())
    assert torch.equal(getattr(layer, weight), before)


READS: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda w: w * 2 + 1,
    "transposed": lambda w: w.T,
    "a copy": lambda w: w.clone().add_(1),
    "into another": lambda w: torch.zeros(w.shape).add_(w),
    "float64": lambda w: w.double().sum(),
    "numbers": lambda w: w.tolist(),
    "shown": repr,
    "numpy": lambda w: w.numpy().sum(),
    "asarray": lambda w: np.asarray(w, dtype=np.float64).sum(),
    "deepcopy": lambda w: copy.deepcopy(w).add_(1),
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "parameter": lambda w: nn.Parameter(w.clone(), requires_grad=True),
    "vmap": lambda w: torch.vmap(lambda x: F.linear(x, w))(torch.ones(2, 6)),
    "jvp": lambda w: torch.func.jvp(lambda x: x @ w.T, (torch.ones(6),), (torch.ones(6),)),
    "frozen": lambda w: w.requires_grad_(False).requires_grad,
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("read", READS)
def test_reads_are_those_of_a_tensor(read: str) -> None:
    layer, _ = quantized("folded")
    for inference in (False, True):
        with torch.inference_mode(inference):
            ours, plain = READS[read](layer.weight), READS[read](layer.original)
        assert repr(ours) == repr(plain)
    with pytest.raises(ValueError, match="read-only"):
        layer.weight.numpy()[0] = 1


def test_gradients_go_through() -> None:
    layer, _ = quantized("expanded")
    x = torch.randn(3, 6, requires_grad=True)
    F.linear(x, layer.weight).sum().backward()
    torch.testing.assert_close(x.grad, torch.as_tensor(layer.weight).sum(0).expand(3, 6))


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("travel", ["eager", "compile", "export", "trace", "fx"])
def test_a_parent_that_reads_the_weight(travel: str) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.linear.weight, self.linear.bias)

    net, x = Reader(), torch.randn(2, 6)
    ocs.quantize(net, wbits=4, r=0.2)
    expected = net.linear(x)
    run = {
        "eager": lambda: net,
        "compile": lambda: torch.compile(net, backend="aot_eager", fullgraph=True),
        "export": lambda: torch.export.export(net, (x,)).module(),
        "trace": lambda: torch.jit.trace(net, (x,)),
        "fx": lambda: torch.fx.symbolic_trace(net),
    }[travel]()
    torch.testing.assert_close(run(x), expected)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_the_fast_path_of_transformers_still_runs() -> None:
    """It takes no tensors that intercept torch functions."""
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    ocs.quantize(net)
    x = torch.randn(2, 3, 8)
    expected = net(x).detach()  # with gradients: the slow path
    with torch.inference_mode(), torch.profiler.profile() as profile:
        fast = net(x)
    assert "aten::_transformer_encoder_layer_fwd" in {event.name for event in profile.events()}
    torch.testing.assert_close(fast, expected)


def test_under_a_dispatch_mode() -> None:
    """Modes see plain tensors."""
    layer, _ = quantized("folded")
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert F.linear(torch.ones(2, 6), layer.weight).shape == (2, 4)
    with FlopCounterMode(display=False) as counter:
        F.linear(torch.ones(2, 6), layer.weight)
    assert counter.get_total_flops() == 2 * 2 * 6 * 4
