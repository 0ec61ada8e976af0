"""Reads CIFAR-10's own files, pickled or binary, without running what a pickle asks for.

A file holds N images, in the binary form as records of a label byte and 3072 pixel bytes, in the pickled form as a dict
of b"data", uint8 [N, 3072], and b"labels", a list. The pixels are 32 x 32 of red, then of green, then of blue.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

CLASSES = 10
SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 3, 32, 32] and labels int64 [N] of one file; a name that ends in .bin is of the binary form.

    Raises:
        OSError: It cannot be read.
        ValueError: It holds something else; the message says what.
    """
    images, labels = _read_binary(path) if path.suffix == ".bin" else _read_pickle(path)
    if images.shape != (len(labels), PIXELS) or not len(labels):
        raise ValueError(f"data {list(images.shape)} and {len(labels)} labels instead of [N, {PIXELS}] and N")
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise ValueError(f"labels from {labels.min()} to {labels.max()} instead of 0 to {CLASSES - 1}")
    return images.reshape(-1, *SHAPE), labels.astype(np.int64)


def _read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 3072] and labels [N]."""
    data = np.fromfile(path, np.uint8)
    if data.size % (1 + PIXELS):
        raise ValueError(f"{data.size} bytes are no whole number of records of {1 + PIXELS}")
    records = data.reshape(-1, 1 + PIXELS)
    return records[:, 1:], records[:, 0]


def _read_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 3072] and labels [N], of what shape ever."""
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        _, shape, dtype, fortran, data = content[b"data"].state
        labels = np.array(content[b"labels"])
        if dtype.args[0] not in ("u1", b"u1") or labels.ndim != 1 or labels.dtype.kind != "i":
            raise TypeError("not uint8 pixels and a list of integer labels")
        return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C"), labels
    except _UNPICKLING_ERRORS as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


# What a damaged or hostile pickle can end in besides OSError.
_UNPICKLING_ERRORS = (pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, ImportError, LookupError)
_UNPICKLING_ERRORS += (MemoryError, RecursionError, TypeError, ValueError)


class _Described:
    """Stands for a pickled numpy object: keeps what the pickle says of it, for numpy itself would believe that."""

    def __init__(self, *args: object) -> None:
        self.args = args

    def __setstate__(self, state: tuple) -> None:
        self.state = state


_KNOWN = {
    ("numpy", "ndarray"): _Described,
    ("numpy", "dtype"): _Described,
    ("numpy.core.multiarray", "_reconstruct"): _Described,
    ("numpy._core.multiarray", "_reconstruct"): _Described,  # the same since numpy 2
    ("_codecs", "encode"): str.encode,  # Python 3 writes bytes as encoded text; str's method knows text encodings only
}


class _Unpickler(pickle.Unpickler):
    """Knows what the official files are made of: dicts, lists, numbers, bytes and arrays."""

    def find_class(self, module: str, name: str) -> object:
        """The stand-in for one of the known names."""
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of CIFAR-10 does")
        return _KNOWN[module, name]
