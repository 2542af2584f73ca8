"""Dotted names: as expressions, and as what this package has under them."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from functools import cache
from types import ModuleType

import libcst as cst

from pennyweight.compat.migrate.rules import Gone, instead_of
from pennyweight.errors import PennyweightError


def dotted(node: cst.CSTNode | None) -> str | None:
    """`a.b.c` of an attribute chain of names; None of anything else."""
    if isinstance(node, cst.Name):
        return node.value
    if isinstance(node, cst.Attribute):
        inner = dotted(node.value)
        return None if inner is None else f"{inner}.{node.attr.value}"
    return None


def chain(name: str, like: cst.BaseExpression | None = None) -> cst.Attribute | cst.Name:
    """The expression of a dotted name; the last dots and the parentheses are laid out as in another chain."""
    dots: list[cst.Dot] = []
    inner = like
    while isinstance(inner, cst.Attribute):
        dots.append(inner.dot)
        inner = inner.value
    first, *rest = name.split(".")
    node: cst.Attribute | cst.Name = cst.Name(first)
    for place, part in enumerate(rest):
        behind = len(rest) - 1 - place
        node = cst.Attribute(node, cst.Name(part), dot=dots[behind] if behind < len(dots) else cst.Dot())
    return node if like is None else node.with_changes(lpar=like.lpar, rpar=like.rpar)


@cache
def module_of(name: str) -> str:
    """The longest part of a dotted name that is a module, and no function that hides the module of its name.

    >>> module_of("pennyweight.compat.quantization.quantize_fx.prepare_fx")
    'pennyweight.compat.quantization.quantize_fx'
    >>> module_of("pennyweight.compat.quantization.fuse_modules")
    'pennyweight.compat.quantization'
    """
    head, _, rest = name.partition(".")
    while rest:
        part, _, behind = rest.partition(".")
        if importlib.util.find_spec(f"{head}.{part}") is None:
            return head
        here = vars(importlib.import_module(head)).get(part)
        if here is not None and not isinstance(here, ModuleType):
            return head
        head, rest = f"{head}.{part}", behind
        if not hasattr(importlib.import_module(head), "__path__"):
            return head  # a module without submodules
    return head


@cache
def missing(new: str, old: str) -> Gone | None:
    """Why a dotted name of this package cannot be fetched, and what to write instead; None if it can.

    Args:
        new: the name as it would be here.
        old: the name as it was.
    """
    module = module_of(new)
    rest = new[len(module) + 1 :].split(".")[0]
    if not rest:
        return None
    found = importlib.import_module(module)
    try:
        getattr(found, rest)
    except PennyweightError as error:
        return Gone(error.what, error.hint or instead_of(old))
    except AttributeError:
        public = [n for n in dir(found) if not n.startswith("_")]
        close = difflib.get_close_matches(rest, public, n=1, cutoff=0.85)
        why = f"{module} has no {rest!r}"
        return Gone(why, f"The nearest name there is {close[0]!r}." if close else instead_of(old))
    return None
