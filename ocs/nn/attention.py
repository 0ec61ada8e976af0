"""nn.MultiheadAttention with quantized input projections."""

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
    kept_attributes = ("_qkv_same_embed_dim",)
    kept_children = ("out_proj",)
    only_folded = "its forward reads its weights itself"
    input_names = ("query", "key", "value")

    @staticmethod
    def weight_names(float_layer: nn.Module) -> tuple[str, ...]:
        """Name one weight for all three projections, or one each where their inputs differ in size."""
        if float_layer._qkv_same_embed_dim:
            return ("in_proj_weight",)
        return ("q_proj_weight", "k_proj_weight", "v_proj_weight")

    def __getattr__(self, name: str) -> Any:
        """Give in_proj_weight and the like to whoever reads them, torch's forward too."""
        if name in self.__dict__.get("channels", ()):
            return self.float_weight(name)
        return super().__getattr__(name)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attend to inputs that are rounded where they are to be; torch's fast paths need what is one tensor as one."""
        of_query = self.round_input(query)
        of_key = of_query if key is query else self.round_input(key)
        if value is query:
            return super().forward(of_query, of_key, of_query, *args, **kwargs)
        of_value = of_key if value is key else self.round_input(value)
        return super().forward(of_query, of_key, of_value, *args, **kwargs)

    @staticmethod
    def unquantized_names(float_layer: nn.Module) -> tuple[str, ...]:
        """Name the bias, the weights that it does without (None), and the additional key and value."""
        weights = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        names = (*weights, "in_proj_bias", "bias_k", "bias_v")
        return tuple(name for name in names if name not in QuantMultiheadAttention.weight_names(float_layer))
