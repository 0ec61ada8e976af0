"""Second moments of what the weights of a layer meet, as calibration sees it.

A weight [O, C, *kernel] of G groups is a matrix [G, O / G, C K] that multiplies vectors x [G, C K]: a linear layer's
inputs, a convolution's patches. Kept are the sum of x x^T, and how many there were: (C K)^2 float32 numbers
for each group, however many batches there are, 85 MB where 512 channels meet a 3 x 3 kernel. Where there are more
columns than WIDEST, or where all weights together would take more than BYTES, only the products within blocks of
neighbouring columns are kept: what is in different blocks is then taken to have nothing in common.

Recurrent layers run once more, layer by layer, for the hidden states that the deeper weights meet; attention with an
identity in place of its output projection, for what that meets.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ocs.calibration.ranks import reduced
from ocs.calibration.statistics import values_of
from ocs.nn.convolution import CONVOLUTIONS
from ocs.nn.registry import replacement_of
from ocs.nn.weights import weights_of

WIDEST = 4608  # columns of a block
BYTES = 2**31  # that the second moments of a model take at most
ELEMENTS = 2**24  # of patches that are made at once
ATTENDED = ("query", "key", "value")  # arguments of attention

Rows = Iterator[tuple[str, Tensor]]  # a weight's name, and vectors [G, N, C K] that it meets


def _ordinary_tensors() -> AbstractContextManager[object]:
    """Leave inference mode where it is on, and only there.

    Its guard sets grad mode when it is freed, which an interrupt's traceback puts off until after the caller's own.
    """
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


class SecondMoments:
    """Second moments of the vectors x [G, C K] that one weight meets, in blocks of at most `widest` columns."""

    def __init__(self, groups: int, columns: int, widest: int = WIDEST) -> None:
        self.groups, self.columns, self.count = groups, columns, 0
        self.blocks, self.width = _blocks(columns, widest)
        self._sums: Tensor | None = None  # no memory before there is something to keep

    @property
    def products(self) -> Tensor:
        """The sum of x x^T, float32 [G, C K, C K]; of B blocks of L columns [G B, L, L], zeros where the last ends."""
        if self._sums is None:
            self._sums = torch.zeros(
                self.groups * self.blocks, self.width, self.width, dtype=torch.float32, device="cpu"
            )
        return self._sums

    def update(self, rows: Tensor) -> None:
        """Take in N more, [G, N, C K]. The sums are on their device from then on."""
        rows = rows.detach().float()
        if not bool(rows.sum(1).isfinite().all()):
            raise ValueError("its input holds NaN, Inf or values that float32 hardly holds: repair model or batch")
        self.count += rows.shape[1]
        with _ordinary_tensors(), torch.no_grad():
            if self._sums is None or self._sums.device != rows.device:
                self._sums = self.products.to(rows.device)
            sums = self._sums.unflatten(0, (self.groups, self.blocks))
            for b, part in enumerate(rows.split(max(self.width, 1), 2)):
                sums[:, b, : part.shape[2], : part.shape[2]].baddbmm_(part.mT, part)

    def reduce(self) -> None:
        """Merge what all ranks have seen."""
        self.count = int(reduced(torch.tensor(self.count, device="cpu"), dist.ReduceOp.SUM))
        self._sums = reduced(self.products, dist.ReduceOp.SUM)


class LayerMoments(dict[str, SecondMoments]):
    """Second moments of what each weight of a layer meets, by its name in the layer.

    layer: the float layer. reader: the attention whose output projection it is, if so, which reads its weight itself.
    widest: the most columns of a block.
    """

    def __init__(self, layer: nn.Module, reader: nn.MultiheadAttention | None = None, widest: int = WIDEST) -> None:
        super().__init__()
        self.reader = reader is not None
        for name, (groups, columns) in _shapes(layer).items():
            self[name] = SecondMoments(groups, columns, widest)

    @property
    def inputs(self) -> int:
        """Count the vectors that the weights have met; 0 where calibration never reached the layer."""
        return max(moments.count for moments in self.values())

    def observe(self, layer: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Take in one call, of the layer or of its reader, with these arguments by name."""
        rows = _attended(layer, arguments) if self.reader else rows_of(layer, arguments)
        for name, of_weight in rows:
            if of_weight.shape[2] != (columns := self[name].columns):
                raise ValueError(f"its input has {of_weight.shape[2]} channels, {name} needs {columns}")
            self[name].update(of_weight)

    def reduce(self) -> None:
        """Merge what all ranks have seen."""
        for moments in self.values():
            moments.reduce()

    def check(self, layer: nn.Module) -> None:
        """Raise a ValueError unless these are second moments of what this layer's weights meet."""
        seen = {name: (moments.groups, moments.columns) for name, moments in self.items()}
        for name, needed in _shapes(layer).items():
            if seen.get(name) != needed:
                raise ValueError(
                    f"calibration is of another layer: its second moments are of {seen.get(name, 'nothing')}"
                    f" (groups, columns) for {name}, which meets {needed}"
                )


def _shapes(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """List G and C K of each weight, by its name."""
    return {
        weight.name: (weight.groups, weight.tensor[0].numel() if len(weight.tensor) else 0)
        for weight in weights_of(layer)
    }


def _blocks(columns: int, widest: int) -> tuple[int, int]:
    """Cut so many columns into blocks of about the same size: their number, and the columns of each."""
    width = math.ceil(columns / max(math.ceil(columns / widest), 1))
    return max(math.ceil(columns / max(width, 1)), 1), width


def widest_block(layers: Iterable[nn.Module]) -> int:
    """Find the most columns of a block, up to WIDEST, with which the second moments of these layers take BYTES."""
    shapes = [shape for layer in layers for shape in _shapes(layer).values()]
    cut = lambda widest: ((groups, *_blocks(columns, widest)) for groups, columns in shapes)  # noqa: E731
    widest = WIDEST
    while widest > 1 and sum(4 * groups * blocks * width**2 for groups, blocks, width in cut(widest)) > BYTES:
        widest -= -(-widest // 16)
    return widest


# --- What the weights of each kind of layer meet ----------------------------------------------------------------------


def rows_of(layer: nn.Module, arguments: Mapping[str, Any]) -> Rows:
    """Find the vectors that the weights of a float layer meet in a call with these arguments."""
    if isinstance(layer, nn.MultiheadAttention):
        return _projections(layer, arguments)
    x = arguments[replacement_of(layer).input_names[0]]
    if values_of(x) is None:
        return iter(())
    if isinstance(layer, nn.RNNBase):
        return _recurrent(layer, x, arguments.get("hx"))
    if isinstance(layer, nn.RNNCellBase):
        return _cell(layer, x, arguments.get("hx"))
    if isinstance(layer, CONVOLUTIONS):
        return _patches(layer, x)
    return iter([("weight", _vectors(x))])


def _vectors(x: Tensor) -> Tensor:
    return x.reshape(1, -1, x.shape[-1])


def _projections(layer: nn.MultiheadAttention, arguments: Mapping[str, Any]) -> Rows:
    """Find what the projections of query, key and value meet: one weight meets all three, or the one that they are."""
    inputs = [(f"{name[0]}_proj_weight", arguments[name]) for name in arguments if name in ATTENDED]
    if layer._qkv_same_embed_dim:
        inputs = [("in_proj_weight", x) for x in {id(x): x for _, x in inputs}.values()]
    for name, x in inputs:
        if x.numel() and not x.is_nested:
            yield name, _vectors(x)


def _attended(layer: nn.MultiheadAttention, arguments: Mapping[str, Any]) -> Rows:
    """Find what the output projection meets: the layer's output with an identity in its place."""
    if any(x.is_nested or not x.numel() for name, x in arguments.items() if name in ATTENDED):
        return
    weight, size = layer.out_proj.weight, layer.embed_dim
    identity = nn.Linear(size, size, bias=False, device="meta")  # as random values would move the generator
    identity.weight = nn.Parameter(torch.eye(size, dtype=weight.dtype, device=weight.device), requires_grad=False)
    probe = copy.copy(layer)
    vars(probe)["_modules"] = {"out_proj": identity}
    yield "weight", _vectors(probe.forward(**arguments)[0])


def _patches(layer: nn.Module, x: Tensor) -> Rows:
    """Find what a convolution meets; a transposed one reverses its kernel, after zeros between the values."""
    spatial = len(layer.kernel_size)
    x, stride = x if x.dim() == spatial + 2 else x[None], layer.stride
    if layer.transposed:
        x, stride = _spread(layer, x), (1,) * spatial
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, step, dilation) in enumerate(zip(layer.kernel_size, stride, layer.dilation, strict=True), 2):
        x = x.unfold(axis, dilation * (size - 1) + 1, step)[..., ::dilation]
    x = x.unflatten(1, (layer.groups, -1)).movedim(1, 0).movedim(2, -1 - spatial)  # [G, N, *out, C, *kernel]
    for part in x.split(max(1, ELEMENTS * x.shape[1] // max(x.numel(), 1)), 1):
        if layer.transposed:
            part = part.flip([*range(-spatial, 0)])  # noqa: PLW2901
        yield "weight", part.flatten(-1 - spatial).flatten(1, -2)


def _spread(layer: nn.Module, x: Tensor) -> Tensor:
    """Put zeros between and around the values: the input of the convolution that a transposed one is."""
    sizes = [(n - 1) * step + 1 for n, step in zip(x.shape[2:], layer.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    spread[(..., *(slice(None, None, step) for step in layer.stride))] = x
    sides = zip(layer.kernel_size, layer.dilation, layer.padding, layer.output_padding, strict=True)
    pads = [(d * (k - 1) - p, d * (k - 1) - p + more) for k, d, p, more in sides]
    return F.pad(spread, [side for pair in reversed(pads) for side in pair])


# --- Recurrent ones ---------------------------------------------------------------------------------------------------


def _cell(layer: nn.RNNCellBase, x: Tensor, hx: Any) -> Rows:
    """Find what the two weights of a cell meet."""
    yield "weight_ih", _vectors(x)
    h = hx[0] if isinstance(hx, tuple | list) else hx
    yield "weight_hh", _vectors(x.new_zeros(*x.shape[:-1], layer.hidden_size) if h is None else h)


def _recurrent(layer: nn.RNNBase, x: Tensor | PackedSequence, hx: Any) -> Rows:
    """Find what the weights of a recurrent layer meet, layer by layer, on packed data [steps N, C]."""
    data, batch_sizes, states = _packed(layer, x, hx)
    directions = 1 + layer.bidirectional
    for i in range(layer.num_layers):
        suffixes = [f"_l{i}", f"_l{i}_reverse"] if layer.bidirectional else [f"_l{i}"]
        first = [state[i * directions : (i + 1) * directions] for state in states]
        for suffix in suffixes:
            yield f"weight_ih{suffix}", _vectors(data)
        hidden = _run_layer(layer, suffixes, data, batch_sizes, first).chunk(directions, -1)
        projected = layer.proj_size or layer.hidden_size
        for d, (suffix, h) in enumerate(zip(suffixes, hidden, strict=True)):
            before = _before(h[:, :projected], first[0][d], batch_sizes.tolist(), reverse=d == 1)
            yield f"weight_hh{suffix}", _vectors(before)
            if layer.proj_size:
                yield f"weight_hr{suffix}", _vectors(h[:, projected:])
        data = torch.cat([h[:, :projected] for h in hidden], -1)


def _packed(layer: nn.RNNBase, x: Tensor | PackedSequence, hx: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Pack the input: data [steps N, C], each step's batch size, and initial states [layers, N, H], (h,) or (h, c)."""
    if isinstance(x, PackedSequence):
        data, batch_sizes, order, _ = x
    else:
        if x.dim() == 2:
            x = x.unsqueeze(1)
        elif layer.batch_first:
            x = x.transpose(0, 1)
        data, batch_sizes, order = (
            x.reshape(-1, x.shape[-1]),
            torch.full(x.shape[:1], x.shape[1], dtype=torch.int64, device="cpu"),
            None,
        )
    if hx is None:
        sizes = [layer.proj_size or layer.hidden_size]
        if layer.mode == "LSTM":
            sizes.append(layer.hidden_size)
        shape = layer.num_layers * (1 + layer.bidirectional), int(batch_sizes[0])
        return data, batch_sizes, [data.new_zeros(*shape, size) for size in sizes]
    states = list(hx) if layer.mode == "LSTM" else [hx]
    states = [state.unsqueeze(1) if state.dim() == 2 else state for state in states]
    return data, batch_sizes, states if order is None else [state.index_select(1, order) for state in states]


def _run_layer(
    layer: nn.RNNBase, suffixes: list[str], data: Tensor, batch_sizes: Tensor, states: list[Tensor]
) -> Tensor:
    """Compute the hidden states of one layer [steps N, directions H]; projected ones, then the same unprojected."""
    own = layer._parameters
    weights = []
    for suffix in suffixes:
        hh = own[f"weight_hh{suffix}"]
        biases = [own[f"bias_ih{suffix}"], own[f"bias_hh{suffix}"]] if layer.bias else []
        if not layer.proj_size:
            weights += [own[f"weight_ih{suffix}"], hh, *biases]
            continue
        hr = own[f"weight_hr{suffix}"]  # another projection, that keeps what it is given, beside its own
        hr = torch.cat([hr, torch.eye(layer.hidden_size, dtype=hr.dtype, device=hr.device)])
        weights += [own[f"weight_ih{suffix}"], F.pad(hh, (0, layer.hidden_size)), *biases, hr]
    if layer.proj_size:
        states = [F.pad(states[0], (0, layer.hidden_size)), states[1]]
    hx = tuple(state.contiguous() for state in states) if layer.mode == "LSTM" else states[0].contiguous()
    with torch.backends.cudnn.flags(enabled=False):  # which wants all weights in one piece of memory
        kernel = getattr(torch._VF, layer.mode.lower())
        return kernel(data, batch_sizes, hx, weights, layer.bias, 1, 0.0, False, layer.bidirectional)[0]


def _before(h: Tensor, first: Tensor, batch_sizes: list[int], *, reverse: bool) -> Tensor:
    """Find the hidden states that each step starts from [steps N, H]: the initial ones, or those of the step before."""
    steps = h.split(batch_sizes)
    earlier = [*steps[1:], first[:0]] if reverse else [first[:0], *steps[:-1]]
    return torch.cat(
        [torch.cat([of[:size], first[len(of) : size]]) for of, size in zip(earlier, batch_sizes, strict=True)]
    )
