"""Write the forward of a lowered layer: plain torch operators on int8 weights, as a torch.fx.GraphModule.

Such a module holds its own code: it runs, is pickled and exported without this package. Its grids stand there as pairs
of quantize and dequantize of torch's `quantized_decomposed` operators, the form that PT2E, Inductor, ONNX and others
know products of integers by.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn


def operators() -> Any:
    """Find torch's operators of quantization, which are registered when this is called.

    Raises:
        ImportError: this torch has them no longer.
    """
    _decomposed()
    return torch.ops.quantized_decomposed


def _decomposed() -> Any:
    """Import what registers them."""
    try:
        import torch.ao.quantization.fx._decomposed as registered
    except ImportError as error:
        raise ImportError(f"torch {torch.__version__} has no quantized_decomposed operators: use torch 2.13") from error
    return registered


class Grid(NamedTuple):
    """The 8-bit grid of a tensor: x is about (q - zero_point) scale, low <= q <= high."""

    scale: float
    zero_point: int
    low: int
    high: int
    dtype: torch.dtype  # uint8 or int8


def narrowed(ints: Tensor) -> Tensor:
    """Give integers the narrowest of int8, int16 and int32 that holds them, from -127 on."""
    largest = int(ints.int().abs().amax()) if ints.numel() else 0
    return ints.to(next(dtype for dtype, most in _LARGEST.items() if largest <= most))


_LARGEST = {torch.int8: 127, torch.int16: 2**15 - 1, torch.int32: 2**31 - 1}


class Body:
    """The forward of a module while it is written, node by node.

    Args:
        dtype: of what it computes.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.root, self.graph, self.dtype = nn.Module(), fx.Graph(), dtype
        self.ops = operators()

    def input(self, name: str, *default: Any) -> fx.Node:
        """Add an argument of forward, and its default if it has one."""
        return self.graph.placeholder(name, **({"default_value": default[0]} if default else {}))

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Call a function of torch's, or a method by its name."""
        if isinstance(function, str):
            return self.graph.call_method(function, args, kwargs)
        return self.graph.call_function(function, args, kwargs)

    def tensor(self, name: str, tensor: Tensor | None) -> fx.Node | None:
        """Hold a tensor under a name, and read it."""
        if tensor is None:
            return None
        if isinstance(tensor, nn.Parameter):
            self.root.register_parameter(name, tensor)
        else:
            self.root.register_buffer(name, tensor)
        return self.graph.get_attr(name)

    def module(self, name: str, module: nn.Module, *args: Any, **kwargs: Any) -> fx.Node:
        """Hold a module under a name, and call it."""
        self.root.add_module(name, module)
        return self.graph.call_module(name, args, kwargs)

    def quantize(self, x: fx.Node, grid: Grid) -> fx.Node:
        """Round a tensor to its grid: 8-bit integers."""
        return self.call(self.ops.quantize_per_tensor.default, x, *grid)

    def dequantize(self, q: fx.Node, grid: Grid) -> fx.Node:
        """Make floats of the integers of a grid."""
        return self.call(self.ops.dequantize_per_tensor.default, q, *grid, **self._out_dtype())

    def weight(self, name: str, ints: Tensor, scale: Tensor, axis: int = 0) -> fx.Node:
        """Hold a weight's integers and its scales float32 [channels of the axis], or [] for one, and make floats of it.

        Where the integers take more than 8 bits, which no operator of quantization knows, this is a product of floats.
        """
        scale = scale.expand(ints.shape[axis]).contiguous()
        q = self.tensor(f"{name}_int", ints := narrowed(ints))
        if ints.dtype != torch.int8:
            floats = self.call(
                torch.mul, q, self.tensor(f"{name}_scale", scale.view(-1, *[1] * (ints.dim() - 1 - axis)))
            )
            return floats if self.dtype == torch.float32 else self.call("to", floats, self.dtype)
        scales = self.tensor(f"{name}_scale", scale)
        zeros = self.tensor(f"{name}_zero_point", torch.zeros_like(scale, dtype=torch.int64))
        of_channel = self.ops.dequantize_per_channel.default
        return self.call(of_channel, q, scales, zeros, axis, -127, 127, torch.int8, **self._out_dtype())

    def _out_dtype(self) -> dict[str, torch.dtype]:
        return {} if self.dtype == torch.float32 else {"out_dtype": self.dtype}

    def module_returning(self, *outputs: fx.Node) -> fx.GraphModule:
        """Make the module whose forward gives this value, or a tuple of several."""
        self.graph.output(outputs[0] if len(outputs) == 1 else outputs)
        made = fx.GraphModule(self.root, self.graph)
        made.registers = _decomposed()._quant_min_max_bounds_check  # who unpickles it imports the operators by this
        return made
