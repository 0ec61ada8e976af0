"""Integer weights of ONNX's own LSTM and GRU.

torch.onnx.export writes their weights as floats, the gates in ONNX's order. Here they become int8 with a scale for each
row, dequantized before the operator; or, for ONNX Runtime, the operator that takes them as they are and quantizes what
it multiplies as it arrives.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

_ORDER = {nn.LSTM: (0, 3, 1, 2), nn.GRU: (1, 0, 2)}  # of ONNX's gates: iofc of torch's ifgo, zrh of rzn
_DYNAMIC = "DynamicQuantizeLSTM"


class RowWeight(NamedTuple):
    """A weight of a recurrent operator."""

    ints: np.ndarray  # int8 [directions, gates H, C]
    scale: np.ndarray  # float32 [directions, gates H]


def weights_of(model: nn.Module) -> dict[bytes, RowWeight]:
    """List the weights of lowered LSTM and GRU layers as ONNX has them, by the bytes of their floats.

    Those that int8 does not hold are left out.
    """
    found = {}
    for module in model.modules():
        scales = vars(module).get("weight_scales")
        if scales is not None and type(module) in _ORDER:
            for floats, scale in _stacked(module, scales):
                ints = (floats / scale[..., None]).round()
                if ints.abs().max() <= 127:
                    found[floats.numpy().tobytes()] = RowWeight(ints.to(torch.int8).numpy(), scale.numpy())
    return found


def _stacked(module: nn.RNNBase, scales: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Give the weights of inputs and of hidden states of each layer, float32 [directions, gates H, C], and scales."""
    for layer in range(module.num_layers):
        directions = ["", "_reverse"] if module.bidirectional else [""]
        for kind in ("ih", "hh"):
            names = [f"weight_{kind}_l{layer}{direction}" for direction in directions]
            weights = [_in_order(module, getattr(module, name).detach().float().cpu()) for name in names]
            rows = [_in_order(module, scales[name].cpu().expand(len(weights[0]))) for name in names]
            yield torch.stack(weights), torch.stack(rows)


def _in_order(module: nn.RNNBase, rows: Tensor) -> Tensor:
    gates = rows.unflatten(0, (-1, module.hidden_size))
    return gates[list(_ORDER[type(module)])].flatten(0, 1)


def hold_integers(onnx: Any, model: Any, weights: Mapping[bytes, RowWeight]) -> None:
    """Let LSTM and GRU read dequantized int8 weights where these are known."""
    nodes, initializers = [], {each.name: each for each in model.graph.initializer}
    for node in model.graph.node:
        for i in (1, 2):
            weight = _known(onnx, initializers, node, i, weights)
            if weight is not None:
                nodes += _dequantized(onnx, model, node.input[i], weight)
                node.input[i] = f"{node.input[i]}.floats"
    for node in reversed(nodes):
        model.graph.node.insert(0, node)


def quantize_dynamically(onnx: Any, model: Any, weights: Mapping[bytes, RowWeight]) -> None:
    """Let ONNX Runtime's DynamicQuantizeLSTM stand for LSTM where both weights are known as integers."""
    initializers = {each.name: each for each in model.graph.initializer}
    for node in model.graph.node:
        known = [_known(onnx, initializers, node, i, weights) for i in (1, 2)]
        if node.op_type != "LSTM" or None in known:
            continue
        given = [*node.input, *[""] * (8 - len(node.input))]
        given[1:3] = [f"{name}.columns" for name in given[1:3]]
        for name, weight in zip(given[1:3], known, strict=True):
            arrays = {
                name: weight.ints.transpose(0, 2, 1),
                f"{name}.scale": weight.scale,
                f"{name}.zero_point": np.zeros(weight.scale.shape, np.int8),
            }
            _add(onnx, model, {key: np.ascontiguousarray(array) for key, array in arrays.items()})
            given += [f"{name}.scale", f"{name}.zero_point"]
        node.input[:] = given
        node.op_type, node.domain = _DYNAMIC, "com.microsoft"
        kept = [each for each in node.attribute if each.name != "layout"]
        del node.attribute[:]
        node.attribute.extend(kept)
    if all(each.domain != "com.microsoft" for each in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


def _known(onnx: Any, initializers: Mapping[str, Any], node: Any, i: int, weights: Mapping[bytes, RowWeight]) -> Any:
    if node.op_type not in ("LSTM", "GRU") or node.input[i] not in initializers:
        return None
    return weights.get(onnx.numpy_helper.to_array(initializers[node.input[i]]).tobytes())


def _dequantized(onnx: Any, model: Any, name: str, weight: RowWeight) -> list[Any]:
    """Hold a weight's integers, the rows of all directions together; gives the nodes that make floats of them."""
    rows = weight.ints.reshape(-1, weight.ints.shape[2])
    shape = np.array(weight.ints.shape, np.int64)
    _add(onnx, model, {f"{name}.ints": rows, f"{name}.scale": weight.scale.ravel(), f"{name}.shape": shape})
    _add(onnx, model, {f"{name}.zero_point": np.zeros(len(rows), np.int8)})
    inputs = [f"{name}.ints", f"{name}.scale", f"{name}.zero_point"]
    return [
        onnx.helper.make_node("DequantizeLinear", inputs, [f"{name}.rows"], axis=0),
        onnx.helper.make_node("Reshape", [f"{name}.rows", f"{name}.shape"], [f"{name}.floats"]),
    ]


def _add(onnx: Any, model: Any, arrays: Mapping[str, np.ndarray]) -> None:
    known = {each.name for each in model.graph.initializer}
    new = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items() if name not in known]
    model.graph.initializer.extend(new)
