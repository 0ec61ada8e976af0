"""Packed attention: torch's own attention on the dequantized weights, with every mask and option."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import folded_twin
from test_attention import CONSTRUCTIONS, HEADS, E, heavy
from torch import Tensor, nn

import ocs
from ocs.nn.packed.attention import PackedAttention
from ocs.nn.packed.weight import PackedWeight

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def twin_and_packed(model: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The float model with dequantized weights, and the packed model."""
    ours = copy.deepcopy(model)
    ocs.quantize(ours, **{"wbits": 5, "r": 0.2} | options)
    return folded_twin(model, ours), ocs.pack(ours)


def assert_close(ours: Any, theirs: Any) -> None:
    if isinstance(ours, tuple):
        for each in zip(ours, theirs, strict=True):
            assert_close(*each)
    elif ours is not None or theirs is not None:
        torch.testing.assert_close(ours, theirs, **CLOSE)


def masks(length: int, batch: int) -> dict[str, dict[str, Any]]:
    """All masks that attention takes, batch by batch and head by head."""
    causal = nn.Transformer.generate_square_subsequent_mask(length)
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[-1, length // 2 :] = True
    heads = torch.randn(batch * HEADS, length, length)
    return {
        "none": {},
        "of bool": {"attn_mask": causal.isinf()},
        "of floats": {"attn_mask": causal},
        "causal": {"attn_mask": causal, "is_causal": True},
        "of each head": {"attn_mask": heads},
        "padding": {"key_padding_mask": padding},
        "padding of floats": {"key_padding_mask": padding * -2.0},
        "both": {"key_padding_mask": padding, "attn_mask": causal.isinf()},
    }


@pytest.mark.parametrize("width", [12, 48])  # 48 outputs of each projection are whole tiles
@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_equals_torchs_on_the_dequantized_weights(name: str, width: int) -> None:
    torch.manual_seed(0)
    options = CONSTRUCTIONS[name]
    twin, packed = twin_and_packed(heavy(nn.ModuleList([nn.MultiheadAttention(width, HEADS, **options)])).eval())
    twin, packed = twin[0], packed[0]
    assert isinstance(packed, PackedAttention)
    query, key, value = (torch.randn(4, 4, options.get(size, width)) for size in ("", "kdim", "vdim"))
    inputs = [(query, key, value)]
    if "kdim" not in options:
        inputs += [(query, query, query), (query, key, key)]
    for x in inputs:
        for kind, mask in masks(4, 4).items():
            if kind == "causal" and packed.add_zero_attn:
                continue  # torch's then hides the additional keys from all but the last queries
            if kind == "padding of floats":
                mask = mask | {"attn_mask": torch.zeros(4, 4)}  # noqa: PLW2901 - both of one dtype
            for how in ({}, {"need_weights": False}, {"average_attn_weights": False}):
                with torch.no_grad():
                    assert_close(packed(*x, **mask, **how), twin(*x, **mask, **how))
        unbatched = tuple(each[0] for each in x)
        assert_close(packed(*unbatched), twin(*unbatched))
    shorter = query[:, :2] if packed.batch_first else query[:2]
    assert_close(packed(shorter, key, value), twin(shorter, key, value))
    none = [each[:0] if packed.batch_first else each[:, :0] for each in (query, key, value)]
    assert packed(*none)[0].shape == none[0].shape


@pytest.mark.parametrize("training", [False, True])
def test_gradients(training: bool) -> None:
    twin, packed = twin_and_packed(heavy(nn.ModuleList([nn.MultiheadAttention(E, HEADS, add_bias_kv=True)])))
    twin, packed = twin[0].train(training), packed[0].train(training)
    grads = []
    for layer in (packed, twin):
        x = torch.ones(3, 2, E).cumsum(0).requires_grad_()
        layer(x, x, x)[0].square().sum().backward()
        grads.append([x.grad, layer.in_proj_bias.grad, layer.bias_k.grad, layer.out_proj.bias.grad])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"abits": 8}, {"abits": 8, "act_scale": "dynamic"}])
def test_rounded_inputs(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    quantized, x, y = heavy(nn.Sequential(nn.MultiheadAttention(E, HEADS))), torch.randn(5, 2, E), torch.randn(6, 2, E)
    calibration = None if "act_scale" in options else lambda model: model[0](x, x, x)
    ocs.quantize(quantized, wbits=5, r=0.2, calibration=calibration, **options)
    packed = ocs.pack(copy.deepcopy(quantized))
    for inputs in ((x, x, x), (x, y, y), (x, y, y.clone())):
        assert_close(packed[0](*inputs), quantized[0](*inputs))


@pytest.mark.parametrize("skip", ["0", "0.out_proj"])
def test_half_of_it_quantized(skip: str) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(5, 2, E), heavy(nn.Sequential(nn.MultiheadAttention(E, HEADS))).eval()
    ocs.quantize(model, wbits=5, skip=[skip])
    packed = ocs.pack(copy.deepcopy(model))
    assert_close(packed[0](x, x, x), model[0](x, x, x))


def test_dropout_draws_as_torchs() -> None:
    twin, packed = twin_and_packed(heavy(nn.ModuleList([nn.MultiheadAttention(E, HEADS, dropout=0.4)])))
    x, outputs = torch.randn(5, 2, E), []
    for model in (packed.train(), twin.train()):
        torch.manual_seed(3)
        outputs.append(model[0](x, x, x))
    assert_close(*outputs)


@contextmanager
def plain_path() -> Iterator[None]:
    """Keep torch from its fast path."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# --- Inside torch's transformers --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer_encoder(batch_first: bool, norm_first: bool, training: bool) -> None:
    """With masks, and where torch would pack padded batches into nested tensors.

    It is compared with torch's plain path: the fast one is wrong for masks of heads and padding of floats.
    """
    torch.manual_seed(0)
    options = {"batch_first": batch_first, "norm_first": norm_first, "dropout": 0.0}
    twin, packed = twin_and_packed(heavy(nn.TransformerEncoder(nn.TransformerEncoderLayer(E, HEADS, 24, **options), 2)))
    twin, packed = twin.train(training), packed.train(training)
    x = torch.randn(2, 5, E)
    for mask in masks(5, 2).values():
        given = {
            {"attn_mask": "mask", "key_padding_mask": "src_key_padding_mask"}.get(k, k): v for k, v in mask.items()
        }
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                ours = packed(x if batch_first else x.transpose(0, 1), **given)
                with plain_path():
                    theirs = twin(x if batch_first else x.transpose(0, 1), **given)
            assert_close(ours, theirs)


def test_whole_transformer() -> None:
    torch.manual_seed(0)
    twin, packed = twin_and_packed(heavy(nn.Transformer(E, HEADS, 2, 2, 24, batch_first=True)).eval())
    source, target = torch.randn(2, 5, E), torch.randn(2, 4, E)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    assert_close(packed(source, target), twin(source, target))
    given = {"tgt_mask": mask, "tgt_is_causal": True}
    assert_close(packed(source, target, **given), twin(source, target, **given))


def test_decoder_dequantizes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, packed = twin_and_packed(heavy(nn.Transformer(E, HEADS, 1, 1, 24, batch_first=True)).eval())
    monkeypatch.setattr(PackedWeight, "folded", None)
    with torch.no_grad():
        packed(torch.randn(2, 5, E), torch.randn(2, 4, E))


def test_compile_and_export() -> None:
    _, packed = twin_and_packed(heavy(nn.TransformerEncoderLayer(E, HEADS, 24, batch_first=True)).eval())
    x = torch.randn(2, 5, E)
    torch._dynamo.reset()
    with torch.no_grad():
        assert_close(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), packed(x))
        assert_close(torch.export.export(packed, (x,)).module()(x), packed(x))


# --- What it refuses --------------------------------------------------------------------------------------------------

X, Y = torch.randn(5, 2, E), torch.randn(6, 2, E)
WRONG = {
    "query's channels": ((X[..., :11], Y, Y), {}, "expected .* input channels"),
    "value's channels": ((X, Y, torch.randn(6, 2, 13)), {}, "expected .* input channels"),
    "lengths": ((X, Y[:4], Y), {}, "key and value of one length"),
    "batches": ((X, Y[:, :1], Y[:, :1]), {}, "one batch"),
    "dimensions": ((X[:, 0], Y, Y), {}, "three inputs of 2 or of 3 dimensions"),
    "vectors": ((X[0, 0], Y[0, 0], Y[0, 0]), {}, "three inputs of 2 or of 3 dimensions"),
    "integers": ((X, Y, Y), {"attn_mask": torch.zeros(5, 6, dtype=torch.int8)}, "mask must be of bool or floats"),
    "a mask's size": ((X, Y, Y), {"attn_mask": torch.zeros(6, 5)}, r"attn_mask is \[6, 5\]"),
    "a padding's size": ((X, Y, Y), {"key_padding_mask": torch.zeros(2, 5)}, r"key_padding_mask is \[2, 5\]"),
    "a hint alone": ((X, X, X), {"is_causal": True}, "is_causal needs the attn_mask"),
    "nested": ((torch.nested.nested_tensor([X[0]], layout=torch.jagged),) * 3, {}, "takes no nested tensor: pad it"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs(case: str) -> None:
    _, packed = twin_and_packed(heavy(nn.ModuleList([nn.MultiheadAttention(E, HEADS)])).eval())
    inputs, options, error = WRONG[case]
    with pytest.raises(RuntimeError, match=error):
        packed[0](*inputs, **options)


def test_its_weights_are_read_and_not_written() -> None:
    twin, packed = twin_and_packed(heavy(nn.ModuleList([nn.MultiheadAttention(E, HEADS)])).eval())
    weight: Tensor = packed[0].in_proj_weight
    assert torch.equal(weight, twin[0].in_proj_weight)
    assert torch.equal(weight[1:] + 0, twin[0].in_proj_weight[1:])
    assert weight.shape == (3 * E, E)
    for write in (weight.zero_, weight[2].zero_, weight.data.zero_):
        with pytest.raises(RuntimeError, match="its in_proj_weight is made from integers and cannot be written"):
            write()
