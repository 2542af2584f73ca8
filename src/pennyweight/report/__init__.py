"""One self-contained HTML page of what was done and measured, rendered from the journal. No network, light and dark."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pennyweight.atomic import atomic_write
from pennyweight.errors import InputError, PennyweightError
from pennyweight.journal import Journal
from pennyweight.pipeline import state
from pennyweight.report.blocks import Block, Card, Chart, Picker, Section, Table, sections
from pennyweight.report.content import Content, content_of
from pennyweight.storage import provenance

LIMIT = 3_000_000  # bytes of a page
SNIPPET = "window.vegaEmbed = vegaEmbed;"  # what the bundled libraries give the page


def report(
    source: nn.Module | Journal | str | os.PathLike[str],
    path: str | os.PathLike[str] = "report.html",
    *,
    against: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    metric: str = "score",
    title: str = "",
    threads: int = 0,
    seconds: float = 0.5,
    progress: bool = True,
) -> Path:
    """Write the report of a converted model, a saved file or a journal.

    With `against` and `batches` everything that the page can show is measured first and written into the model's
    journal, so that a file saved afterwards can make the same page again (`pennyweight report model.dwt`). Without
    them the page shows what the journal has.

    Args:
        source: a converted model, the path of a .dwt file, or a journal.
        path: target.
        against: the float model.
        batches: inputs to compare on, some ten to a hundred samples.
        evaluate: quality of a model, for the page's first figure.
        metric: what that gives ("top-1, %").
        title: heading; by default the model's name.
        threads: of the engine; 0 for as many as torch uses now.
        seconds: to time each side for.
        progress: show bars.

    Returns:
        The path.

    Raises:
        InputError: if only one of `against` and `batches` is given, or there is nothing to report.
        PennyweightError: if the libraries that draw are missing.
        OSError: if the file cannot be written.
    """
    if (against is None) != (batches is None):
        raise InputError(
            "a report that measures needs both the float model and batches", hint="against=, batches="
        )
    if against is not None and batches is not None:
        if not isinstance(source, nn.Module):
            raise InputError("only a model can be measured", hint="Pass the converted model, then save it.")
        from pennyweight.report.collect import collect

        collect(
            against, source, batches, evaluate=evaluate, metric=metric, threads=threads, seconds=seconds,
            progress=progress,
        )  # fmt: skip
    journal, facts = _source(source)
    facts = dict(facts) | ({"title": title} if title else {})
    page = render(content_of(journal, facts))
    target = Path(path)
    with atomic_write(target) as file:
        file.write(page.encode())
    return target


def _source(source: nn.Module | Journal | str | os.PathLike[str]) -> tuple[Journal, Mapping[str, Any]]:
    if isinstance(source, Journal):
        return source, {}
    if isinstance(source, nn.Module):
        st = state(source)
        return st.journal, {
            **provenance(source),
            "title": type(getattr(source, "uncompiled", source)).__name__,
        }
    from pennyweight.runtime.session import load

    meta = load(source, backend="reference").program.meta
    journal = Journal.from_json(json.dumps(meta.get("journal", [])))
    if not journal.events:
        raise InputError("this file has no journal to report", site=str(source))
    return journal, {**meta, "title": str(meta.get("model", "")).rpartition(".")[2] or Path(source).stem}


def render(content: Content) -> str:
    """The page.

    Raises:
        PennyweightError: if jinja2, altair or vl-convert are missing, or the page would be over 3 MB.
    """
    try:
        import jinja2
        import vl_convert

        built = build(content)
    except ImportError as error:
        raise PennyweightError(
            f"a report is drawn with {error.name}, which is not installed",
            hint="pip install pennyweight[report]",
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pennyweight.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {"at": at, "number": number}
    charts = {b.name: _payload(b) for _, blocks in built for b in blocks if isinstance(b, Chart | Picker)}
    page = environment.get_template("page.html.j2").render(
        content=content,
        parts=built,
        data=_script(content),
        charts=_script(charts),
        bundle=vl_convert.javascript_bundle(SNIPPET).replace("</script", "<\\/script"),
        longest=longest,
    )
    if len(page.encode()) > LIMIT:
        raise PennyweightError(
            f"the page would have {len(page.encode()):,} bytes", hint="Report fewer layers."
        )
    return page


def build(content: Content) -> list[tuple[Section, list[Block]]]:
    """Sections that have something to show, in order, with their blocks."""
    found = []
    for section in sorted(sections.values(), key=lambda s: s.order):
        blocks = section.build(content)
        if blocks:
            found.append((section, blocks))
    return found


def _payload(block: Chart | Picker) -> dict[str, Any]:
    if isinstance(block, Chart):
        return {"spec": block.spec}
    return {"spec": block.spec, "options": [{"title": t, "data": d} for t, d in block.options]}


def _script(value: Any) -> str:
    """JSON that may stand in a script element."""
    return json.dumps(value).replace("<", "\\u003c").replace("\u2028", "\\u2028")


def at(content: Content, path: str) -> Any:
    """The value under a path of keys joined by points; None where there is none."""
    found: Any = content
    for key in path.split("."):
        if not isinstance(found, Mapping) or key not in found:
            return None
        found = found[key]
    return found


def number(value: Any, digits: int = 2) -> str:
    """A figure as the page shows it.

    >>> number(1234567), number(0.12345, 3), number(None), number("int8")
    ('1,234,567', '0.123', '', 'int8')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        small = value != 0 and abs(value) < 0.5 * 10**-digits
        return f"{value:.2e}" if small else f"{value:,.{digits}f}"
    return str(value)


def longest(rows: list[dict[str, Any]], key: str) -> float:
    """The greatest magnitude in a column, for its bars."""
    return max((abs(float(r[key])) for r in rows if isinstance(r.get(key), int | float)), default=0.0) or 1.0


__all__ = ["Card", "Table", "at", "build", "content_of", "number", "render", "report", "sections"]
