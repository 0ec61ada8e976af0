"""Weights that are in files while a model runs: each operation of torch's finds the values of those that it is given.

So whatever a model does with its weights, whoever reads them, it does as if it held them.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ocs.model.rewrite import Step
from ocs.nn.weights import bytes_of

_VALUES = ("T", "mT", "H", "mH", "data", "real", "imag")  # attributes of tensors that are tensors
_PLACES = {
    "device": torch.device("cpu"),
    "is_meta": False,
    "is_cpu": True,
}  # what weights in files say of where they are


class FileWeights(TorchFunctionMode):
    """Gives torch's functions values for weights on the meta device.

    It holds those that were used last, as many as take twice the bytes of the largest.

    Args:
        waiting: the weights. read: gives the values of one, on the CPU.
    """

    def __init__(self, waiting: Collection[Tensor], read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.waiting = {id(weight): weight for weight in waiting}
        self.read, self.most = read, 2 * max(map(bytes_of, waiting), default=0)
        self.held: dict[int, Tensor] = {}  # in the order of their last use

    def steps(self) -> list[Step]:
        """Give what lets the functions that are called meanwhile have the weights, and lets go of these."""
        push = partial(torch._C._push_on_torch_function_stack, self)
        return [(self.held.clear, self.held.clear), (push, torch._C._pop_torch_function_stack)]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch's with values in place of weights; what attributes tell needs none."""
        attribute = getattr(func, "__name__", "") == "__get__" and getattr(func.__self__, "__name__", "")
        if attribute and attribute not in _VALUES:
            return _PLACES[attribute] if attribute in _PLACES and id(args[0]) in self.waiting else func(*args)
        return func(*self._given(args), **self._given(dict(kwargs or {})))

    def _given(self, value: Any) -> Any:
        """Put values in place of weights in tuples, lists and dicts."""
        if isinstance(value, Tensor):
            return self._value(value) if id(value) in self.waiting else value
        if type(value) in (tuple, list):
            return type(value)(map(self._given, value))
        if type(value) is dict:
            return {key: self._given(each) for key, each in value.items()}
        return value

    def _value(self, weight: Tensor) -> Tensor:
        value = self.held.pop(id(weight), None)
        if value is None:
            while self.held and sum(map(bytes_of, self.held.values())) + bytes_of(weight) > self.most:
                del self.held[next(iter(self.held))]
            value = self.read(weight)
        self.held[id(weight)] = value
        return value
