"""Quantized embeddings: integers with a scale for each row, of which a lookup dequantizes those that it needs."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocs.nn.base import QuantizedLayer
from ocs.nn.registry import register


def share_tied(layers: Mapping[str, tuple[QuantizedLayer | None, str]]) -> None:
    """Let linear layers hold the very integers of the embeddings that they are tied to; by name, with the name of that.

    A ValueError where the integers differ.
    """
    for layer, tied_to in layers.values():
        embedding, _ = layers.get(tied_to, (None, ""))
        if layer is None or not isinstance(embedding, QuantEmbedding):
            continue
        for name in layer.buffers_of("weight"):
            if not torch.equal(layer._buffers[name], embedding._buffers[name]):
                raise ValueError(f"{name} is not that of {tied_to}, which it is tied to")
            layer._buffers[name] = embedding._buffers[name]


def tied_layers(layers: Mapping[str, QuantizedLayer]) -> dict[str, str]:
    """Map the names of layers that hold the integers of an embedding to its name."""
    held = {name: id(each._buffers.get(each.buffers_of("weight")[0])) for name, each in layers.items()}
    embeddings = {held[name]: name for name, each in layers.items() if isinstance(each, QuantEmbedding)}
    found = {name: embeddings.get(held[name]) for name in layers}
    return {name: embedding for name, embedding in found.items() if embedding not in (None, name)}


class _QuantLookup(QuantizedLayer):
    """A table of rows [num_embeddings, embedding_dim]; it has no copies, and holds no row as floats."""

    opt_in = True

    @staticmethod
    def unquantized_names(float_layer: nn.Module) -> tuple[str, ...]:
        """Name no parameter."""
        return ()

    @classmethod
    def unseen(cls, float_layer: nn.Module) -> str:
        """Say that its input is no vector of floats."""
        return "its rows are looked up"

    @property
    def weight(self) -> Tensor:
        """The float layer's weight as this one has it, to be read; made anew each time."""
        return self.float_weight("weight")

    def whole_weight(self, name: str) -> Tensor:
        """Make that weight."""
        return self.folded(name).to(self.like.dtype)

    def forward_buffer(self, name: str) -> str:
        """Name the buffer that has the dtype of the rows."""
        return "like"

    def rebuild(self) -> None:
        """Keep the dtype of the rows and none of them."""
        self._buffers["like"] = self.weight_int.new_empty(0, dtype=self.like.dtype)

    def rows(self, index: Tensor) -> Tensor:
        """Dequantize the rows [..., embedding_dim] that an index asks for."""
        return (self.weight_int[index] * self.scale[index].unsqueeze(-1)).to(self.like.dtype)


@register
class QuantEmbedding(_QuantLookup):
    """nn.Embedding with a quantized weight: index [...] -> rows [..., embedding_dim]."""

    float_kind = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """Look rows up."""
        return self.rows(input)


@register
class QuantEmbeddingBag(_QuantLookup):
    """nn.EmbeddingBag with a quantized weight."""

    float_kind = nn.EmbeddingBag

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Any = None) -> Tensor:
        """Look rows up and reduce them, bag by bag: a table of just these rows, padding ones in one row more."""
        found = self.rows(input.flatten())
        places, padding = torch.arange(input.numel(), device=input.device), None
        if self.padding_idx is not None:
            padding = input.numel()
            places = torch.where(input.flatten() == self.padding_idx, padding, places)
            found = torch.cat([found, found.new_zeros(1, found.shape[1])])
        return F.embedding_bag(
            places.view_as(input), found, offsets, mode=self.mode, per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset, padding_idx=padding,
        )  # fmt: skip
