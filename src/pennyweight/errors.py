"""The exception tree. Every error says what is wrong, where, with which shapes, and what to do instead.

PennyweightError
├── SpecError             a spec text that does not parse, or that a tensor's shape does not fit
├── RegistryError         a name that no registry entry has
├── GraphError            a model that could not be recorded
├── PlanError
│   ├── UnusedRule        a rule that matches nothing
│   ├── NothingQuantized  a plan without a single quantized site
│   └── UnrealisableSite  a site that exists but cannot be given what the rule asks for
├── CalibrationError
│   ├── EmptyCalibration  no batch, or a site that no batch reached
│   └── NonFinite         NaN or infinity, named by batch and site
├── SolverError           a solver that could not find codes
├── RecipeError           a recipe text with unknown keys or values
├── ProgramError
│   ├── VerifyError       a program that breaks its own rules
│   └── LowerError        a model, or one of its calls, that has no whole-graph form
├── InputError            an input of the wrong name, dtype or shape
├── KernelError           no library, no kernel, no such instruction set
└── FormatError           a file that breaks a promise of docs/format.md
"""

from __future__ import annotations

from collections.abc import Iterable


class PennyweightError(Exception):
    """Base of every error raised on purpose.

    Args:
        what: the fact, as a sentence without a full stop.
        site: module path, tensor site, file or op the fact is about.
        spec: text of the spec or option in play.
        shapes: shapes in play, already rendered.
        hint: the nearest valid choice.
    """

    def __init__(
        self, what: str, *, site: str = "", spec: str = "", shapes: str = "", hint: str = ""
    ) -> None:
        self.what, self.site, self.spec, self.shapes, self.hint = what, site, spec, shapes, hint
        parts = [what]
        if site:
            parts.append(f"at {site}")
        if spec:
            parts.append(f"spec {spec}")
        if shapes:
            parts.append(f"shapes {shapes}")
        text = " · ".join(parts)
        super().__init__(f"{text}. {hint}" if hint else text)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.site, self.spec, self.shapes, self.hint))


def _rebuild(
    kind: type[PennyweightError], what: str, site: str, spec: str, shapes: str, hint: str
) -> PennyweightError:
    return kind(what, site=site, spec=spec, shapes=shapes, hint=hint)


class SpecError(PennyweightError):
    """A spec text that does not parse, or that a tensor's shape does not fit."""


class RegistryError(PennyweightError, KeyError):
    """A name that no registry entry has."""

    __str__ = Exception.__str__


class GraphError(PennyweightError):
    """A model that could not be recorded."""


class PlanError(PennyweightError):
    """A plan that cannot be made from the rules."""


class UnusedRule(PlanError):
    """A rule that matches nothing."""


class NothingQuantized(PlanError):
    """A plan without a single quantized site."""


class UnrealisableSite(PlanError):
    """A site that exists but cannot be given what the rule asks for."""


class CalibrationError(PennyweightError):
    """Calibration that cannot give ranges."""


class EmptyCalibration(CalibrationError):
    """No batch, or a site that no batch reached."""


class NonFinite(CalibrationError):
    """NaN or infinity where numbers are needed."""


class SolverError(PennyweightError):
    """A solver that could not find codes."""


class RecipeError(PennyweightError):
    """A recipe text with unknown keys or values."""


class ProgramError(PennyweightError):
    """A program that cannot be made or used."""


class VerifyError(ProgramError):
    """A program that breaks its own rules."""


class LowerError(ProgramError):
    """A model, or one of its calls, that has no whole-graph form."""


class InputError(PennyweightError, ValueError):
    """An input of the wrong name, dtype or shape."""


class KernelError(PennyweightError):
    """No library, no kernel, or no such instruction set."""


class FormatError(PennyweightError):
    """A file that breaks a promise of docs/format.md."""


def nearest(name: str, choices: Iterable[str], what: str = "choices") -> str:
    """A hint that names the closest valid choices.

    >>> nearest("int9", ["int8", "int4"], "grids")
    "Did you mean 'int8'? grids: int4, int8."
    """
    import difflib  # here, not above: the runtime starts in milliseconds, and errors are rare

    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1)
    lead = f"Did you mean {close[0]!r}? " if close else ""
    return f"{lead}{what}: {', '.join(known)}."
