"""What it takes to choose: thresholds with gptq, and the bits and splits of each layer, on an encoder.

    python benchmarks/choosing.py [--json]

22 million random weights, half of them embeddings, which stay float: six transformer layers of 384 units, as in
all-MiniLM-L6-v2, with eight outlier channels each. Choosing takes turns with what does not choose: no clipping, four
bits for all. Calibration, of 1,024 words, is not counted.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from bench import Row, at_most, in_turns, publish
from torch import Tensor, nn

import ocs

WORDS, WIDTH, HEADS, LAYERS, OUTLIERS = 30522, 384, 12, 6, 8
SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {"wbits": 4, "granularity": "channel", "rounding": "gptq"},
    "gptq, clip=auto": {"wbits": 4, "granularity": "channel", "rounding": "gptq", "clip": "auto"},
    "recipe best": {"wbits": 4, "recipe": "best"},
    "recipe best, wbits=auto": {"wbits": "auto", "recipe": "best"},
    "paper": {"wbits": 4},
    "paper, wbits=auto": {"wbits": "auto"},
}
LIMITS = {
    "gptq, clip=auto": ("gptq", 4),
    "recipe best, wbits=auto": ("recipe best", 15),
    "paper, wbits=auto": ("paper", 15),
}


class Layer(nn.Module):
    """A transformer layer of BERT's kind."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, T, WIDTH] -> the same shape."""
        q, k, v = (each(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for each in (self.query, self.key, self.value))
        x = self.norms[0](x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return self.norms[1](x + self.down(F.gelu(self.up(x))))


def encoder() -> nn.Module:
    """The encoder, with weights of outlier channels, the same each time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH), *(Layer() for _ in range(LAYERS))).eval()
    with torch.no_grad():
        for linear in (each for each in model.modules() if isinstance(each, nn.Linear)):
            linear.weight[:, torch.randperm(linear.in_features)[:OUTLIERS]] *= 6
    return model


def main() -> None:
    """Run all and publish."""
    model = encoder()
    seen = ocs.calibrate(model, [torch.randint(WORDS, (32, 32))], moments=True, progress=False)
    budget = ocs.quantize(copy.deepcopy(model), wbits=4, r=0.05, granularity="channel", progress=False).packed_bytes

    def run(options: dict[str, Any]) -> None:
        given = {"calibration": seen} if "rounding" in options else {}
        given |= {"budget": budget} if options["wbits"] == "auto" else {}
        ocs.quantize(copy.deepcopy(model), r=0.05, explain=False, progress=False, **options, **given)

    calls = {name: lambda options=options: run(options) for name, options in SETTINGS.items()}
    times = in_turns(calls, 3, "choosing")
    rows: list[Row] = [at_most(f"encoder, {name}", times, name, *limit) for name, limit in LIMITS.items()]
    publish("choosing", rows)


if __name__ == "__main__":
    main()
