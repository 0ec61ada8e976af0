"""Put the tables that the commands have written into the pages in docs/, and their pictures beside them.

A page's text is written by hand; between <!-- table1 --> and <!-- /table1 --> comes build/tables/table1.md. Tables
that have not been made are left as they are, and named. What a page says of a picture to who cannot see it stays.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

import paths

PAGES = [paths.ROOT / "docs" / name for name in ("results.md", "accuracy.md", "integers.md")]
PICTURE = re.compile(r"!\[([^]]*)\]\(([^)]+)\)")
MARKER = re.compile(r"(<!-- ([\w/-]+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)


def fill(page: str, folder: Path, pictures: Path) -> tuple[str, list[str]]:
    """The page with every table that lies in the folder, and the names of those that do not."""
    missing, said = [], {name: text for text, name in PICTURE.findall(page)}

    def table(match: re.Match[str]) -> str:
        name = match[2]
        source = folder / f"{name}.md"
        if not source.exists():
            missing.append(name)
            return match[0]
        text = source.read_text()
        for picture in sorted(source.parent.glob(f"{source.stem}*.png")):
            copy = pictures / picture.relative_to(folder).as_posix().replace("/", "-")
            shutil.copyfile(picture, copy)
            text += f"\n![{said.get(copy.name, name)}]({copy.name})\n"
        return f"{match[1]}\n{text}\n{match[3]}"

    return MARKER.sub(table, page), missing


def main() -> None:
    """Rewrite the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, default=paths.OUT, help="what the commands wrote")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES)
    args = parser.parse_args()
    for path in args.pages:
        page, missing = fill(path.read_text(), args.tables, path.parent)
        path.write_text(page)
        left = f"; left as they were, as they have not been made here: {', '.join(missing)}" if missing else ""
        print(f"written: {paths.shown(path)}{left}")
    if (args.tables / "figure1.png").exists():
        shutil.copyfile(args.tables / "figure1.png", args.pages[0].with_name("figure1.png"))


if __name__ == "__main__":
    main()
