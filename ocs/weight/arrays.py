"""The two kinds of arrays, numpy's and torch's: their names, and the way from one to the other."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ocs.weight.types import ARRAYS, Array


def dtype_name(x: Array) -> str:
    """Name the dtype of an array or tensor as numpy does."""
    return str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else x.dtype.name


def kind_of(x: Any) -> str:
    """Say what a value is, for an error message."""
    return f"{type(x).__name__} of {x.dtype}" if isinstance(x, ARRAYS) else type(x).__name__


def as_numpy(x: Array) -> np.ndarray:
    """Convert to a numpy array, from whatever device a tensor is on."""
    return x.cpu().numpy() if isinstance(x, Tensor) else x


def as_tensor(x: Array) -> Tensor:
    """Convert to a tensor; a numpy array is copied, as it may be read-only or laid out backwards."""
    return x if isinstance(x, Tensor) else torch.from_numpy(np.array(x, order="C"))


def array_like(values: np.ndarray, like: Array) -> Array:
    """Convert a numpy array to the kind of array that `like` is, on its device."""
    return torch.from_numpy(values).to(like.device) if isinstance(like, Tensor) else values


def filled_like(x: Array, value: float) -> Array:
    """Fill an array of x's kind and shape with one number; see ocs.kernels.composite on why divisors are arrays."""
    return torch.full_like(x, value) if isinstance(x, Tensor) else np.full_like(x, value)
