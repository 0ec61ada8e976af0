"""Where in a model, or in what a user gave, an error came from."""

from collections.abc import Iterator
from contextlib import contextmanager


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
