"""Rewrite a model in place, all or nothing, or disturb it for a while.

Whatever changes something of a user's is a step that is done and undone by functions in C, called from C one after the
other: no line of Python runs in between, at which an interrupt or a trace function could raise.
"""

import functools
import operator
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ocs import _C
from ocs.model.references import Place, edges_of, renewed

P, T = ParamSpec("P"), TypeVar("T")
Step = tuple[Callable[[], Any], Callable[[], Any]]  # does something, and undoes it


class Slot(NamedTuple):
    """A place, and what shall stand there."""

    place: Place
    new: Any

    def step(self) -> Step:
        """Put it there, and back what stands there now."""
        put, where, key = self.place.put, self.place.where, self.place.key
        return partial(put, where, key, self.new), partial(put, where, key, self.place.get(where, key))


class NewEntry(NamedTuple):
    """An entry that a table shall have and lacks."""

    table: dict[Any, Any]
    key: Any
    value: Any

    def step(self) -> Step:
        """Add it, and take it out again."""
        return partial(operator.setitem, *self), partial(self.table.pop, self.key, None)


def module_slots(model: nn.Module, replacements: Mapping[int, nn.Module]) -> Iterator[Slot]:
    """Find every place that the model holds a module in that has a replacement, by id of the old module.

    That is as a child, or in a list, a closure, a bound method, any object. Modules that are replaced stay as they are.
    """
    known: dict[int, Any] = dict(replacements)
    for edge in edges_of([*model.modules(), *replacements.values()], replacements.keys()):
        new = renewed(edge.child, known)
        if new is not edge.child:
            if edge.place is None:
                raise ValueError(f"{edge.holder} holds a layer and cannot be given another one")
            yield Slot(edge.place, new)


def attribute(thing: Any, name: str, new: Any) -> Slot:
    """Make the slot of an attribute, in the thing's own table if it is there."""
    table = vars(thing)
    return Slot(Place(table, name), new) if name in table else Slot(Place(thing, name, setattr, getattr), new)


def exchange(slots: Iterable[Slot | NewEntry], values: Iterable[tuple[Tensor, Tensor]] = ()) -> None:
    """Put every object where it belongs, and copy new values into tensors (old, new); if that fails anywhere, neither.

    The caller has switched gradients off where tensors that require them are written to.
    """
    steps = [(partial(Tensor.copy_, old, new), partial(Tensor.copy_, old, old.clone())) for old, new in values]
    steps += [slot.step() for slot in slots]
    _C.between((_no_overrides(),), partial(_C.between, tuple(steps), _nothing, True), False)


def for_a_while(steps: Iterable[Step], body: Callable[[], T]) -> T:
    """Do the steps, call body() and undo them, whatever happens."""
    return _C.between(tuple(steps), body, False)


def added_entry(table: dict[Any, Any], key: Any, value: Any) -> Step:
    """Add an entry to a table, and take it out again."""
    return partial(operator.setitem, table, key, value), partial(table.pop, key, None)


def keeps_grad_mode(function: Callable[P, T]) -> Callable[P, T]:
    """Have torch's grad mode as it was after a call of this function, wherever in torch that is interrupted.

    In a forked process torch runs in one thread meanwhile: it would wait for ever for those that were not forked.
    """

    @functools.wraps(function)
    def kept(*args: P.args, **kwargs: P.kwargs) -> T:
        steps = [(_nothing, partial(torch._C._set_grad_enabled, torch.is_grad_enabled()))]
        if os.getpid() != _PROCESS:
            steps.append((partial(torch.set_num_threads, 1), partial(torch.set_num_threads, torch.get_num_threads())))
        return _C.between(tuple(steps), partial(function, *args, **kwargs), False)

    return kept


_nothing = tuple  # a function in C without effect
_PROCESS = os.getpid()  # that imports this


def _no_overrides() -> Step:
    """Keep torch from calling Python code of tensor subclasses and modes."""
    guard = torch._C.DisableTorchFunction()
    return guard.__enter__, partial(guard.__exit__, None, None, None)


_stances: list[Any] = []  # that of torch.compile before each eager() that is not undone yet, in any thread


def eager() -> list[Step]:
    """Have what torch.compile made run as it was written: in the whole process, until the last who wants it is done.

    Before torch._dynamo is imported, nothing is compiled; imported after a process group was made, it keeps that alive
    to the end of the process, which one of the group's threads may then abort.
    """
    if "torch._dynamo" not in sys.modules:
        return []
    import torch._dynamo.eval_frame

    table = vars(torch._dynamo.eval_frame)
    kept = map(_stances.append, map(table.__getitem__, ("_stance",)))  # as it is when the step is done
    back = map(table.__setitem__, ("_stance",), map(_stances.pop, (-1,)))
    forced = torch._dynamo.eval_frame.DynamoStance("force_eager")
    return [
        (partial(deque, kept, 0), partial(deque, back, 0)),
        (partial(table.__setitem__, "_stance", forced), _nothing),
    ]
