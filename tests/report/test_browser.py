"""The page in headless Chromium: no errors, no empty chart, light and dark, wide and narrow."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

_spec = importlib.util.spec_from_file_location("report_browser", Path(__file__).with_name("browser.py"))
chromium = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = chromium
_spec.loader.exec_module(chromium)

pytestmark = pytest.mark.skipif(
    chromium.browser() is None, reason="there is no Chromium: apt-get install chromium, or set CHROMIUM"
)


@pytest.fixture(scope="module")
def document(reported):
    return chromium.dom(reported[1])


def test_it_opens_without_errors(document):
    body = next(b for b in re.findall(r"<body[^>]*>", document) if "data-errors" in b)
    assert 'data-errors="0"' in body, body
    assert 'data-charts="done"' in body, body


def test_every_chart_has_marks(document, reported):
    source = reported[1].read_text("utf8")
    names = json.loads(re.search(r'id="report-charts">(.*?)</script>', source, re.S).group(1))
    assert len(names) >= 4
    for name in names:
        start = document.index(f'id="chart-{name}"')
        drawn = document[start : document.index("</svg>", start)]
        marks = re.findall(r'class="mark-(rect|symbol|line|rule)[^"]*"', drawn)
        paths = re.findall(r'<path aria-label="[^"]+"[^>]*\bd="[^"]{6,}"', drawn)
        assert marks, name
        assert len(paths) >= 2, (name, len(paths))


def test_figures_survive_the_scripts(document, reported):
    source = reported[1].read_text("utf8")
    shown = dict(re.findall(r'data-path="([^"]+)">([^<]*)<', document))
    written = dict(re.findall(r'data-path="([^"]+)">([^<]*)<', source))
    assert shown == written


def test_light_dark_and_narrow(reported, tmp_path):
    pictures = {}
    for name, width, dark in (("light", 1000, False), ("dark", 1000, True), ("phone", 500, False)):
        target = tmp_path / f"{name}.png"
        chromium.picture(reported[1], target, width, 900, dark=dark)
        with Image.open(target) as image:
            pictures[name] = np.asarray(image.convert("L"), dtype=np.float32)
    assert pictures["light"].mean() > 180
    assert pictures["dark"].mean() < 80
    assert pictures["phone"].shape[1] == 500
    assert min(p.std() for p in pictures.values()) > 5  # something is drawn
    phone = chromium.dom(reported[1], "--window-size=500,900")
    assert 'data-errors="0"' in phone
