"""Pages of reports and comparisons in a real browser: they render, sort, open, and load and run nothing else."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from screenshot import Browser, chromium
from torch import nn

import ocs

NASTY = ['<script>document.title = "run"</script>', "<img src=x onerror=\"document.title='run'\">", '"><b>&amp;']


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests of this file."""
    if chromium() is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report with its comparison, and the comparison alone, of layers with hostile names and long ones."""
    torch.manual_seed(0)
    names = [*NASTY, "a" * 70, *(f"layer_{i}" for i in range(12))]
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(96, 20))
    for name in names:
        layer = nn.Linear(20, 20)
        with torch.no_grad():
            layer.weight[:, 3] *= torch.rand(()) * 20
        model.add_module(name.replace(".", "_"), layer)
    float_model = copy.deepcopy(model)
    report = ocs.quantize(
        model, wbits=4, r=0.1, explain=True, overrides={"layer_3": {"wbits": 2}, "layer_5": {"wbits": 8}}
    )
    comparison = ocs.compare(float_model, model, torch.randn(5, 3, 6, 6))
    folder = tmp_path_factory.mktemp("pages")
    found = {name: folder / f"{name}.html" for name in ("report", "comparison", "notebook")}
    report.save(found["report"], comparison=comparison)
    comparison.save(found["comparison"])
    found["everything"] = folder / "everything.html"
    x = torch.randn(5, 3, 6, 6)
    ocs.quantize(float_model, wbits=4, r=0.1, recipe="best", abits=8, calibration=[x]).save(found["everything"])
    jupyter = "<style>:not(.x).jp-RenderedHTMLCommon td { text-align: right }</style>"
    jupyter += "<div class=jp-RenderedHTMLCommon>"
    pieces = f"{jupyter}<p>one</p>{report._repr_html_()}<p>two</p>{comparison._repr_html_()}{report._repr_html_()}"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    found["notebook"].write_text(f"<!doctype html>{head}{pieces}", encoding="utf-8")
    return found


@pytest.fixture(autouse=True)
def no_problems(browser: Browser) -> Iterator[None]:
    """Nothing is said to the console, no dialog opened, nothing loaded, no name run."""
    browser.problems.clear()
    yield
    assert browser.problems == []
    assert browser.run("document.title") != "run"


LAYERS = "[...document.querySelectorAll('table')].at(-1)"


def column(browser: Browser, name: str) -> list[str]:
    """What stands in a column of the last table, row by row."""
    place = f"[...{LAYERS}.tHead.rows[0].cells].findIndex(c => c.textContent.startsWith('{name}'))"
    return browser.run(f"(i => [...{LAYERS}.tBodies].map(b => b.rows[0].cells[i].textContent))({place})")


def numbers(texts: list[str]) -> list[float]:
    return [float(text.split()[0]) for text in texts if text]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1100])
@pytest.mark.parametrize("name", ["report", "comparison", "notebook"])
def test_it_fits_the_window(browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool) -> None:
    browser.open(pages[name], width, dark=dark)
    assert browser.run("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    colors = browser.run("(s => [s.color, s.backgroundColor])(getComputedStyle(document.querySelector('.ocs-report')))")
    ink, paper = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in colors)
    assert (ink > paper) == dark
    assert abs(ink - paper) > 500


@pytest.mark.parametrize("width", [320, 660, 900, 1024, 1100, 1280, 1920])
def test_no_column_is_beyond_the_window(browser: Browser, pages: dict[str, Path], width: int) -> None:
    """Those that have no room stand in the row that opens."""
    for name in ("everything", "report"):
        browser.open(pages[name], width)
        assert browser.run("document.documentElement.scrollWidth") == width
    browser.open(pages["everything"], width)
    browser.click("tbody:nth-of-type(3) td.name summary")
    shown = (
        "[...document.querySelectorAll('tbody:nth-of-type(3) dt')].filter(e => e.offsetParent).map(e => e.innerText)"
    )
    heads = "[...document.querySelectorAll('th')].filter(e => e.offsetParent).map(e => e.innerText.trim())"
    both = [*browser.run(shown), *browser.run(heads)]
    assert {"kind", "shape", "channels+copies", "clipped at", "outputs dB", "size", "input"} <= {*both}
    assert len(both) == len({*both})


def test_names_are_text(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["report"])
    assert [name.replace(".", "_") for name in NASTY] == [name for name in column(browser, "layer") if "<" in name]
    assert browser.run("document.querySelectorAll('script, img, b.x').length") == 1


def test_a_click_sorts_and_another_turns_it_around(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["report"])
    before = column(browser, "layer")
    place = browser.run(f"[...{LAYERS}.tHead.rows[0].cells].findIndex(c => c.textContent.startsWith('SQNR')) + 1")
    browser.run(f"{LAYERS}.id = 'layers'")
    browser.click(f"#layers th:nth-child({place}) button")
    ratios = column(browser, "SQNR")
    assert numbers(ratios) == sorted(numbers(ratios))
    assert len(numbers(ratios)) == 17
    assert ratios[-1] == ""  # what stays float comes last
    assert browser.run(f"{LAYERS}.tHead.rows[0].cells[{place - 1}].ariaSort") == "ascending"
    browser.click(f"#layers th:nth-child({place}) button")
    ratios = column(browser, "SQNR")
    assert numbers(ratios) == sorted(numbers(ratios), reverse=True)
    assert ratios[-1] == ""
    assert browser.run("document.querySelectorAll('[aria-sort]').length") == 1
    assert sorted(column(browser, "layer")) == sorted(before)


def test_sizes_and_numbers_in_names_sort_as_numbers(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["report"])
    browser.run(f"{LAYERS}.id = 'layers'")
    browser.click("#layers th:nth-child(1) button")
    names = [name for name in column(browser, "layer") if name.startswith("layer_")]
    assert names == [f"layer_{i}" for i in range(12)]
    browser.click("#layers th:last-child button")
    sizes = [float(n) * {"B": 1, "KB": 1000}[unit] for n, unit in map(str.split, column(browser, "size"))]
    assert sizes == sorted(sizes)


def test_the_keyboard_alone(browser: Browser, pages: dict[str, Path]) -> None:
    """Tab reaches what can be done, the focus is seen, Enter and Space do it."""
    browser.open(pages["report"])
    browser.run(f"{LAYERS}.id = 'layers'")
    at = "document.activeElement"
    for _ in range(60):
        browser.press("Tab")
        if browser.run(f"{at}.closest('#layers th') && {at}.textContent.startsWith('SQNR')"):
            break
    assert browser.run(f"{at}.tagName") == "BUTTON"
    assert browser.run(f"getComputedStyle({at}).outlineStyle") == "solid"
    browser.press("Enter")
    assert numbers(column(browser, "SQNR")) == sorted(numbers(column(browser, "SQNR")))
    browser.press("Space")
    assert numbers(column(browser, "SQNR")) == sorted(numbers(column(browser, "SQNR")), reverse=True)
    while browser.run(f"{at}.tagName") != "SUMMARY":
        browser.press("Tab")
    shown = "document.querySelector('#layers tr.more').offsetHeight > 0"
    assert browser.run(shown) is False
    browser.press("Enter")
    assert browser.run(shown) is True


@pytest.mark.parametrize("scripts", [True, False])
def test_a_layer_opens_to_its_histograms(browser: Browser, pages: dict[str, Path], scripts: bool) -> None:
    browser.open(pages["report"], scripts=scripts)
    more = "tbody:has(details[open]) tr.more"
    selector = "table:last-of-type tbody:nth-of-type(2) summary"
    browser.run("[...document.querySelectorAll('table')].slice(0, -1).forEach(t => t.closest('details').remove())")
    browser.click(selector)
    assert browser.run(f"document.querySelectorAll('{more} svg path.counts').length") == 2
    assert "split channels" in browser.run(f"document.querySelector('{more}').textContent")
    assert browser.run(f"document.querySelector('{more} svg').getBoundingClientRect().height") > 100


def test_several_pieces_sort_alone(browser: Browser, pages: dict[str, Path]) -> None:
    """As in a notebook: each has its own table, and no button twice."""
    browser.open(pages["notebook"])
    first = "[...document.querySelectorAll('table')][0]"
    before = browser.run(f"{first}.textContent")
    browser.run(f"{LAYERS}.id = 'layers'")
    browser.click("#layers th:nth-child(1) button")
    assert browser.run(f"{first}.textContent") == before
    assert browser.run("[...document.querySelectorAll('th')].every(h => h.querySelectorAll('button').length == 1)")
    assert browser.run("[...document.querySelectorAll('td')].every(c => getComputedStyle(c).textAlign == 'left')")


def test_without_a_browser(pages: dict[str, Path]) -> None:
    """Whatever a page would load has an address; and of a name no tag is left."""
    for path in pages.values():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|<iframe", text)
        assert not any(name in text for name in NASTY)
