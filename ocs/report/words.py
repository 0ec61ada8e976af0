"""Numbers as people read them: sizes, shares, decibels, plurals."""

import math

LARGEST_DB = 120  # that charts show: beyond it is float rounding


def plural(count: int, word: str) -> str:
    """Put a word in the plural but for one thing."""
    if count == 1:
        return word
    return f"{word}es" if word.endswith("ch") else f"{word}s"


def counted(count: int, word: str) -> str:
    """Say how many of a thing there are."""
    return f"{count} {plural(count, word)}"


def size(count: int) -> str:
    """Write so many bytes with three digits or so, and their unit."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def percent(share: float) -> str:
    """Write a share in percent, rounded down: 100 % is all."""
    return f"{math.floor(100 * share)} %" if share >= 0.01 or not share else "less than 1 %"


def fine_percent(share: float) -> str:
    """Write a share in percent with two decimals, rounded down: 100 % is all."""
    return f"{math.floor(1e4 * share) / 100:g} %"


def decibels(db: float) -> str:
    """Write a signal-to-noise ratio without its unit."""
    if math.isfinite(db):
        return f"{db:.1f}"
    return "NaN" if math.isnan(db) else "exact" if db > 0 else "lost"


def in_decibels(db: float) -> str:
    """Write a signal-to-noise ratio with its unit, where it has one."""
    return f"{decibels(db)} dB" if math.isfinite(db) else decibels(db)


def printable(name: str) -> str:
    """Write a name in one line, whatever is in it."""
    return name if name.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def clip_method(clip: str | float) -> str:
    """Name a clip method."""
    return clip if isinstance(clip, str) else f"{clip:g} of max"


def span(values: list[float]) -> str:
    """Write the range of some ratios in dB, one where all read alike."""
    first, last = decibels(min(values)), decibels(max(values))
    return first if first == last else f"{first} to {last}"
