"""The site is built without a warning (links, anchors, pages left out), and nothing of it is loaded from elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from screenshot import Browser, chromium

pytest.importorskip("mkdocs")

ROOT = Path(__file__).resolve().parents[2]
LOADED = re.compile(
    r"<(?:script|img|iframe|source|link(?= [^>]*(?:stylesheet|icon|preload)))\b[^>]*?(?:src|href)=[\"']?([^\"' >]+)"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_every_page_is_there_and_loads_nothing_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= 15
    for page in pages:
        loaded = LOADED.findall(page.read_text())
        assert loaded
        for address in loaded:
            assert not re.match(r"(\w+:)?//", address), f"{page.relative_to(site)} loads {address}"


def test_pictures_say_what_they_show(site):
    pictures = [tag for page in site.rglob("*.html") for tag in re.findall(r"<img\b[^>]*>", page.read_text())]
    assert len(pictures) >= 15
    for picture in pictures:
        alt = re.search(r'alt="([^"]*)"', picture)[1]
        assert len(alt) > 100, picture


def test_equations_are_mathml(site):
    page = (site / "how-it-works" / "index.html").read_text()
    assert page.count("<math") == 4
    assert r"\frac" not in page


@pytest.mark.skipif(chromium() is None, reason="needs Chromium: apt-get install chromium")
def test_pages_are_as_dark_as_the_system_and_fit_a_phone(site):
    with Browser() as browser:
        for page in ("index.html", "choosing/index.html"):  # the second after the first, which remembers
            brightness = []
            for dark in (False, True):
                browser.open(site / page, 390, dark=dark)
                color = browser.run("getComputedStyle(document.body).backgroundColor")
                brightness.append(max(map(int, re.findall(r"\d+", color))))
                assert browser.run("document.documentElement.scrollWidth <= innerWidth")
            assert brightness[0] > 200
            assert brightness[1] < 60
        assert browser.problems == []
