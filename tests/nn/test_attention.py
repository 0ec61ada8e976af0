"""Attention: torch's own forward on the folded weights, with every mask, option and fast path."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import folded_twin, outlier_weight
from torch import Tensor, nn

import ocs
from ocs.nn import QuantLinear, QuantMultiheadAttention

E, HEADS = 12, 4
CONSTRUCTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "additional key and value": {"add_bias_kv": True, "add_zero_attn": True},
    "other key and value sizes": {"kdim": 8, "vdim": 10},
}


def heavy(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            if p.dim() == 2:
                p.copy_(torch.from_numpy(outlier_weight(tuple(p.shape), seed=i)) * 0.2)
            else:
                nn.init.normal_(p)
    return module


def quantized(model: nn.Module, **options: Any) -> nn.Module:
    ours = copy.deepcopy(model)
    ocs.quantize(ours, wbits=5, r=0.2, **options)
    return ours


def assert_equal(a: Any, b: Any) -> None:
    for ours, theirs in zip(a if isinstance(a, tuple) else (a,), b if isinstance(b, tuple) else (b,), strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_equals_torchs_attention_on_the_folded_weights(name: str) -> None:
    torch.manual_seed(0)
    options = CONSTRUCTIONS[name]
    model = heavy(nn.ModuleList([nn.MultiheadAttention(E, HEADS, **options)])).eval()
    ours = quantized(model)
    twin = folded_twin(model, ours)
    assert isinstance(ours[0], QuantMultiheadAttention)
    assert isinstance(ours[0].out_proj, QuantLinear)
    assert not torch.equal(twin[0].out_proj.weight, model[0].out_proj.weight)
    query, key, value = (torch.randn(4, 4, options.get(size, E)) for size in ("", "kdim", "vdim"))
    causal = nn.Transformer.generate_square_subsequent_mask(4).isinf()
    padding = torch.tensor([[False] * 4, [False] * 4, [False] * 4, [False, False, True, True]])
    masks = [{}, {"attn_mask": causal}, {"key_padding_mask": padding}, {"attn_mask": causal, "is_causal": True}]
    for call in [{**mask, "need_weights": weights} for mask in masks for weights in (True, False)]:
        for grad in (True, False):  # torch takes its fast path without
            with torch.set_grad_enabled(grad):
                assert_equal(ours[0](query, key, value, **call), twin[0](query, key, value, **call))
    unbatched = (query[0], key[0], value[0])
    assert_equal(ours[0](*unbatched), twin[0](*unbatched))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder(norm_first: bool, padded: bool) -> None:
    """Its fast path reads the children's weights, and packs padded batches into nested tensors."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, HEADS, 24, batch_first=True, norm_first=norm_first)
    model = heavy(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)).eval()
    ours = quantized(model)
    twin = folded_twin(model, ours)
    x = torch.randn(2, 5, E)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    with torch.inference_mode():
        assert_equal(ours(x, src_key_padding_mask=mask), twin(x, src_key_padding_mask=mask))
    torch.testing.assert_close(ours.eval()(x), twin(x))


def test_whole_transformer() -> None:
    torch.manual_seed(0)
    model = heavy(nn.Transformer(E, HEADS, 2, 2, 24, batch_first=True)).eval()
    ours = quantized(model)
    source, target = torch.randn(2, 5, E), torch.randn(2, 4, E)
    torch.testing.assert_close(ours(source, target), folded_twin(model, ours)(source, target))


class Encoder(nn.Module):
    """Attention of plain linear layers, as transformer libraries write it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.dense = (nn.Linear(E, E) for _ in range(4))
        self.intermediate, self.output = nn.Linear(E, 4 * E), nn.Linear(4 * E, E)
        self.norms = nn.ModuleList([nn.LayerNorm(E), nn.LayerNorm(E)])

    def forward(self, x: Tensor) -> Tensor:
        """x [N, L, E] -> [N, L, E]."""
        heads = [part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)]
        attended = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = self.norms[0](x + self.dense(attended))
        return self.norms[1](x + self.output(nn.functional.gelu(self.intermediate(x))))


def test_encoder_of_linear_layers_is_quantized_and_expanded() -> None:
    torch.manual_seed(0)
    model = heavy(nn.Sequential(Encoder(), Encoder())).eval()
    ours, x = copy.deepcopy(model), torch.randn(2, 5, E)
    report = ocs.quantize(ours, wbits=8, r=0.1)
    assert [layer.status for layer in report.layers] == ["quantized"] * 12
    assert all(layer.expand and layer.splits for layer in ours.modules() if isinstance(layer, QuantLinear))
    torch.testing.assert_close(ours(x), model(x), rtol=0, atol=0.1)
    torch.testing.assert_close(ours(x), folded_twin(model, ours)(x))


def test_state_dict_and_copies() -> None:
    model = heavy(nn.ModuleList([nn.MultiheadAttention(E, HEADS, kdim=8, vdim=10)])).eval()
    ours, other = quantized(model), quantized(heavy(nn.ModuleList([nn.MultiheadAttention(E, HEADS, kdim=8, vdim=10)])))
    other.load_state_dict(ours.state_dict())
    x = [torch.randn(4, 2, size) for size in (E, 8, 10)]
    assert {"0.q_proj_weight_int", "0.q_proj_scale", "0.q_proj_source", "0.in_proj_bias"} <= set(ours.state_dict())
    assert_equal(other[0](*x), ours[0](*x))
    assert_equal(copy.deepcopy(ours)[0](*x), ours[0](*x))
    assert ours[0].bfloat16().q_proj_weight.dtype == torch.bfloat16


def test_compile_and_export() -> None:
    model = heavy(nn.TransformerEncoderLayer(E, HEADS, 24, batch_first=True)).eval()
    ours, x = quantized(nn.Sequential(model)), torch.randn(2, 5, E)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), ours(x))
    torch.testing.assert_close(torch.export.export(ours, (x,)).module()(x), ours(x))
