"""Quantized layers that keep the forward of the float layer's class, and the promise that lets them.

Such a layer is of a class of its own, made of QuantOwnForward and the float layer's class: the forward is that of the
latter, and reads the folded weight where it had its parameter. So runs whatever computes with its weight as a linear
layer or convolution does, but not in torch's way: classes that ocs.register names, transformers' Conv1D (a weight
[in, out]), and modules that hold the weights of all their experts in one parameter [E, O, C], or [E, C, O], each of
which is a weight of its own here, "gate_up_proj.3".
"""

from collections.abc import Iterable, Mapping
from functools import cache
from inspect import getattr_static, signature
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn, stack

from ocs.nn.base import QuantizedLayer
from ocs.nn.convolution import CONVOLUTIONS
from ocs.nn.read_only import read_only
from ocs.nn.registry import FINDERS, REPLACEMENTS
from ocs.nn.state import INPUT_BUFFERS
from ocs.nn.weights import parameter_of

PROMISED = (nn.Linear, *CONVOLUTIONS)  # what a class may be registered to be like
_TRANSPOSED = "transformers.pytorch_utils.Conv1D"
Class = TypeVar("Class", bound=type[nn.Module])


def register(cls: Class, *, like: type[nn.Module] = nn.Linear) -> Class:
    """Promise that a class of layers computes with its weight as another one does, so that it is quantized, too.

    For subclasses of torch's layers with a forward of their own, and for classes that have nothing to do with them. A
    quantized layer keeps the forward and all else of its class, and gives it the quantized weight, [O, C, ...] as that
    of `like`, under its name: so it runs folded. Of a class like nn.Linear whose parameters are [E, O, C], each is the
    weights of E experts. Register in the process that loads a file, too.

        ocs.register(FalconLinear)                  # computes input @ self.weight.T + self.bias
        ocs.register(Conv2dSame, like=nn.Conv2d)    # pads its input by its size

    Args:
        cls: the class; its subclasses are promised, too.
        like: nn.Linear, or a convolution of torch.

    Returns:
        cls, so that it can stand as a decorator.

    Raises:
        TypeError: cls is no class of modules, or one of those that are quantized anyway.
        ValueError: like is neither nn.Linear nor a convolution of torch.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls={cls!r}: use a class of modules")
    if like not in PROMISED:
        raise ValueError(f"like={like!r}: use nn.Linear or a convolution of torch")
    if issubclass(cls, QuantizedLayer) or cls.__module__.startswith("torch.nn.") or cls is nn.Module:
        raise TypeError(f"cls={cls.__name__}: no class of torch or ocs need be registered")
    REPLACEMENTS[cls] = own_forward(cls, like)
    return cls


class QuantOwnForward(QuantizedLayer):
    """A layer that keeps the forward of the float layer's class; see own_forward()."""

    like: ClassVar[type[nn.Module]]
    transposed_weight: ClassVar[bool]
    only_folded = "its forward is its own"
    keeps_all = True

    @classmethod
    def for_class(cls, float_class: type[nn.Module]) -> type[QuantizedLayer]:
        """Give the class of layers that keeps the forward of a subclass."""
        return own_forward(float_class, cls.like, cls.transposed_weight)

    def _take_attributes(self, float_layer: nn.Module) -> None:
        """Take over all that the forward may read, but for what nn.Module itself holds."""
        super()._take_attributes(float_layer)
        vars(self).update(
            {name: value for name, value in vars(float_layer).items() if name not in {*vars(self), "forward"}}
        )
        self._modules.update(float_layer._modules)
        self._buffers.update(float_layer._buffers)
        self._non_persistent_buffers_set.update(float_layer._non_persistent_buffers_set)

    @classmethod
    def weight_names(cls, float_layer: nn.Module) -> tuple[str, ...]:
        """Name the parameters of experts where there are any, else the weight."""
        return (tuple(_experts_of(float_layer)) if cls.like is nn.Linear else ()) or ("weight",)

    @classmethod
    def reserved_names(cls, weights: Iterable[str]) -> set[str]:
        """Name the attributes that its forward must not read: those of a quantized input are among them."""
        return super().reserved_names(weights) | {"input_grid", *INPUT_BUFFERS}

    @classmethod
    def unseen(cls, float_layer: nn.Module) -> str:
        """Say of experts that each meets a part of the input that only their forward knows."""
        return "" if cls.weight_names(float_layer) == ("weight",) else "what each expert meets is not seen"

    @classmethod
    def unquantized_names(cls, float_layer: nn.Module) -> tuple[str, ...]:
        """Name all other parameters."""
        weights = cls.weight_names(float_layer)
        return tuple(name for name in float_layer._parameters if name not in weights)

    @classmethod
    def parts(cls, name: str, parameter: Tensor) -> Iterable[tuple[str, Tensor]]:
        """Give each expert's weight, "gate_up_proj.3"; or the one weight."""
        if cls.like is nn.Linear and _dimensions(parameter) == 3:
            return [(f"{name}.{expert}", weight) for expert, weight in enumerate(parameter)]
        return [(name, parameter)]

    def forward_buffer(self, name: str) -> str:
        """Name the buffer that stands where the parameter stood: that of all experts."""
        return parameter_of(name)

    def __getattr__(self, name: str) -> Any:
        """Let the forward and all others read a weight as what it computes, and write it not."""
        value = super().__getattr__(name)
        weights = map(parameter_of, self.__dict__.get("channels", ()))
        return read_only(value, self, name) if isinstance(value, Tensor) and name in weights else value

    def rebuild(self) -> None:
        """Make the weights from the integers again, those of experts together."""
        weights: dict[str, list[Tensor]] = {}
        for name in self.channels:
            weights.setdefault(parameter_of(name), []).append(self.in_float_layout(self.folded(name)))
        for buffer, parts in weights.items():
            whole = stack(parts) if buffer not in self.channels else parts[0]
            self.set_forward_buffer(buffer, whole, like=self._buffers[buffer])

    @property
    def input_axis(self) -> int:
        """The axis of the channels, before as many others as the weight has."""
        return 1 - self.weight_state(next(iter(self.channels)))[0].dim()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the float layer does, of its first argument rounded where that is asked for."""
        if self.input_grid is not None:
            (name,) = self.input_names
            if name in kwargs:
                kwargs = kwargs | {name: self.round_input(kwargs[name])}
            else:
                args = (self.round_input(args[0]), *args[1:])
        return super().forward(*args, **kwargs)

    __repr__ = nn.Module.__repr__

    def __reduce_ex__(self, protocol: int) -> Any:
        """Name what the class is made of, as it has no name in a module."""
        return _blank, (self.float_kind, self.like, self.transposed_weight), self.__getstate__()


def _blank(cls: type[nn.Module], like: type[nn.Module], transposed: bool) -> QuantizedLayer:
    kind = own_forward(cls, like, transposed)
    return kind.__new__(kind)


@cache
def own_forward(cls: type[nn.Module], like: type[nn.Module], transposed: bool = False) -> type[QuantizedLayer]:
    """Make the class of quantized layers that replace those of a class and keep its forward.

    like: whose weight its weight is like. transposed: but with the last two dimensions the other way round.
    """
    names = [*signature(cls.forward).parameters]
    content = {
        "__doc__": f"{cls.__name__} with quantized weights.",
        "__module__": __name__,
        "float_kind": cls,
        "like": like,
        "transposed_weight": transposed,
        "input_names": tuple(names[1:2]),
        "layout": staticmethod(_transpose) if transposed else getattr_static(REPLACEMENTS[like], "layout"),
    }
    return type(f"Quant{cls.__name__}", (QuantOwnForward, cls), content)


def _transpose(weight: Tensor, groups: int) -> Tensor:
    return weight.t()


# --- Which layers keep their forward without a promise ----------------------------------------------------------------


def _find(module: nn.Module) -> type[QuantizedLayer] | None:
    cls = type(module)
    if any(f"{each.__module__}.{each.__qualname__}" == _TRANSPOSED for each in cls.__mro__):
        return own_forward(cls, nn.Linear, transposed=True)
    experts = _experts_of(module)
    number = getattr(module, "num_experts", None)
    if not experts or any(parameter.shape[0] != number for parameter in experts.values()):
        return None
    return own_forward(cls, nn.Linear, _inputs_first(module, experts))


def _experts_of(module: nn.Module) -> dict[str, Tensor]:
    """Find the parameters of three dimensions, which hold the weights of experts."""
    return {name: p for name, p in module._parameters.items() if p is not None and _dimensions(p) == 3}


def _dimensions(parameter: Tensor) -> int:
    return 0 if nn.parameter.is_lazy(parameter) else parameter.dim()


def _inputs_first(module: nn.Module, experts: Mapping[str, Tensor]) -> bool:
    """Tell whether each expert's weight is [C, O]: the module says so, or the sizes of two projections do."""
    said = getattr(module, "is_transposed", None)
    if said is not None or not {"gate_up_proj", "down_proj"} <= experts.keys():
        return bool(said)
    return experts["gate_up_proj"].shape[1] == experts["down_proj"].shape[2]


FINDERS.append(_find)
