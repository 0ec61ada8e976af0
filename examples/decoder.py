"""A small decoder-only transformer of the kind of today's language models, over words.

Blocks of RMSNorm, causal attention with rotary positions (Su et al., arXiv 2104.09864) and a SwiGLU network (Shazeer,
arXiv 2002.05202), all of nn.Linear layers without biases, then a linear layer over the vocabulary. Like the LSTM, it
reads a text window by window and carries a state over: the keys and values of the window before (Dai et al., arXiv
1901.02860).

T words of a window, S words that are seen (T and those of the state), B streams, H heads, D units of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = tuple[Tensor, ...]  # keys and values of each block, [B, H, up to T, D]


def turns(like: Tensor, units: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, units] by which `units` are rotated at each of N positions, `like`: [N, ...]."""
    half = torch.arange(units, device=like.device) % (units // 2)
    positions = torch.ones_like(like[:, :1], dtype=torch.float32).cumsum(0)
    angles = positions * 10_000.0 ** (-2 * half / units)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of units (i, i + D / 2), x [B, H, T, D]."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Block(nn.Module):
    """Attention to the words before, then a gated network of each word; both are added to what comes in."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, past: State | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, B, width] -> the same shape, and keys and values of these words; past: those of the window before."""
        y = self.norm1(x)
        query, key, value = (
            layer(y).unflatten(-1, (self.heads, -1)).permute(1, 2, 0, 3) for layer in (self.query, self.key, self.value)
        )
        keys, values = (key, value) if past is None else (torch.cat((past[0], key), 2), torch.cat((past[1], value), 2))
        cos, sin = turns(keys[0, 0], keys.shape[-1])
        place = torch.ones_like(keys[0, 0, :, :1]).cumsum(0)
        here = -x.shape[0]  # the words of this window are the last
        query, seen = rotated(query, cos[here:], sin[here:]), rotated(keys, cos, sin)
        mask = place.transpose(0, 1) <= place[here:]
        y = F.scaled_dot_product_attention(query, seen, values, attn_mask=mask)
        x = x + self.output(y.permute(2, 0, 1, 3).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y)), key, value


class Decoder(nn.Module):
    """Next-word logits from words; `tied`: the last layer's weight is the embedding's (and then stays float)."""

    steps = 64  # words of a window

    def __init__(
        self, words: int, *, width: int = 200, heads: int = 5, layers: int = 3, inner: int = 288, tied: bool = True
    ) -> None:
        super().__init__()
        self.config = {
            "words": words, "width": width, "heads": heads, "layers": layers, "inner": inner, "tied": tied
        }  # fmt: skip
        self.embedding = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width, heads, inner) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.decoder = nn.Linear(width, words)
        if tied:
            self.decoder.weight = self.embedding.weight

    def forward(self, words: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """words int64 [T, B] -> logits [T, B, words] of the words that follow, and the state to go on with."""
        x = self.embedding(words)
        after: State = ()
        for i, block in enumerate(self.blocks):
            x, key, value = block(x, None if state is None else state[2 * i : 2 * i + 2])
            after += (key, value)
        return self.decoder(self.norm(x)), after
