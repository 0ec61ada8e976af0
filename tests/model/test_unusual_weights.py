"""Layers whose weights are not plain tensors, or belong to others: left float, and the report says why."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ocs


class Lora(nn.Module):
    """An adapter as peft makes them, around the layer that it replaces."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 6, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output and the adapter's."""
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))

    def merge(self) -> None:
        """Add the adapter to the base layer."""
        self.base_layer.weight.data += self.lora_B["default"].weight @ self.lora_A["default"].weight


def test_an_adapter_and_its_base_layer_stay_float_until_merged() -> None:
    net, x = nn.Sequential(Lora(nn.Linear(6, 6)), nn.Linear(6, 6)), torch.randn(3, 6)
    before = net[0](x)
    report = ocs.quantize(net)
    reasons = {line.name: line.reason for line in report.layers if line.status == "float"}
    assert set(reasons) == {"0.base_layer", "0.lora_A.default", "0.lora_B.default"}
    assert all("part of an adapter" in reason and "Lora" in reason for reason in reasons.values())
    net[0].merge()
    torch.testing.assert_close(net[0].base_layer(x), before)
