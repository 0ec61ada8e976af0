"""8-bit tensors between the layers of an exported program: what goes into residual additions and pooling, too.

An engine that adds and pools in floats writes and reads four bytes where its products write and read one. So what is
added is rounded as well: to the grid of a layer that reads the same tensor, where there is one, which then costs
nothing; else to one that calibration saw its values in. Maximum pooling comes after rounding instead of before, which
changes nothing.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import fx
from torch.export import ExportedProgram

from ocs.runtime.body import Grid, operators

Range = tuple[float, float]
_PRODUCTS = {
    getattr(torch.ops.aten, name).default
    for name in ("linear", *(f"{kind}{rank}d" for kind in ("conv", "conv_transpose") for rank in (1, 2, 3)))
    if hasattr(getattr(torch.ops.aten, name), "default")
}


class BetweenLayers:
    """Rounds the tensors between the layers of a program, in place.

    Args:
        program: functional, from torch.export and run_decompositions({}).
        ranges: the least and largest value of layers' outputs, by the layer's name.
        signed: whether grids are int8 with zero point 0, else uint8.
        fused: whether the engine adds a tensor of 8 bits to a product that is still in floats: then that stays float.
    """

    def __init__(self, program: ExportedProgram, ranges: Mapping[str, Range], *, signed: bool, fused: bool) -> None:
        self.graph, self.ranges, self.signed, self.fused = program.graph, ranges, signed, fused
        self.buffers = program.graph_signature.inputs_to_buffers
        ops, aten = operators(), torch.ops.aten
        self.quantizes, self.dequantizes = ops.quantize_per_tensor.default, ops.dequantize_per_tensor.default
        self.adds, self.pools = (aten.add.Tensor,), (aten.max_pool2d.default, aten.max_pool1d.default)

    def run(self) -> None:
        """Round what pooling and additions meet."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target in self.pools:
                self._pool_integers(node)
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target in self.adds:
                self._add_integers(node)

    # --- Pooling

    def _pool_integers(self, pool: fx.Node) -> None:
        """Round before a maximum instead of after it, where all that reads it rounds alike."""
        grids = {self._grid_of(user) for user in pool.users}
        if len(grids) == 1 and None not in grids:
            pool.replace_input_with(pool.args[0], self._rounded(pool.args[0], *grids, before=pool))

    # --- Additions

    def _add_integers(self, add: fx.Node) -> None:
        terms = [each for each in add.args if isinstance(each, fx.Node)]
        if len(terms) != 2 or terms[0].meta["val"].shape != terms[1].meta["val"].shape:
            return
        grids = [self._grid_for(term) for term in terms]
        rounds = [grid is not None for grid in grids]
        if self.fused and all(rounds):  # one of them stays a product in floats, if it is one that nobody else reads
            products = [self._is_product(term) and len(term.users) == 1 for term in terms]
            if any(products):
                rounds[products.index(True)] = False
        for term, grid, round_it in zip(terms, grids, rounds, strict=True):
            if round_it:
                add.replace_input_with(term, self._rounded(term, grid, before=add))

    def _grid_for(self, term: fx.Node) -> Grid | None:
        """Find the grid of a layer that reads this tensor, else of what calibration saw of it."""
        if term.target == self.dequantizes:
            return None
        known = (self._grid_of(user) for user in term.users)
        return next(filter(None, known), None) or self._grid_of_range(self._range_of(term))

    def _range_of(self, term: fx.Node) -> Range | None:
        if not self._is_product(term):
            return None
        weight = term.args[1]
        while weight.op == "call_function":
            weight = weight.args[0]
        return self.ranges.get(self.buffers.get(weight.name, "").rpartition(".")[0])

    def _is_product(self, node: fx.Node) -> bool:
        return node.op == "call_function" and node.target in _PRODUCTS

    def _grid_of_range(self, found: Range | None) -> Grid | None:
        if found is None:
            return None
        low, high = min(found[0], 0.0), max(found[1], 0.0)
        if self.signed:
            return Grid((max(-low, high) / 127) or 1.0, 0, -127, 127, torch.int8)
        scale = ((high - low) / 255) or 1.0
        return Grid(scale, round(-low / scale), 0, 255, torch.uint8)

    # --- Nodes

    def _grid_of(self, node: fx.Node) -> Grid | None:
        """Give the grid of a node that quantizes, or None."""
        return Grid(*node.args[1:]) if node.op == "call_function" and node.target == self.quantizes else None

    def _rounded(self, x: fx.Node, grid: Grid, before: fx.Node) -> fx.Node:
        """Round a tensor to a grid, by the node that does so already if there is one."""
        q = next((user for user in x.users if self._grid_of(user) == grid), None)
        if q is None or not _comes_before(q, before):
            with self.graph.inserting_after(x):
                q = self.graph.call_function(self.quantizes, (x, *grid))
                q.meta["val"] = x.meta["val"].to(grid.dtype)
        with self.graph.inserting_before(before):
            floats = self.graph.call_function(self.dequantizes, (q, *grid))
            floats.meta["val"] = x.meta["val"]
        return floats


def _comes_before(first: fx.Node, second: fx.Node) -> bool:
    return first < second
