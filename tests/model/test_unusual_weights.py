"""Layers whose weights are not plain tensors, or belong to others: left float, and the report says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import distribute_tensor, init_device_mesh
from torch.testing._internal.two_tensor import TwoTensor

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


UNLIKE_PLAIN = {
    "COO": (Tensor.to_sparse, "sparse_coo"),
    "CSR": (Tensor.to_sparse_csr, "sparse_csr"),
    "BSR": (lambda w: w.to_sparse_bsr((2, 2)), "sparse_bsr"),
    "MKL-DNN": (Tensor.to_mkldnn, "torch._mkldnn"),
    "fake": (lambda w: FakeTensorMode().from_tensor(w), "FakeTensor"),
    "functional": (torch._to_functional_tensor, "without memory"),
    "of a class of its own": (lambda w: TwoTensor(w, w), "TwoTensor"),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("options", [{}, {"recipe": "best", "fold_bn": True, "correct_bias": True}])
@pytest.mark.parametrize("case", UNLIKE_PLAIN)
def test_weights_that_are_no_plain_tensors_stay_float(case: str, options: dict[str, object]) -> None:
    convert, reason = UNLIKE_PLAIN[case]
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    weight = nn.Parameter(convert(net[0].weight.detach()), requires_grad=False)
    net[0].weight = weight
    first, second = ocs.quantize(net, **options).layers
    assert (first.status, second.status) == ("float", "quantized")
    assert reason in first.reason
    assert net[0].weight is weight


def test_dtensors_stay_float(tmp_path: Path) -> None:
    """As fully_shard makes them."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        whole = distribute_tensor(net[0].weight.detach(), init_device_mesh("cpu", (1,)))
        net[0].weight = nn.Parameter(whole)
        first, second = ocs.quantize(net).layers
        assert (first.status, second.status) == ("float", "quantized")
        assert "DTensor" in first.reason
    finally:
        dist.destroy_process_group()
