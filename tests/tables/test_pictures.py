"""Pictures of tables: the distance to float, few curves with names beside them, and drawn again from the pages."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from itertools import pairwise

import command
import pytest
import redraw
import table1
from cells import FLOAT, Cell
from layout import Block, markdown
from matplotlib.axes import Axes
from matplotlib.text import Text
from pictures import COLORS, picture
from results import MARKER, PAGES
from tasks import PERPLEXITY, SIZE, TOP1

VALUES = {  # accuracy by bits, of a curve at each r
    (5, "OCS", 0.0): 89.0, (5, "OCS", 0.1): 90.5, (3, "OCS", 0.0): 40.0, (3, "OCS", 0.1): 75.0,
    (5, "clip", None): 89.5, (3, "clip", None): 80.0, (5, "", 0.0): 1.0, (3, "", 0.0): 1.0,
}  # fmt: skip


def block(metric: object = TOP1, **options: object) -> Block:
    cells, results = [], {(FLOAT.row, FLOAT.column): {"value": 90.0, "low": 89.0, "high": 91.0}}
    for (bits, curve, r), value in VALUES.items():
        axes = {"bits": bits} if r is None else {"bits": bits, "r": r}
        cells.append(Cell(f"{bits} bits", f"{curve} {r}", {}, paper=70.0, axes=axes, curve=curve))
        results[f"{bits} bits", f"{curve} {r}"] = {"value": value}
    return Block("net", "8 images", metric, cells, results, "ResNet-50 on ImageNet", 76.0, **options)


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """What is drawn in a colour, but for the float model's level, point by point."""
    return {
        line.get_color(): [*zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True)]
        for line in axes.lines
        if line.get_color() in COLORS and line.get_fillstyle() == "full"
    }


def test_the_distance_to_float() -> None:
    (axes,) = picture(block(), "Table 0", x="bits").axes
    drawn = lines(axes)
    assert drawn[COLORS[0]] == [(3, 15), (5, -0.5)]  # the best of both ratios
    assert drawn[COLORS[1]] == [(3, 10), (5, 0.5)]
    assert len(drawn) == 2  # a cell without a curve is not drawn
    assert axes.get_xlim()[0] > axes.get_xlim()[1]
    assert axes.get_yscale() == "symlog"
    assert "lost" in axes.get_ylabel()
    names = [text for text in axes.texts if text.get_text() in ("OCS", "clip")]
    assert [text.get_color() for text in names] == [*COLORS[1::-1]]  # from the lower to the higher


def test_a_panel_for_each_value_and_level_lines() -> None:
    panels = picture(block(), "Table 0", x="r", panels="bits").axes
    assert [axes.get_title(loc="left") for axes in panels] == ["5 bits", "3 bits"]
    drawn = lines(panels[1])
    assert drawn[COLORS[0]] == [(0, 50), (0.1, 15)]
    assert drawn[COLORS[1]] == [(0, 10), (1, 10)]  # clipping has no r
    assert list(panels[1].get_xticks()) == [0, 0.1]


def test_perplexity_and_sizes_are_in_percent() -> None:
    (axes,) = picture(block(PERPLEXITY), "", x="bits").axes
    assert lines(axes)[COLORS[1]] == [
        (3, pytest.approx(100 * (80 / 90 - 1))),
        (5, pytest.approx(100 * (89.5 / 90 - 1))),
    ]
    (axes,) = picture(block(SIZE), "", x="bits").axes
    assert axes.get_yscale() == "linear"
    assert lines(axes)[COLORS[1]][0] == (3, 7900)


def test_the_papers_numbers_are_hollow() -> None:
    for same in (False, True):
        (axes,) = picture(block(same=same), "", x="bits").axes
        hollow = [line for line in axes.lines if line.get_fillstyle() == "none"]
        assert len(hollow) == 6 * same
        assert all(line.get_ydata()[0] == 6 for line in hollow)


def test_nothing_to_see() -> None:
    whole = block()
    one = replace(whole, cells=[cell for cell in whole.cells if cell.axes["bits"] == 5])
    assert picture(one, "", x="bits") is None
    without_float = replace(whole, results=whole.results | {(FLOAT.row, FLOAT.column): {"error": "none"}})
    assert picture(without_float, "", x="bits").axes[0].get_ylabel() == "top-1 %"


def test_names_do_not_meet() -> None:
    cells = [
        Cell(f"{bits} bits", str(i), {}, axes={"bits": bits}, curve=f"curve {i}") for i in range(7) for bits in (5, 4)
    ]
    results = {(cell.row, cell.column): {"value": 90.0} for cell in cells} | {
        (FLOAT.row, FLOAT.column): {"value": 90.0}
    }
    figure = picture(Block("net", "", TOP1, cells, results), "", x="bits")
    figure.savefig(io.BytesIO())
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts if text.get_text().startswith("curve")]
    assert len(boxes) == 7
    boxes.sort(key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 for below, above in pairwise(boxes))
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)


# --- From the pages ---------------------------------------------------------------------------------------------------


def test_a_table_is_read_back() -> None:
    args = "--dataset fashion-mnist --bits 5 4 --r 0.05"
    cells = table1.cells(command.parse(table1.TABLE, args.split()), "ResNet-20")
    results = {(cell.row, cell.column): {"value": 80.0 + i} for i, cell in enumerate(cells)}
    results[FLOAT.row, FLOAT.column] = {"value": 90.1, "low": 89.0, "high": 91.5}
    made = Block("ResNet-20", "60 images", TOP1, cells, results, "ResNet-20 on CIFAR-10")
    page = f"{markdown([made])}\n\n`python benchmarks/tables/table1.py {args}`; a machine."
    table, read = redraw.block_of(page)
    assert table is table1.TABLE
    assert (read.name, read.what, read.metric, read.same) == ("ResNet-20", "60 images", TOP1, False)
    assert read.results == results
    assert [cell.curve for cell in read.cells] == [cell.curve for cell in cells]
    assert redraw.block_of("no table") is None


PLACES = [(path, match[2]) for path in PAGES for match in MARKER.finditer(path.read_text()) if ".png)" in match[0]]


@pytest.mark.parametrize(("path", "name"), PLACES, ids=[name for _, name in PLACES])
def test_pictures_of_the_pages_show_few_curves(path: object, name: str) -> None:
    text = next(match[0] for match in MARKER.finditer(path.read_text()) if match[2] == name)
    table, read = redraw.block_of(text)
    found = {cell.curve for cell in read.cells if cell.curve and "value" in read.result(cell)}
    assert 2 <= len(found) <= 5
    assert len(found) <= len(COLORS)
    assert picture(read, table.label, table.x, table.panels) is not None
    assert read.metric is SIZE or read.float_value is not None
    cells = re.findall(r"^\| (?:\d|w|a).*$", text, re.MULTILINE)
    assert len(cells) == len({cell.row for cell in read.cells})


def test_the_command_draws_what_pages_show(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    text = next(match[0] for match in MARKER.finditer(PAGES[0].read_text()) if match[2] == "table5")
    page.write_text(f"text\n{text}\n<!-- other -->\n`a command`\n<!-- /other -->\n")
    monkeypatch.setattr(sys, "argv", ["redraw.py", "--pages", str(page)])
    redraw.main()
    assert [path.name for path in tmp_path.glob("*.png")] == ["table5.png"]
