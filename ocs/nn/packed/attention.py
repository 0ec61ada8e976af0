"""nn.MultiheadAttention whose projections are multiplied as they are packed."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ocs.nn.packed.layer import PackedLayer
from ocs.nn.packed.weight import PackedWeight
from ocs.nn.read_only import ReadOnlyWeight, unfused


class PackedAttention(PackedLayer):
    """nn.MultiheadAttention: packed projections, then torch's function of attention."""

    _qkv_same_embed_dim = property(lambda self: False)  # torch's fused encoder layers would read float weights

    def __getattr__(self, name: str) -> Any:
        """Give in_proj_weight and the like, whose mere sight keeps torch's fused layers from nested tensors."""
        value = super().__getattr__(name)
        return unfused(value) if isinstance(value, ReadOnlyWeight) else value

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to [L, N, E], or [N, L, E] where batch_first, or [L, E]: (output, weights or None)."""
        self._check_inputs(query, key, value)
        if is_causal and attn_mask is None:
            raise RuntimeError(f"{type(self).__name__}: is_causal needs the attn_mask that it is a hint of")
        batched, first = query.dim() == 3, self.batch_first
        q, k, v = (_in_batch(x, batched, first) for x in self._projected(query, key, value))
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        k, v, mask = self._extended(k, v, mask)
        output, weights = self._attended(*(_in_heads(x, self.num_heads) for x in (q, k, v)), mask, need_weights)
        output = self._projected_out(output.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if first else output.transpose(0, 1), weights

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Refuse what is not of the sizes that the projections take."""
        each = (query, key, value)
        if any(x.is_nested for x in each):
            raise RuntimeError("packed attention takes no nested tensor: pad it, torch.nested.to_padded_tensor")
        widths = (self.embed_dim, self.kdim, self.vdim)
        batched, batch = query.dim() == 3, 0 if self.batch_first else 1
        problem = ""
        if query.dim() not in (2, 3) or {x.dim() for x in each} != {query.dim()}:
            problem = "three inputs of 2 or of 3 dimensions"
        elif tuple(x.shape[-1] for x in each) != widths:
            problem = f"{widths} input channels"
        elif key.shape[:-1] != value.shape[:-1] or (batched and query.shape[batch] != key.shape[batch]):
            problem = "one batch, key and value of one length"
        if problem:
            raise RuntimeError(f"{type(self).__name__}: expected {problem}, not {[list(x.shape) for x in each]}")

    # --- Projections

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Project query, key and value; where they are one tensor, in one product."""
        if "in_proj_weight" not in self.channels:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            each = zip(names, (query, key, value), biases, strict=True)
            return [self._packed_product(self.packed_weight(name), x, bias) for name, x, bias in each]
        weight, bias, E = self.packed_weight("in_proj_weight"), self.in_proj_bias, self.embed_dim
        if query is key and key is value:
            return list(self._packed_product(weight, query, bias).chunk(3, -1))
        projected = []
        for i, x in enumerate((query, key, value)):
            rows = slice(i * E, (i + 1) * E)
            part = weight.part(rows.start, rows.stop)
            if part is None:  # it shares tiles with the others
                projected.append(self._packed_product(weight, x, bias)[..., rows])
            else:
                projected.append(self._packed_product(part, x, None if bias is None else bias[rows]))
        return projected

    def _packed_product(self, weight: PackedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.asks_for_gradient(x):
            return F.linear(self.round_input(x), weight.folded().to(x.dtype), bias)
        grid = self.row_grid()
        return weight.multiply(x, bias, grid) if grid is not None else weight.multiply(self.round_input(x), bias)

    def _projected_out(self, x: Tensor) -> Tensor:
        """Multiply by the output projection, as torch does: without a call of that layer."""
        layer = self.out_proj
        if isinstance(layer, PackedLayer) and not layer.asks_for_gradient(x):
            return layer.packed_weight("weight").multiply(x, layer.bias)
        return F.linear(x, layer.weight, layer.bias)

    # --- Attention

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Join both masks into one of floats that is added, [N, heads or 1, L or 1, S]."""
        N, L, S = q.shape[0], q.shape[1], k.shape[1]
        if mask is not None:
            shapes = {(L, S): (1, 1, L, S), (N * self.num_heads, L, S): (N, self.num_heads, L, S)}
            if tuple(mask.shape) not in shapes:
                raise RuntimeError(f"{type(self).__name__}: attn_mask is {list(mask.shape)}, not one of {list(shapes)}")
            mask = _added(mask, q.dtype).reshape(shapes[tuple(mask.shape)])
        if padding is not None:
            padding = padding if padding.dim() == 2 else padding[None]
            if tuple(padding.shape) != (N, S):
                raise RuntimeError(f"{type(self).__name__}: key_padding_mask is {list(padding.shape)}, not {[N, S]}")
            padding = _added(padding, q.dtype)[:, None, None]
            mask = padding if mask is None else mask + padding
        return mask

    def _extended(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append what the layer attends to besides: a learned key and value, zeros."""
        more = 0
        if self.bias_k is not None:
            k, v = (torch.cat([x, b.expand(x.shape[0], 1, -1)], 1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
            more += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            more += 1
        return k, v, mask if mask is None else F.pad(mask, (0, more))

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout), None
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        return weights @ v, weights


def _in_batch(x: Tensor, batched: bool, batch_first: bool) -> Tensor:
    """Give a projection as [N, L, E]."""
    if not batched:
        return x.unsqueeze(0)
    return x if batch_first else x.transpose(0, 1)


def _in_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Make of a mask, True where nothing is seen, one that is added to scores."""
    if mask.is_floating_point():
        return mask.to(dtype)
    if mask.dtype != torch.bool:
        raise RuntimeError(f"PackedMultiheadAttention: a mask must be of bool or floats, not {mask.dtype}")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
