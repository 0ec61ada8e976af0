"""Quantized layers, which ocs.quantize puts in the place of float ones."""

from ocs.nn.attention import QuantMultiheadAttention
from ocs.nn.base import QuantizedLayer
from ocs.nn.convolution import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
)
from ocs.nn.own_forward import QuantOwnForward
from ocs.nn.product import QuantLinear
from ocs.nn.recurrent import QuantGRU, QuantGRUCell, QuantLSTM, QuantLSTMCell, QuantRNN, QuantRNNCell

__all__ = [
    "QuantConv1d", "QuantConv2d", "QuantConv3d", "QuantConvTranspose1d", "QuantConvTranspose2d",
    "QuantConvTranspose3d", "QuantGRU", "QuantGRUCell", "QuantLSTM", "QuantLSTMCell", "QuantLinear",
    "QuantMultiheadAttention", "QuantOwnForward", "QuantRNN", "QuantRNNCell", "QuantizedLayer",
]  # fmt: skip
