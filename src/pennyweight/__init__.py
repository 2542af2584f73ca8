"""Pennyweight makes trained PyTorch networks small and fast without making them wrong, and proves it.

    import pennyweight as pw

    quantized = pw.quantize(model, calibration_batches, recipe="int8")
    pw.save(quantized, "model.dwt")
    pw.load("model.dwt").run(images)

Importing this package imports neither torch nor numpy: each public name is fetched when it is first used, so that
`pennyweight.runtime` starts in milliseconds.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> the module that has it; a module stands for itself
_PLACES = {
    **dict.fromkeys(
        ("quantize", "prepare", "calibrate", "convert", "record", "state", "journal"), "pipeline"
    ),
    **dict.fromkeys(("save", "load", "difference"), "storage"),
    "compile": "compiled",
    "synthesize": "synthesis",
    "profile": "profiling",
    **dict.fromkeys(("Recipe", "chain", "presets"), "recipe"),
    **dict.fromkeys(("Rule", "Plan", "Site"), "plan"),
    **dict.fromkeys(("QTensor", "QParams"), "qtensor"),
    "QuantSpec": "spec",
    "Journal": "journal",
    "lower": "program.lower",
    "Program": "program.ir",
    "Tuned": "tune.ristretto",
    **dict.fromkeys(("tune", "Goal", "Tuning", "sensitivity"), "tune"),
    **dict.fromkeys(("diagnose", "Diagnosis"), "diagnose"),
    "report": "report",
    "interpret": "program.interpret",
    "PennyweightError": "errors",
    "Session": "runtime.session",
    "Profile": "runtime.profile",
}
_MODULES = ("errors", "runtime", "exporters", "training", "compat")

if TYPE_CHECKING:
    from pennyweight import compat, errors, exporters, runtime, training
    from pennyweight.compiled import compile  # noqa: A004 (the name that torch gives it)
    from pennyweight.diagnose import Diagnosis, diagnose
    from pennyweight.errors import PennyweightError
    from pennyweight.journal import Journal
    from pennyweight.pipeline import calibrate, convert, journal, prepare, quantize, record, state
    from pennyweight.plan import Plan, Rule, Site
    from pennyweight.profiling import profile
    from pennyweight.program.interpret import interpret
    from pennyweight.program.ir import Program
    from pennyweight.program.lower import lower
    from pennyweight.qtensor import QParams, QTensor
    from pennyweight.recipe import Recipe, chain, presets
    from pennyweight.report import report
    from pennyweight.runtime.profile import Profile
    from pennyweight.runtime.session import Session
    from pennyweight.spec import QuantSpec
    from pennyweight.storage import difference, load, save
    from pennyweight.synthesis import synthesize
    from pennyweight.tune import Goal, Tuned, Tuning, sensitivity, tune

__all__ = [
    "Diagnosis", "Goal", "Journal", "PennyweightError", "Plan", "Profile", "Program", "QParams", "QTensor", "QuantSpec",
    "Recipe", "Rule", "Session", "Site", "Tuned", "Tuning", "calibrate", "chain", "compat", "compile",
    "convert", "diagnose", "difference", "errors", "exporters", "interpret", "journal", "load", "lower", "prepare",
    "presets", "profile",
    "quantize", "record", "report", "runtime", "save", "sensitivity", "state", "synthesize", "training", "tune",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Fetch a public name from its module, once (PEP 562)."""
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"pennyweight.{name}")
    if name not in _PLACES:
        from pennyweight.errors import nearest

        raise AttributeError(f"pennyweight has no {name!r}. {nearest(name, __all__, 'public names')}")
    value = getattr(import_module(f"pennyweight.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


class _Package(ModuleType):
    """This package: importing the submodule `journal` must not hide the public function of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PLACES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
