"""Rewrite one file: imports and attribute chains, and nothing else of it."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field

import libcst as cst
from libcst.metadata import MetadataWrapper

from pennyweight.compat.migrate.analyse import Findings, analyse
from pennyweight.compat.migrate.layout import partition
from pennyweight.compat.migrate.names import chain, dotted
from pennyweight.compat.migrate.rules import moved

Small = cst.BaseSmallStatement
_SPEAKS = re.compile("torch|pennyweight")


@dataclass(frozen=True, order=True)
class Note:
    """A line that was not carried over.

    Args:
        line: its number in the old text.
        now: its number in the new text.
        what: what stands there.
        why: why it cannot be carried over.
        instead: what to write instead.
    """

    line: int
    now: int
    what: str
    why: str
    instead: str


@dataclass
class Result:
    """The new text of a file, and the lines that were not carried over."""

    code: str
    notes: list[Note] = field(default_factory=list)


def rewrite(code: str) -> Result:
    """Rewrite a module's text. Comments and layout stay outside of what changes; a second run changes nothing.

    Raises:
        libcst.ParserSyntaxError: if the text is no Python.
    """
    tree = cst.parse_module(code)
    if not _SPEAKS.search(code):
        return Result(code)  # most files of a folder
    wrapper = MetadataWrapper(tree)
    found = analyse(wrapper, code)
    new = wrapper.module.visit(_Rewriter(found)).code
    lines = _line_map(code, new) if found.notes else {}
    notes = {Note(line, lines[line], what, gone.why, gone.instead) for line, what, gone in found.notes}
    return Result(new, sorted(notes))


def split_lines(text: str) -> list[str]:
    """Lines with their ends, as Python counts them: form feeds and the like are no ends."""
    return re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text)


def _line_map(old: str, new: str) -> dict[int, int]:
    """Where the lines of a text are in its new version."""
    before, after = split_lines(old), split_lines(new)
    places: dict[int, int] = {}
    for _, a, a_end, b, b_end in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        shift = (b_end - b) - (a_end - a)  # what came new stands in front of what it was made of
        for line in range(a, a_end):
            places[line + 1] = max(b, min(line - a + b + max(shift, 0), b_end - 1)) + 1
    return places


class _Rewriter(cst.CSTTransformer):
    """Does what was found; nodes are recognised by identity."""

    def __init__(self, found: Findings) -> None:
        super().__init__()
        self.found = found

    def leave_Attribute(
        self, original_node: cst.Attribute, updated_node: cst.Attribute
    ) -> cst.BaseExpression:
        new = self.found.chains.get(original_node)
        return updated_node if new is None else chain(new, original_node)

    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign | cst.Expr:
        setter = self.found.setters.get(original_node)
        if setter is None:
            return updated_node
        call = cst.Call(chain(setter), [cst.Arg(updated_node.value)])
        return cst.Expr(call, semicolon=updated_node.semicolon)

    def leave_Import(
        self, original_node: cst.Import, updated_node: cst.Import
    ) -> cst.Import | cst.FlattenSentinel[Small]:
        names = []
        for alias in original_node.names:
            instead = self.found.instead.get(alias)
            new = moved(dotted(alias.name) or "")
            if instead is not None:
                names.append(alias.with_changes(name=chain(instead), asname=None))
            else:
                names.append(alias if new is None else alias.with_changes(name=chain(new)))
        made = updated_node.with_changes(names=names)
        before = self._before(original_node)
        return cst.FlattenSentinel([*before, made]) if before else made

    def leave_ImportFrom(
        self, original_node: cst.ImportFrom, updated_node: cst.ImportFrom
    ) -> cst.ImportFrom | cst.FlattenSentinel[Small]:
        made = [updated_node] if original_node.relative else _from(updated_node)
        before = self._before(original_node)
        return cst.FlattenSentinel([*before, *made]) if before or len(made) > 1 else made[0]

    def _before(self, statement: cst.Import | cst.ImportFrom) -> list[cst.Import]:
        """The imports that a changed name needs in front of this one."""
        names = sorted(self.found.before.get(statement, ()))
        return [cst.Import([cst.ImportAlias(chain(name))]) for name in names]

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.BaseStatement | cst.FlattenSentinel[cst.BaseStatement]:
        """One import a line where one became several."""
        if len(original_node.body) != 1 or len(updated_node.body) == 1:
            return updated_node
        lines = [cst.SimpleStatementLine([part]) for part in updated_node.body]
        lines[0] = lines[0].with_changes(leading_lines=updated_node.leading_lines)
        lines[-1] = lines[-1].with_changes(trailing_whitespace=updated_node.trailing_whitespace)
        return cst.FlattenSentinel(lines)


def _from(node: cst.ImportFrom) -> list[cst.ImportFrom]:
    """The import, or the imports, that bring the same names from where they are now."""
    base = dotted(node.module) or ""
    if isinstance(node.names, cst.ImportStar):
        new = moved(base)
        return [node if new is None else node.with_changes(module=chain(new))]
    targets, aliases = [], []
    for alias in node.names:
        name = dotted(alias.name) or ""
        module, _, last = (moved(f"{base}.{name}") or f"{base}.{name}").rpartition(".")
        targets.append(module)
        aliases.append(alias if last == name else _renamed(alias, last))
    if set(targets) == {base}:
        return [node]
    if len(set(targets)) == 1:
        return [node.with_changes(module=chain(targets[0]), names=aliases)]
    return partition(node, targets, aliases)


def _renamed(alias: cst.ImportAlias, name: str) -> cst.ImportAlias:
    """`new as old`, unless there is another name already."""
    asname = alias.asname or cst.AsName(cst.ensure_type(alias.name, cst.Name))
    return alias.with_changes(name=cst.Name(name), asname=asname)
