"""What goes into the residual additions of a model: the ranges of layers' outputs that are added to other tensors."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from ocs.calibration.ranks import rank_count, reduced
from ocs.model.rewrite import Step, added_entry
from ocs.nn.registry import is_quantizable

Range = tuple[float, float]
_ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})


class Term(NamedTuple):
    """The output of a layer, or of the BatchNorm that directly follows it."""

    layer: str
    normed: bool


class Additions(TorchFunctionMode):
    """Sees the additions of two tensors of one shape, and keeps the range of each that is a layer's output.

    Args:
        modules: of the model, by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.layers = {name: module for name, module in modules.items() if is_quantizable(module)}
        self.norms = [module for module in modules.values() if isinstance(module, _BatchNorm)]
        self.ranges: dict[Term, Range] = {}
        self._outputs: dict[int, tuple[weakref.ref[Tensor], Term]] = {}

    def steps(self) -> Iterator[Step]:
        """Give what lets it see a model run."""
        for name, layer in self.layers.items():
            yield added_entry(layer._forward_hooks, object(), partial(self._take_output, Term(name, False)))
        for norm in self.norms:
            yield added_entry(norm._forward_hooks, object(), self._take_normed)
        yield partial(torch._C._push_on_torch_function_stack, self), torch._C._pop_torch_function_stack

    def _take_output(self, term: Term, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            self._outputs[id(output)] = weakref.ref(output), term

    def _take_normed(self, norm: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        term = self._term_of(args[0]) if args else None
        if term is not None and not term.normed:
            self._take_output(term._replace(normed=True), norm, args, output)

    def _term_of(self, tensor: Any) -> Term | None:
        known, term = self._outputs.get(id(tensor), (None, None))
        return term if known is not None and known() is tensor else None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch's, and look at what an addition adds."""
        if getattr(func, "__name__", "") in _ADDITIONS and len(args) == 2:
            self._look_at(*args)
        return func(*args, **kwargs or {})

    def _look_at(self, *tensors: Any) -> None:
        first, second = tensors
        if not (isinstance(first, Tensor) and isinstance(second, Tensor)) or first.shape != second.shape:
            return
        for tensor in tensors:
            term = self._term_of(tensor)
            if term is not None and tensor.numel() and tensor.is_floating_point():
                low, high = (float(bound) for bound in tensor.detach().aminmax())
                known = self.ranges.get(term, (low, high))
                self.ranges[term] = min(low, known[0]), max(high, known[1])

    def reduce(self) -> None:
        """Merge what all ranks have seen."""
        if rank_count() == 1:
            return
        terms = [Term(name, normed) for name in self.layers for normed in (False, True)]
        never = (float("inf"), -float("inf"))
        bounds = torch.tensor([self.ranges.get(term, never) for term in terms], dtype=torch.float64, device="cpu")
        bounds = reduced(bounds * torch.tensor([-1.0, 1.0], dtype=torch.float64, device="cpu"), dist.ReduceOp.MAX)
        found = zip(terms, bounds.tolist(), strict=True)
        self.ranges = {term: (-low, high) for term, (low, high) in found if high >= -low}
