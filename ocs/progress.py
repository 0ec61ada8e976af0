"""A progress bar for what takes over two seconds, where a terminal looks on and tqdm is installed."""

import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def with_progress(items: Iterable[T], title: str, progress: bool | None, unit: str = "layer") -> Iterable[T]:
    """The items behind a bar: always where progress is True, never where it is False, by itself where it is None."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if progress is False or (progress is None and not terminal):
        return items  # tqdm is not even imported
    try:
        from tqdm.auto import tqdm
    except ImportError:
        if progress:
            raise ImportError("progress=True needs tqdm: pip install torch-ocs[progress]") from None
        return items
    return tqdm(items, title, unit=unit, delay=0 if progress else 2)
