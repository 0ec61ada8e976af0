"""Bars: over items, and over a few long steps in which nothing counts."""

from __future__ import annotations

import sys
import threading

import pytest

from ocs import progress


def test_steps_are_named_and_leave_a_whole_line(capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    with progress.steps("export", 2, True) as begin:
        begin("lower")
        begin("write")
    assert threading.active_count() <= before + 1  # tqdm's own watches on
    shown = capsys.readouterr().err
    assert shown.split("\r")[-1].startswith("export: write |")
    assert "| 2/2 " in shown
    assert shown.endswith("\n")


def test_the_bar_of_a_step_is_drawn_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = threading.Event()
    bar = type("Bar", (), {"delay": 0, "refresh": lambda _: drawn.set(), "close": lambda _: None})()
    bar.set_description_str = lambda text, refresh: None
    monkeypatch.setattr(progress, "_bar", lambda asked: lambda **options: bar)
    with progress.steps("export", 1, True) as begin:
        begin("write")
        assert drawn.wait(60)


def test_what_fails_stops_where_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with progress.steps("export", 2, True) as begin:
            begin("lower")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert "| 0/2 " in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_shows_of_what_is_short_or_unseen(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(progress, "DELAY", 1e6)
    with progress.steps("export", 1, None) as begin:
        begin("write")
    assert list(progress.with_progress(range(3), "save", None)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"progress=True needs tqdm: pip install torch-ocs\[progress\]"):
        progress.with_progress([], "save", True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.steps("export", 1, None) as begin:
        begin("write")
