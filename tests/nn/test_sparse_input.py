"""Sparse inputs, and those in MKL-DNN's layout: taken as the float layer takes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ocs

KINDS = {
    "COO": Tensor.to_sparse,
    "CSR": Tensor.to_sparse_csr,
    "CSC": Tensor.to_sparse_csc,
    "BSR": lambda x: x.to_sparse_bsr((2, 2)),
    "MKL-DNN": Tensor.to_mkldnn,
}
QUANTIZED = {
    "folded": {"expand": False},
    "expanded": {"r": 0.3},
    "inputs": {"r": 0.3, "abits": 4, "act_r": 0.3},
    "oracle": {"abits": 4, "act_r": 0.3, "act_split": "oracle"},
    "rows": {"r": 0.3, "abits": 4, "act_scale": "dynamic"},
}


def quantized(layer: nn.Module, x: Tensor, how: str) -> nn.Module:
    net, options = nn.Sequential(layer), dict(QUANTIZED[how])
    if how == "inputs":
        options["calibration"] = lambda model: model(x)
    ocs.quantize(net, wbits=4, skip=None, **options)
    return net


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", QUANTIZED)
@pytest.mark.parametrize("kind", KINDS)
def test_linear(kind: str, how: str, bias: bool) -> None:
    x = torch.randn(4, 6).relu()
    net = quantized(nn.Linear(6, 4, bias=bias), x, how)
    found = net(KINDS[kind](x))
    torch.testing.assert_close(found if found.layout == torch.strided else found.to_dense(), net(x))


@pytest.mark.parametrize("how", ["folded", "expanded"])
def test_cells_and_convolutions(how: str) -> None:
    x, image = torch.randn(3, 6), torch.randn(2, 6, 4, 4)
    net = quantized(nn.GRUCell(6, 4), x, how)
    torch.testing.assert_close(net(x.to_sparse()), net(x))
    net = quantized(nn.Conv2d(6, 4, 3), image, how)
    found = net(image.to_mkldnn())
    torch.testing.assert_close(found if found.layout == torch.strided else found.to_dense(), net(image))


def test_what_the_float_layer_refuses() -> None:
    x = torch.randn(4, 6)
    for how in ("folded", "expanded"):
        with pytest.raises(RuntimeError, match="addmm"):
            quantized(nn.Linear(6, 4), x, how)(torch.randn(4, 5).to_sparse())
