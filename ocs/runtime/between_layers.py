"""8-bit tensors between the layers of an exported program: what goes into residual additions and pooling, too.

An engine that adds and pools in floats writes and reads four bytes where its products write and read one. So what is
added is rounded as well: to the grid of a layer that reads the same tensor, where there is one, which then costs
nothing; else to the range that calibration saw. Maximum pooling comes after rounding instead of before, which changes
nothing.
"""

from collections.abc import Mapping

import torch
from torch import fx
from torch.export import ExportedProgram

from ocs.runtime.body import Grid, operators

Range = tuple[float, float]
_PRODUCTS = {f"{name}.default" for name in ("linear", "conv1d", "conv2d", "conv3d")} | {
    "conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input"
}  # fmt: skip
_POOLS = ("max_pool1d.default", "max_pool2d.default", "max_pool3d.default")
_AVERAGES = {f"{name}{rank}d.default" for name in ("avg_pool", "adaptive_avg_pool") for rank in (1, 2, 3)} | {
    "mean.dim"
}


def round_between_layers(
    program: ExportedProgram,
    outputs: Mapping[str, Range],
    inputs: Mapping[str, Range],
    *,
    signed: bool,
    keep_a_product: bool,
) -> None:
    """Round the tensors between the layers of a program, in place.

    Args:
        program: functional, from torch.export and run_decompositions({}).
        outputs: the least and largest value of layers' outputs, by the layer's name.
        inputs: of their inputs, likewise.
        signed: whether grids are int8 with zero point 0, else uint8.
        keep_a_product: leave one term of an addition in floats, where it is a product that nothing else reads: for
            engines that add to it before it leaves the registers.
    """
    rounding = _Rounding(program, outputs, inputs, signed)
    for node in list(program.graph.nodes):
        if _is_aten(node, _POOLS):
            rounding.pool(node)
    for node in list(program.graph.nodes):
        if _is_aten(node, ("add.Tensor",)):
            rounding.add(node, keep_a_product)
    for node in list(program.graph.nodes) if not keep_a_product else ():
        if _is_aten(node, _AVERAGES):
            rounding.average(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()


def _is_aten(node: object, names: tuple[str, ...] | set[str]) -> bool:
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return getattr(node.target, "namespace", "") == "aten" and node.target.__name__ in names


def _holds(grid: Grid, seen: Range) -> bool:
    """Tell whether a grid of 8 bits reaches all of a range, to half a step."""
    low, high = ((code - grid.zero_point) * grid.scale for code in (grid.low, grid.high))
    return grid.high - grid.low >= 254 and low - grid.scale / 2 <= seen[0] and seen[1] <= high + grid.scale / 2


class _Rounding:
    """Puts pairs of quantize and dequantize where they belong in a program's graph."""

    def __init__(
        self, program: ExportedProgram, outputs: Mapping[str, Range], inputs: Mapping[str, Range], signed: bool
    ) -> None:
        self.graph, self.outputs, self.inputs, self.signed = program.graph, outputs, inputs, signed
        self.buffers = program.graph_signature.inputs_to_buffers
        self.quantizes = operators().quantize_per_tensor.default
        self.dequantizes = operators().dequantize_per_tensor.default

    def pool(self, pool: fx.Node) -> None:
        """Round before a maximum what is rounded after it, where all that reads it rounds alike."""
        grids = {self._grid_of(user) for user in pool.users}
        if len(grids) == 1 and None not in grids:
            (grid,) = grids
            pool.replace_input_with(pool.args[0], self._rounded(pool.args[0], grid, before=pool))

    def add(self, add: fx.Node, keep_a_product: bool) -> None:
        """Round the terms of an addition whose grids are known."""
        terms = [each for each in add.args if isinstance(each, fx.Node)]
        shapes = [list(map(str, term.meta["val"].shape)) for term in terms]  # sizes that are open are told by name
        if len(terms) != 2 or shapes[0] != shapes[1] or add.kwargs or add.meta["val"].dtype != torch.float32:
            return
        grids = {term: self._grid_for(term) for term in terms}
        products = [term for term in terms if _is_aten(term, _PRODUCTS) and len(term.users) == 1]
        if keep_a_product and products:
            grids[products[0]] = None
        for term, grid in grids.items():
            if grid is not None:
                add.replace_input_with(term, self._rounded(term, grid, before=add))

    def average(self, pool: fx.Node) -> None:
        """Round what is averaged, where it is a sum whose terms have known ranges."""
        x = pool.args[0]
        if _is_aten(x, ("relu.default", "add.Tensor")) and x.meta["val"].dtype == torch.float32:
            grid = self._grid_of_range(self._bounds(x))
            if grid is not None:
                pool.replace_input_with(x, self._rounded(x, grid, before=pool))

    def _bounds(self, node: fx.Node) -> Range | None:
        """Bound the values of sums, ReLUs of them and rounded tensors."""
        if node.target == self.dequantizes:
            grid = Grid(*node.args[1:6])
            return tuple((code - grid.zero_point) * grid.scale for code in (grid.low, grid.high))
        if _is_aten(node, ("relu.default",)):
            bounds = self._bounds(node.args[0])
            return bounds and (max(bounds[0], 0.0), max(bounds[1], 0.0))
        if _is_aten(node, ("add.Tensor",)) and not node.kwargs:
            terms = [self._bounds(term) if isinstance(term, fx.Node) else None for term in node.args]
            return None if None in terms else (sum(low for low, _ in terms), sum(high for _, high in terms))
        return None

    def _grid_for(self, term: fx.Node) -> Grid | None:
        """Find the grid of a layer that reads this tensor, if that holds all of it, else of what calibration saw."""
        quantizers = [user for user in term.users if self._grid_of(user)]
        readers = [found for q in quantizers if (found := self.inputs.get(self._reader_of(q))) is not None]
        own = self.outputs.get(self._layer_of(term)) if _is_aten(term, _PRODUCTS) else None
        seen = own or next(iter(readers), None)
        if seen is None:
            return None
        return next((g for g in map(self._grid_of, quantizers) if _holds(g, seen)), None) or self._grid_of_range(seen)

    def _layer_of(self, product: fx.Node) -> str:
        """Name the layer of a product by its weight."""
        weight = product.args[1]
        while weight.op == "call_function":
            weight = weight.args[0]
        return self.buffers.get(weight.name, "").rpartition(".")[0]

    def _reader_of(self, node: fx.Node) -> str:
        """Name the layer that a rounded tensor goes to."""
        for user in node.users:
            if _is_aten(user, _PRODUCTS):
                return self._layer_of(user)
            if user.target == self.dequantizes or _is_aten(user, ("index_select.default",)):
                return self._reader_of(user)
        return ""

    def _grid_of_range(self, found: Range | None) -> Grid | None:
        if found is None or found[0] == found[1]:
            return None
        low, high = min(found[0], 0.0), max(found[1], 0.0)
        if self.signed:
            return Grid(max(-low, high) / 127, 0, -127, 127, torch.int8)
        scale = (high - low) / 255
        return Grid(scale, round(-low / scale), 0, 255, torch.uint8)

    def _grid_of(self, node: fx.Node) -> Grid | None:
        """Give the grid of a node that quantizes, or None."""
        return Grid(*node.args[1:]) if node.target == self.quantizes else None

    def _rounded(self, x: fx.Node, grid: Grid, before: fx.Node) -> fx.Node:
        """Round a tensor to a grid, by the node that does so already if there is one."""
        q = next((user for user in x.users if self._grid_of(user) == grid and user < before), None)
        if q is None:
            with self.graph.inserting_after(x):
                q = self.graph.call_function(self.quantizes, (x, *grid))
            q.meta["val"] = x.meta["val"].to(grid.dtype)
        with self.graph.inserting_before(before):
            floats = self.graph.call_function(self.dequantizes, (q, *grid))
        floats.meta["val"] = x.meta["val"]
        return floats
