"""The page: one file without a network, whose figures are its JSON's, and which a saved model makes again."""

import json
import re
from html.parser import HTMLParser

import pytest

import pennyweight as pw
from pennyweight.errors import InputError, PennyweightError
from pennyweight.journal import Journal
from pennyweight.report import at, build, content_of, number, render, sections


class Page(HTMLParser):
    """Texts of the elements that name a place in the JSON, table cells, scripts, and everything that refers elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.figures, self.cells, self.scripts, self.links, self.tags = {}, {}, {}, [], []
        self._path = self._table = self._key = self._script = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href") and not v.startswith(("#", "data:"))]
        if "data-path" in values:
            self._path = values["data-path"]
        if tag == "table":
            self._table = values.get("data-table")
        if tag == "tr" and self._table:
            self.cells.setdefault(self._table, []).append({})
        if tag == "td":
            self._key = values.get("data-key")
        if tag == "script":
            self._script = values.get("id", "code")

    def handle_endtag(self, tag):
        if tag in ("span", "b"):
            self._path = None
        if tag == "td":
            self._key = None
        if tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._path:
            self.figures[self._path] = data.strip()
        if self._script:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
        if self._key and data.strip():
            self.cells[self._table][-1][self._key] = data.strip()


@pytest.fixture(scope="module")
def page(reported):
    return Page(reported[1].read_text("utf8"))


def test_it_is_one_small_file_without_a_network(reported, page):
    assert reported[1].stat().st_size < 3_000_000
    assert page.links == []
    text = reported[1].read_text("utf8").replace(page.scripts["code"], "")
    assert "@import" not in text
    assert not re.search(r"url\(\s*['\"]?http", text)


def test_figures_are_those_of_the_json(reported, page):
    content = json.loads(page.scripts["report-data"])
    found = reported[0]
    assert content["summary"]["size"]["quantized"] == found.chosen.bytes
    assert content["summary"]["accuracy"]["metric"] == "top-1, %"
    assert len(page.figures) >= 9
    for path, text in page.figures.items():
        value = at(content, path)
        assert value is not None
        assert float(text.replace(",", "")) == pytest.approx(float(value), abs=0.06, rel=0.01), path
    for table, rows in page.cells.items():
        values = at(content, table)
        assert len(rows) == len(values) + 1  # and the head
        for row, value in zip(rows[1:], values, strict=True):
            for key, text in row.items():
                shown = value[key]
                if isinstance(shown, float | int) and not isinstance(shown, bool):
                    assert float(text.replace(",", "")) == pytest.approx(shown, abs=0.6, rel=0.02), (
                        table,
                        key,
                    )
                else:
                    assert text == number(shown)


def test_everything_is_there(reported, page):
    content = json.loads(page.scripts["report-data"])
    for key in ("layers", "histograms", "sensitivity", "trials", "execution", "findings"):
        assert content[key], key
    assert {h["part"] for h in content["histograms"]} == {"weight", "input"}
    assert sum(t["chosen"] for t in content["trials"]) == 1
    assert {t["number"] for t in content["trials"]} == set(range(len(reported[0].trials)))
    charts = json.loads(page.scripts["report-charts"])
    assert set(charts) == {"front", "histogram", "sensitivity", "execution"}
    assert len(charts["histogram"]["options"]) == len(content["histograms"])
    for option in charts["histogram"]["options"]:
        assert sum(r["count"] for r in option["data"]["rows"]) > 0
        assert len(option["data"]["marks"]) >= 2


def test_a_saved_file_makes_the_same_page(reported, page):
    again = Page(reported[3].read_text("utf8"))
    mine, theirs = (json.loads(p.scripts["report-data"]) for p in (page, again))
    for key in ("summary", "layers", "histograms", "trials", "execution", "findings", "recipe"):
        assert mine[key] == theirs[key], key


def test_names_are_never_markup(reported, page):
    text = reported[1].read_text("utf8")
    assert "&lt;b&gt;body" in text
    assert "<b>body" not in text
    assert "</script><" not in page.scripts["report-data"]
    log = Journal()
    log.add("note", text="</script><script>alert(1)</script>")
    log.add("size", before=4, after=1)
    evil = render(content_of(log, {"title": "<img src=x onerror=alert(1)>"}))
    assert "<script>alert(1)" not in evil
    assert "<img src=x" not in evil


def test_sections_are_left_out_where_there_is_nothing():
    log = Journal()
    log.add("size", before=400, after=100)
    titles = [s.title for s, _ in build(content_of(log, {}))]
    assert titles == ["Before and after"]
    assert len(sections) >= 7


def test_what_cannot_be_reported_is_refused(reported, zoo, tmp_path, monkeypatch):
    from pennyweight.exporters.dwt import write_dwt

    zoo.meta.pop("journal", None)
    write_dwt(zoo, tmp_path / "bare.dwt")
    zoo.meta["journal"] = [["site", "stem:weight", {"spec": "int8n[1,*]"}]]
    with pytest.raises(InputError, match="no journal"):
        pw.report(tmp_path / "bare.dwt", tmp_path / "x.html")
    with pytest.raises(InputError, match="both"):
        pw.report(reported[0].model, tmp_path / "x.html", batches=[])
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    with pytest.raises(PennyweightError, match="not installed"):
        pw.report(reported[0].model, tmp_path / "x.html")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (1.5e-7, "1.50e-07"), (12345.678, "12,345.68"), (True, "yes"), (False, "")],
)
def test_numbers(value, text):
    assert number(value) == text
