"""Write the pages that follow from the code: docs/options.md from the options of quantize(), docs/c-api.md from ocs.h.

    python docs/generate.py

A test compares what is committed with what this makes.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import ocs
from ocs.plan.options import LayerOptions, ModelOptions, definitions

DOCS = Path(__file__).resolve().parent
HEADER = DOCS.parent / "csrc" / "ocs.h"
ARGUMENT = re.compile(r"^ {8}(\w+): ", re.MULTILINE)
CODE = re.compile(r'(?<![\w`"])(\w+=(?:"[^"]*"|\w+)|"[\w-]+"|\b(?:functional|ocs)\.\w+(?:\.\w+)*)')
SECTION = re.compile(r"/\* --- (.+?) -+ \*/\n")


def of_arguments(docstring: str) -> dict[str, str]:
    """Map each argument that a docstring describes to its description, in one line."""
    section = re.search(r"\n    Args:\n(.*?)\n\n", docstring, re.DOTALL)[1] + "\n"
    pieces = ARGUMENT.split(section)[1:]
    return {name: " ".join(text.split()) for name, text in zip(pieces[::2], pieces[1::2], strict=True)}


def as_markdown(text: str) -> str:
    """Set options, values and calls in a docstring's sentence as code."""
    return CODE.sub(r"`\1`", text)


def options_page() -> str:
    """What each option of quantize() is, from its definition, signature and docstring."""
    defaults = inspect.signature(ocs.quantize).parameters
    described = of_arguments(ocs.quantize.__doc__)
    known = definitions(LayerOptions) | definitions(ModelOptions)
    of_layers = set(definitions(LayerOptions))
    names = [name for name in defaults if name in known]
    rows = [
        f"| [`{name}`](#{name}) | {_default(defaults[name].default, known[name].left_open)} | {known[name].help} |"
        for name in names
    ]
    parts = [
        "# Every option of `ocs.quantize`",
        "One definition (`ocs/plan/options.py`) serves the signature, the checks, `overrides`, the report, a file's"
        " header, the command line and this page, which `python docs/generate.py` writes.",
        "\n".join(["| option | default | |", "| --- | --- | --- |", *rows]),
        "*recipe*: what is left out is the recipe's: [`recipe`](#recipe) says what that is. Options of layers can be"
        " named in `overrides`, too.",
    ]
    for name in names:
        where = "of layers" if name in of_layers else "of the model"
        if known[name].of_input:
            where += ", with `abits`"
        parts.append(f"## `{name}` {{#{name}}}\n\n*An option {where}.* {_sentence(as_markdown(described[name]))}")
    return "\n\n".join(parts) + "\n"


def _default(value: object, left_open: bool) -> str:
    if left_open and value is None:
        return "*recipe*"
    return "`ocs.FIRST_LAYER`" if value is ocs.FIRST_LAYER else f"`{value!r}`".replace("'", '"')


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] if text[0].islower() else text


def c_page() -> str:
    """What ocs.h says, section by section: each declaration after its comment."""
    header = HEADER.read_text()
    opening = re.match(r"/\*(.*?)\*/", header, re.DOTALL)[1]
    pieces = SECTION.split(header)
    parts = [
        "# The C API",
        "All of it is `csrc/ocs.h`; this page is that header, written by `python docs/generate.py`. The kernels need"
        " the C library alone: compile `csrc/*.c` and `csrc/arch/*.c` with `-std=c11 -ffp-contract=off`, and link"
        " with `-lm`.",
        f"```text\n{inspect.cleandoc(opening.replace(chr(10) + ' *', chr(10)))}\n```",
    ]
    parts += ["## Limits and statuses", _declarations(pieces[0])]
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        parts += [f"## {title}", _declarations(body)]
    return "\n\n".join(parts) + "\n"


def _declarations(text: str) -> str:
    """The declarations of a section as code, each with its comment."""
    body = re.sub(r"^/\*.*?\*/\n#ifndef.*?extern \"C\" \{\n#endif\n", "", text, count=1, flags=re.DOTALL)
    body = body.split("#ifdef __cplusplus\n}")[0]
    return f"```c\n{body.strip()}\n```"


PAGES = {"options.md": options_page, "c-api.md": c_page}


def main() -> None:
    """Write the pages."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
        print(f"written: docs/{name}")


if __name__ == "__main__":
    main()
