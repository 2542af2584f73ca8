"""What happened: a list of structured events that every table, JSON file and report is rendered from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pennyweight.errors import PennyweightError


@dataclass(frozen=True, slots=True)
class Event:
    """One fact. `kind` says which ("site", "kept", "range", "error", "size", ...), `site` where, `data` the rest."""

    kind: str
    site: str
    data: dict[str, Any]


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


@dataclass
class Journal:
    """An append-only list of events; values are plain JSON types, so a journal can be stored with the model."""

    events: list[Event] = field(default_factory=list)

    def add(self, kind: str, site: str = "", /, **data: Any) -> None:
        """Append one event. Floats are kept to 6 significant digits: they are facts to read, not to compute with."""
        self.events.append(Event(kind, site, {k: _short(v) for k, v in data.items()}))

    def of(self, kind: str) -> list[Event]:
        """All events of one kind, in order."""
        return [e for e in self.events if e.kind == kind]

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind as table rows, the site first."""
        return [{"site": e.site, **e.data} for e in self.of(kind)]

    def last(self, kind: str, site: str = "") -> Event:
        """The newest event of a kind (at a site, if one is given).

        Raises:
            PennyweightError: if there is none.
        """
        for event in reversed(self.events):
            if event.kind == kind and (not site or event.site == site):
                return event
        raise PennyweightError(f"the journal has no {kind!r} event", site=site)

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)

    def to_json(self) -> str:
        """A JSON array of `[kind, site, data]`."""
        return json.dumps([[e.kind, e.site, e.data] for e in self.events])

    @classmethod
    def from_json(cls, text: str) -> Journal:
        """The inverse of `to_json`."""
        return cls([Event(kind, site, data) for kind, site, data in json.loads(text)])

    def summary(self) -> str:
        """A short text: how much was quantized, what was kept and why, sizes."""
        sites, kept = self.of("site"), self.of("kept")
        lines = [f"{len(sites)} sites quantized, {len(kept)} kept in float"]
        lines += [f"  kept {e.site}: {e.data.get('reason', '')}" for e in kept]
        for event in self.of("size"):
            before, after = event.data["before"], event.data["after"]
            lines.append(f"size {before:,} -> {after:,} bytes ({before / max(after, 1):.2f}x smaller)")
        return "\n".join(lines)
