"""A cause that was found, and the registry of those that are looked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pennyweight.diagnose.simulate import Simulation
from pennyweight.registry import Registry


@dataclass
class Finding:
    """One cause at one place.

    Attributes:
        cause: name of the cause.
        site: where.
        what: the fact, with its figures.
        remedy: what to do.
        trial: makes the change in a simulation and returns the output's SQNR in dB with it; None where a change cannot
            be simulated.
        severity: orders findings whose gain is the same, and says whom to try first.
        gain_db: how much closer to float the output comes; None where it was not tried.
        gain_us: microseconds that a run becomes shorter, measured; of causes that cost time.
        broad: whether the remedy changes the whole model: others are preferred where they gain as much.
    """

    cause: str
    site: str
    what: str
    remedy: str
    trial: Callable[[Simulation], float] | None = None
    severity: float = 0.0
    gain_db: float | None = None
    gain_us: float | None = None
    broad: bool = False
    timing: Callable[[Simulation], float] | None = None

    def row(self) -> dict[str, Any]:
        """As a table row and for JSON."""
        found: dict[str, Any] = {
            "cause": self.cause,
            "site": self.site,
            "what": self.what,
            "remedy": self.remedy,
        }
        found["gain_db"] = None if self.gain_db is None else round(self.gain_db, 2)
        found["gain_us"] = None if self.gain_us is None else round(self.gain_us, 2)
        return found


def in_float(layer: str) -> Callable[[Simulation], float]:
    """A trial: the output with this layer in float."""

    def trial(simulation: Simulation) -> float:
        with simulation.changed(floats=[layer]):
            return simulation.damage().sqnr_db

    return trial


@dataclass(frozen=True)
class Case:
    """What causes look at.

    Attributes:
        simulation: the model taken apart.
        target: what will run it, "native" or "no-vnni".
    """

    simulation: Simulation
    target: str = "native"
    notes: list[str] = field(default_factory=list)


Cause = Callable[[Case], list[Finding]]
causes: Registry[Cause] = Registry("causes", "pennyweight.diagnose.faults")
