"""nn.MultiheadAttention with quantized input projections."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ocs.nn.base import QuantizedLayer
from ocs.nn.registry import register


@register
class QuantMultiheadAttention(QuantizedLayer, nn.MultiheadAttention):
    """nn.MultiheadAttention with quantized input projections; its forward is torch's own, with every mask and option.

    That forward reads in_proj_weight (or q_, k_ and v_proj_weight) and out_proj.weight itself, so they run folded. The
    output projection is a QuantLinear.
    """

    float_kind = nn.MultiheadAttention
    kept = ("_qkv_same_embed_dim",)
    kept_children = ("out_proj",)
    only_folded = "its forward reads its weights itself"
    input_names = ("query", "key", "value")

    @staticmethod
    def weight_names(float_layer: nn.Module) -> tuple[str, ...]:
        """One weight for all three projections, or one each where their inputs differ in size."""
        if float_layer._qkv_same_embed_dim:
            return ("in_proj_weight",)
        return ("q_proj_weight", "k_proj_weight", "v_proj_weight")

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As torch's, on quantized inputs where they are to be; what is one tensor stays one."""
        seen = {id(x): x for x in (query, key, value)}
        on_grid = {name: self.on_grid(x) for name, x in seen.items()}
        return super().forward(*(on_grid[id(x)] for x in (query, key, value)), *args, **kwargs)

    @staticmethod
    def other_names(float_layer: nn.Module) -> tuple[str, ...]:
        """The bias, the weights that it does without (None), and the additional key and value."""
        names = (
            "in_proj_weight",
            "q_proj_weight",
            "k_proj_weight",
            "v_proj_weight",
            "in_proj_bias",
            "bias_k",
            "bias_v",
        )
        return tuple(name for name in names if name not in QuantMultiheadAttention.weight_names(float_layer))
