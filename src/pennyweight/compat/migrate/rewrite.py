"""Rewrite one file: imports and attribute chains, and nothing else of it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider

from pennyweight.compat.migrate.rules import GONE, SUSPECT, moved, reason
from pennyweight.errors import PennyweightError


@dataclass(frozen=True, order=True)
class Note:
    """A line that was not carried over: what stands there, and what to write instead."""

    line: int
    what: str
    instead: str


@dataclass
class Result:
    """The new text of a file, and the lines that were not carried over."""

    code: str
    notes: list[Note] = field(default_factory=list)


def rewrite(code: str) -> Result:
    """Rewrite a module's text. Comments and layout stay; a second run changes nothing.

    Raises:
        ParserSyntaxError of libcst: if the text is no Python.
    """
    wrapper = MetadataWrapper(cst.parse_module(code))
    bound = _Bindings()
    wrapper.visit(bound)
    worker = _Rewriter(bound.names)
    changed = wrapper.visit(worker)
    if worker.wanted or worker.lost_torch:
        changed = changed.with_changes(body=_with_imports(changed, worker))
    quantizes = bound.quantizes
    notes = [n for n in worker.notes if n.instead not in SUSPECT.values() or quantizes]
    return Result(changed.code, sorted(set(notes)))


def dotted(node: cst.BaseExpression | None) -> str | None:
    """`a.b.c` of an attribute chain of names."""
    if isinstance(node, cst.Name):
        return node.value
    if isinstance(node, cst.Attribute):
        inner = dotted(node.value)
        return None if inner is None else f"{inner}.{node.attr.value}"
    return None


def chain(name: str) -> cst.Attribute | cst.Name:
    """The expression of a dotted name."""
    first, *rest = name.split(".")
    node: cst.Attribute | cst.Name = cst.Name(first)
    for part in rest:
        node = cst.Attribute(node, cst.Name(part))
    return node


def module_of(name: str) -> str:
    """The longest part of a dotted name that is a module."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        head = ".".join(parts[:count])
        try:
            if importlib.util.find_spec(head) is not None:
                return head
        except ModuleNotFoundError:
            continue
    return parts[0]


def missing(name: str) -> str | None:
    """Why a dotted name of this package cannot be fetched; None if it can."""
    module = module_of(name)
    rest = name[len(module) + 1 :].split(".")[0]
    if not rest:
        return None
    try:
        getattr(importlib.import_module(module), rest)
    except AttributeError as error:
        return str(error)
    except PennyweightError as error:
        return error.hint or error.what
    return None


class _Bindings(cst.CSTVisitor):
    """Names that imports bind to modules of torch, before anything is rewritten."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.quantizes = False

    def visit_Import(self, node: cst.Import) -> None:
        for alias in node.names:
            full = dotted(alias.name) or ""
            self.quantizes = self.quantizes or moved(full) is not None or "pennyweight.compat" in full
            if alias.asname is not None:
                self.names[dotted(alias.asname.name) or ""] = full
            else:
                self.names[full.split(".")[0]] = full.split(".")[0]

    def visit_ImportFrom(self, node: cst.ImportFrom) -> None:
        base = dotted(node.module)
        if base is None or node.relative or isinstance(node.names, cst.ImportStar):
            self.quantizes = self.quantizes or (base is not None and moved(base) is not None)
            return
        for alias in node.names:
            full = f"{base}.{dotted(alias.name)}"
            self.quantizes = self.quantizes or moved(full) is not None or "pennyweight.compat" in full
            local = alias.asname.name if alias.asname is not None else alias.name
            self.names[dotted(local) or ""] = full

    def visit_Attribute(self, node: cst.Attribute) -> None:
        name = dotted(node)
        self.quantizes = self.quantizes or (name is not None and moved(name) is not None)


class _Rewriter(cst.CSTTransformer):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()
        self.names = names
        self.notes: list[Note] = []
        self.wanted: set[str] = set()
        self.inner: set[int] = set()
        self.importing = 0
        self.lost_torch = False
        self.binds_torch = False
        self.torches: set[int] = set()  # places that say `torch` and stay

    def line(self, node: cst.CSTNode) -> int:
        return int(self.get_metadata(PositionProvider, node).start.line)

    def note(self, node: cst.CSTNode, what: str, instead: str) -> None:
        self.notes.append(Note(self.line(node), what, instead))

    def check(self, node: cst.CSTNode, old: str, new: str) -> None:
        why = missing(new)
        if why is not None:
            self.note(node, old, why)

    # -- imports ----------------------------------------------------------------------------------------------------

    def visit_Import(self, node: cst.Import) -> None:
        self.importing += 1

    def leave_Import(self, original_node: cst.Import, updated_node: cst.Import) -> cst.Import:
        self.importing -= 1
        aliases = []
        for alias in original_node.names:
            old = dotted(alias.name) or ""
            new = moved(old)
            if new is None:
                self.binds_torch = self.binds_torch or (old.split(".")[0] == "torch" and alias.asname is None)
                why = reason(old, GONE)
                if why:
                    self.note(original_node, f"import {old}", why)
                aliases.append(alias)
                continue
            self.check(original_node, f"import {old}", new)
            if alias.asname is None:
                self.lost_torch = self.lost_torch or old.startswith("torch.")
            aliases.append(alias.with_changes(name=chain(new)))
        return updated_node.with_changes(names=aliases)

    def visit_ImportFrom(self, node: cst.ImportFrom) -> None:
        self.importing += 1

    def leave_ImportFrom(
        self, original_node: cst.ImportFrom, updated_node: cst.ImportFrom
    ) -> cst.BaseSmallStatement | cst.FlattenSentinel[cst.BaseSmallStatement]:
        self.importing -= 1
        base = dotted(original_node.module)
        if base is None or original_node.relative:
            return updated_node
        if isinstance(original_node.names, cst.ImportStar):
            new = moved(base)
            return updated_node if new is None else updated_node.with_changes(module=chain(new))
        whole = moved(base)
        stay: list[cst.ImportAlias] = []
        by_module: dict[str, list[cst.ImportAlias]] = {}
        for alias in original_node.names:
            name = dotted(alias.name) or ""
            new = moved(f"{base}.{name}")
            if new is None:
                why = reason(f"{base}.{name}", {**GONE, **SUSPECT})
                if why:
                    self.note(original_node, f"from {base} import {name}", why)
                stay.append(alias)
                continue
            self.check(original_node, f"from {base} import {name}", new)
            by_module.setdefault(new.rpartition(".")[0], []).append(alias)
        if not by_module:
            return updated_node
        if whole is not None and not stay and len(by_module) == 1:
            return updated_node.with_changes(module=chain(whole))
        made = [
            cst.ImportFrom(chain(module), _separated(aliases))
            for module, aliases in sorted(by_module.items())
        ]
        if stay:
            made.append(updated_node.with_changes(names=_separated(stay), lpar=None, rpar=None))
        if len(made) == 1:
            return (
                made[0].with_changes(lpar=updated_node.lpar, rpar=updated_node.rpar)
                if _same(made[0], updated_node)
                else made[0]
            )
        return cst.FlattenSentinel(made)

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.BaseStatement | cst.FlattenSentinel[cst.BaseStatement]:
        """One import a line where one became several."""
        if len(updated_node.body) == len(original_node.body):
            return updated_node
        if not all(isinstance(s, cst.Import | cst.ImportFrom) for s in updated_node.body):
            return updated_node
        lines = [cst.SimpleStatementLine([s.with_changes(semicolon=cst.MaybeSentinel.DEFAULT)])
                 for s in updated_node.body]  # fmt: skip
        lines[0] = lines[0].with_changes(leading_lines=updated_node.leading_lines)
        lines[-1] = lines[-1].with_changes(trailing_whitespace=updated_node.trailing_whitespace)
        return cst.FlattenSentinel(lines)

    # -- attribute chains -------------------------------------------------------------------------------------------

    def visit_Attribute(self, node: cst.Attribute) -> None:
        self.inner.add(id(node.value))
        if id(node) in self.inner or self.importing:
            return
        name = self.full(node)
        if name is None:
            return
        new = moved(name)
        if new is not None:
            self.check(node, dotted(node) or name, new)
            self.wanted.add(module_of(new))
            return
        why = reason(name, {**GONE, **SUSPECT})
        if why:
            self.note(node, dotted(node) or name, why)

    def full(self, node: cst.Attribute) -> str | None:
        """The dotted name of a chain, its first part resolved by the imports; None where these are rewritten."""
        text = dotted(node)
        if text is None:
            return None
        first, _, rest = text.partition(".")
        bound = self.names.get(first)
        if bound is None or (moved(bound) is not None and bound != first):
            return None  # the import itself was rewritten, and the name stays
        return f"{bound}.{rest}"

    def leave_Attribute(
        self, original_node: cst.Attribute, updated_node: cst.Attribute
    ) -> cst.BaseExpression:
        if self.importing:
            return updated_node
        name = self.full(original_node)
        new = None if name is None else _exactly(name)
        if new is not None:
            root: cst.BaseExpression = original_node
            while isinstance(root, cst.Attribute):
                root = root.value
            self.torches.discard(id(root))
            return chain(new).with_changes(lpar=updated_node.lpar, rpar=updated_node.rpar)
        return updated_node

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.BaseExpression:
        if original_node.value == "torch" and not self.importing:
            self.torches.add(id(original_node))
        return updated_node


def _exactly(name: str) -> str | None:
    """The new name of a chain that ends where a moved module does."""
    from pennyweight.compat.migrate.rules import MODULES

    return MODULES.get(name)


def _separated(aliases: Sequence[cst.ImportAlias]) -> list[cst.ImportAlias]:
    return [a.with_changes(comma=cst.MaybeSentinel.DEFAULT) for a in aliases]


def _same(new: cst.ImportFrom, old: cst.ImportFrom) -> bool:
    return not isinstance(old.names, cst.ImportStar) and len(new.names) == len(old.names)  # type: ignore[arg-type]


def _with_imports(module: cst.Module, worker: _Rewriter) -> list[cst.BaseStatement]:
    """The body with the imports that rewritten chains need, in front of the first import of torch."""
    present = {dotted(a.name) for s in _imports(module) if isinstance(s, cst.Import) for a in s.names
               if a.asname is None}  # fmt: skip
    names = sorted(worker.wanted - present)
    if worker.lost_torch and worker.torches and not worker.binds_torch and "torch" not in present:
        names.append("torch")
    body = list(module.body)
    at = next((i for i, line in enumerate(body) if _of_torch(line)), len(body))
    made = [cst.SimpleStatementLine([cst.Import([cst.ImportAlias(chain(n))])]) for n in names]
    if made and at < len(body):
        first = body[at]
        assert isinstance(first, cst.SimpleStatementLine)
        made[0] = made[0].with_changes(leading_lines=first.leading_lines)
        body[at] = first.with_changes(leading_lines=())
    return [*body[:at], *made, *body[at:]]


def _of_torch(line: cst.CSTNode) -> bool:
    """Whether a line of the (rewritten) body imports torch or what stands in for it."""
    names: list[str] = []
    for part in line.body if isinstance(line, cst.SimpleStatementLine) else ():
        if isinstance(part, cst.Import):
            names += [dotted(a.name) or "" for a in part.names]
        elif isinstance(part, cst.ImportFrom):
            names.append(dotted(part.module) or "")
    return any(n.split(".")[0] in ("torch", "torchao", "pennyweight") for n in names)


def _imports(module: cst.Module) -> list[cst.BaseSmallStatement]:
    return [s for line in module.body if isinstance(line, cst.SimpleStatementLine) for s in line.body]
