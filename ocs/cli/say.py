"""What a command says: its result, notes beside it, and that it was called wrongly."""

import sys
from dataclasses import dataclass, field
from typing import Any


class UsageError(ValueError):
    """The command line was wrong: exit code 2."""


@dataclass(frozen=True)
class Result:
    """What a command found, for people and as plain values for --json."""

    text: str
    values: dict[str, Any]


@dataclass
class Notes:
    """What a user should know beside the result: one line each on stderr, and all of them in the JSON."""

    lines: list[str] = field(default_factory=list)
    shown: bool = True

    def add(self, line: str) -> None:
        """Say it, once."""
        if self.shown and line not in self.lines:
            self.lines.append(line)
            print(f"ocs: note: {line}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """Write an error and its notes in one line of at most 600 characters."""
    notes = [f"({note})" for note in getattr(error, "__notes__", ())]
    kind = [] if isinstance(error, ValueError | TypeError | OSError | ImportError) else [type(error).__name__ + ":"]
    text = " ".join(" ".join([*kind, _message(error), *notes]).split())
    return text if len(text) <= 600 else f"{text[:590]} ... (--debug shows all)"


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
