"""A progress bar for what takes over two seconds, where a terminal looks on and tqdm is installed."""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
DELAY = 2.0  # seconds before a bar shows that nobody asked for
TICK = 0.5  # seconds after which the time of a step is drawn again


def with_progress(items: Iterable[T], title: str, progress: bool | None, unit: str = "layer") -> Iterable[T]:
    """The items behind a bar: always where progress is True, never where it is False, by itself where it is None."""
    bar = _bar(progress)
    return items if bar is None else bar(items, title, unit=unit, delay=0 if progress else DELAY)


@contextmanager
def steps(title: str, count: int, progress: bool | None) -> Iterator[Callable[[str], None]]:
    """Yield what names the step that begins, of so many in which nothing counts: the bar's clock ticks."""
    make = _bar(progress)
    if make is None:
        yield lambda name: None
        return
    bar, over = make(total=count, desc=title, delay=0 if progress else DELAY, bar_format=_STEPS), threading.Event()
    ticking = threading.Thread(target=_tick, args=(bar, over), daemon=True)
    begun = -1

    def begin(name: str) -> None:
        nonlocal begun
        begun += 1
        bar.n = begun
        bar.set_description_str(f"{title}: {name}", refresh=False)

    try:
        ticking.start()
        yield begin
        bar.n = count
    finally:
        over.set()
        if ticking.ident is not None:
            ticking.join()
        bar.close()


_STEPS = "{desc} |{bar:20}| {n_fmt}/{total_fmt} {elapsed}"


def _tick(bar: Any, over: threading.Event) -> None:
    """Draw a bar again and again until it is over."""
    wait = bar.delay
    while not over.wait(wait):
        bar.refresh()
        bar.delay, wait = 0, TICK  # it shows, so that close() leaves a whole line


def _bar(progress: bool | None) -> Any:
    """Give tqdm where a bar is wanted, else None: then it is not even imported."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if progress is False or (progress is None and not terminal):
        return None
    try:
        from tqdm.auto import tqdm
    except ImportError:
        if progress:
            raise ImportError("progress=True needs tqdm: pip install torch-ocs[progress]") from None
        return None
    return tqdm
