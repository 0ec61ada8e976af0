"""Where in a model, or in what a user gave, an error came from."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def error_context(*context: str) -> Iterator[None]:
    """Put the context (a layer's name, an argument) before the message of a ValueError or TypeError.

    Any other exception, one of a user's own callable for example, keeps its message and gets the context as a note.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(": ".join([*context, str(error)])) from error
    except Exception as error:
        if context:
            error.add_note(f"in {': '.join(context)}")
        raise


def check_order(call: str, model: Any, *others: Any) -> None:
    """Refuse a call whose arguments were given in another order, which `call` shows, or without a module at all."""
    if isinstance(model, nn.Module):
        return
    if any(isinstance(other, nn.Module) for other in others):
        raise TypeError(f"the arguments are in another order: {call}")
    raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")


def check_path(name: str, path: Any) -> None:
    """Refuse an argument that names no file and no folder."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise TypeError(f"{name}={path!r}: give a name, a str or pathlib.Path")
    if not os.fspath(path):
        raise ValueError(f"{name}={path!r}: give a name")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what torch warns of while it exports and compiles from whoever called: nothing that they could change."""
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in _LOGGERS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in loggers.items():
                logger.setLevel(level)


_LOGGERS = ("onnxscript", "onnx_ir", "torch.onnx")
