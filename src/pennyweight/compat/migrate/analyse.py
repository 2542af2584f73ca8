"""Read one file: what its names stand for, which of them moved, and which lines cannot be carried over.

Names are resolved by scope, so that a parameter called `torch` stays what it is, and an import inside of a function
serves that function. Nothing is changed here; `rewrite` does what is found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import libcst as cst
from libcst.metadata import (
    Assignment,
    ClassScope,
    ImportAssignment,
    MetadataWrapper,
    ParentNodeProvider,
    PositionProvider,
    Scope,
    ScopeProvider,
)

from pennyweight.compat.migrate.names import dotted, missing, module_of
from pennyweight.compat.migrate.rules import (
    GONE,
    LOWERING,
    METHODS,
    MODULES,
    PACKAGES,
    SETTERS,
    SUSPECT,
    Gone,
    gone,
    moved,
    root_of,
)

_NEW = "pennyweight.compat"
_OLD_TEXT = re.compile(r"\b(?:torch|torchao|executorch)(?:\.\w+)+")
Statement = cst.Import | cst.ImportFrom


@dataclass(frozen=True)
class Binding:
    """A name that an import makes: the statement, its part, and the dotted name that it stands for."""

    statement: Statement
    alias: cst.ImportAlias
    full: str
    scope: Scope

    @property
    def is_root(self) -> bool:
        """Whether this is `import a.b`, which binds `a`."""
        return isinstance(self.statement, cst.Import) and self.alias.asname is None

    @property
    def moves(self) -> bool:
        """Whether the import itself is rewritten."""
        return moved(dotted(self.alias.name) or "" if self.is_root else self.full) is not None


@dataclass
class Findings:
    """What is to be done to a file, by the nodes of its tree."""

    chains: dict[cst.CSTNode, str] = field(default_factory=dict)
    setters: dict[cst.CSTNode, str] = field(default_factory=dict)
    before: dict[Statement, set[str]] = field(default_factory=dict)  # modules to import in front of an import
    instead: dict[cst.ImportAlias, str] = field(
        default_factory=dict
    )  # of a package that may no longer be there
    notes: list[tuple[int, str, Gone]] = field(default_factory=list)


class _Analysis(cst.CSTVisitor):
    """Fills `Findings`."""

    METADATA_DEPENDENCIES = (PositionProvider, ScopeProvider, ParentNodeProvider)

    def __init__(self, code: str) -> None:
        super().__init__()
        self.found = Findings()
        self.inductor = "inductor" in code.lower()
        self.quantizes = False
        self.suspects: list[tuple[int, str, Gone]] = []
        self.imported: list[tuple[Statement, str]] = []  # `import a.b.c` as it will stand
        self.needs: list[tuple[str, Binding, cst.CSTNode]] = []
        self.stays: list[tuple[cst.CSTNode, str, Scope]] = []  # uses of the first name of a chain that stays

    # -- imports ----------------------------------------------------------------------------------------------------

    def visit_Import(self, node: cst.Import) -> bool:
        for alias in node.names:
            old = dotted(alias.name) or ""
            new = self._judge(node, old, f"import {old}")
            if alias.asname is None:
                self.imported.append((node, new or old))
        return False

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        base = dotted(node.module)
        if base is None or node.relative:
            return False
        if isinstance(node.names, cst.ImportStar):
            self._judge(node, base, f"from {base} import *")
            return False
        for alias in node.names:
            name = dotted(alias.name) or ""
            self._judge(node, f"{base}.{name}", f"from {base} import {name}")
        return False

    def _judge(self, node: cst.CSTNode, old: str, what: str) -> str | None:
        """Note what is wrong with a name; returns the new one."""
        new = moved(old)
        now = new or old
        if now == _NEW or now.startswith(f"{_NEW}."):
            self.quantizes = True
            self._note(node, what, missing(now, old))
            return new
        self._note(node, what, gone(old, GONE))
        suspect = gone(old, SUSPECT, LOWERING) if self.inductor else gone(old, SUSPECT)
        if suspect is not None:
            self.suspects.append((self._line(node), what, suspect))
        return None

    # -- uses -------------------------------------------------------------------------------------------------------

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        if dotted(node) is not None:
            self._use(node)
        else:
            self._method(node)
            node.value.visit(self)
        return False

    def visit_Name(self, node: cst.Name) -> bool:
        parent = self.get_metadata(ParentNodeProvider, node)
        if not isinstance(parent, cst.FunctionDef | cst.ClassDef) or parent.name is not node:
            self._use(node)
        return False

    def visit_Arg(self, node: cst.Arg) -> bool:
        node.value.visit(self)  # a keyword is no use of a name
        return False

    def visit_Param(self, node: cst.Param) -> bool:
        for part in (node.annotation, node.default):
            if part is not None:
                part.visit(self)
        return False

    def visit_NameItem(self, node: cst.NameItem) -> bool:
        return False

    def visit_SimpleString(self, node: cst.SimpleString) -> bool:
        """Modules imported by name, patched by name, annotations in quotes: named, since a text may mean anything."""
        text = node.evaluated_value
        if isinstance(text, str) and (match := _OLD_TEXT.search(text)) and _is_expression(text):
            new = moved(match[0])
            if new is not None:
                self._note(
                    node,
                    node.value,
                    Gone("a text is not rewritten", f"Write {new!r} if it names the module."),
                )
        return False

    def _use(self, node: cst.Attribute | cst.Name) -> None:
        """Resolve a chain by the imports that its first name comes from."""
        text = dotted(node) or ""
        first, _, rest = text.partition(".")
        scope = self.get_metadata(ScopeProvider, node, None)
        bindings = [] if scope is None else self._bindings(scope, first)
        while isinstance(scope, ClassScope) and all(
            self._place(b.alias) > self._place(node) for b in bindings
        ):
            scope = scope.parent  # a class's body sees the name outside until it binds its own
            bindings = self._bindings(scope, first)
        if not bindings:
            self._method(node)
            return
        assert scope is not None
        for old in sorted({f"{b.full}.{rest}" if rest else b.full for b in bindings}):
            bound = [b for b in bindings if (f"{b.full}.{rest}" if rest else b.full) == old]
            assign = self._assignment(node)
            if assign is not None and old in SETTERS:
                self.quantizes = True
                self.found.setters[assign] = SETTERS[old]
                self._need(SETTERS[old], bound, node)
                return
            new = self._judge(node, old, text)
            if new is None:
                self.stays.append((node, first, scope))
            elif not self._text_stays(new, rest, bound[0]) and self._varies(scope, first):
                self.stays.append((node, first, scope))
                self._note(
                    node, text, Gone(f"{first!r} is given other values here, too", "Rename one of them.")
                )
            else:
                self._replace(node, old, new, rest, bound)

    def _text_stays(self, new: str, rest: str, binding: Binding) -> bool:
        """Whether the import that a chain begins with is rewritten so that the chain means the new name as it is."""
        renamed = None if binding.is_root else moved(binding.full)
        return renamed is not None and (f"{renamed}.{rest}" if rest else renamed) == new

    def _replace(
        self, node: cst.Attribute | cst.Name, old: str, new: str, rest: str, bound: list[Binding]
    ) -> None:
        if self._text_stays(new, rest, bound[0]):
            renamed = moved(bound[0].full) or ""
            if module_of(new) not in (renamed, module_of(renamed)):
                self._need(new, bound, node)  # the import is rewritten, but its submodule has to be loaded
            return
        root = root_of(old) or ""
        inner: cst.BaseExpression = node
        for _ in range(old.count(".") - root.count(".")):
            assert isinstance(inner, cst.Attribute)
            inner = inner.value
        self.found.chains[inner] = MODULES[root]
        self._need(new, bound, node)

    def _varies(self, scope: Scope, name: str) -> bool:
        """Whether a name that an import binds is given other values, too; None, where an import failed, is no value."""
        for assignment in scope[name]:
            if isinstance(assignment, ImportAssignment) or not isinstance(assignment, Assignment):
                continue
            whole = self._assignment(assignment.node)
            if whole is None or not isinstance(whole.value, cst.Name) or whole.value.value != "None":
                return True
        return False

    def _need(self, name: str, bound: list[Binding], use: cst.CSTNode) -> None:
        """A use of a name needs its module imported, beside the import that served it until now."""
        sure = [b for b in bound if self._serves(b.statement, use)]
        self.needs += [(module_of(name), b, use) for b in sure[:1] or bound]  # else in each of the branches

    def _method(self, node: cst.Attribute | cst.Name) -> None:
        """Calls of what only quantized tensors and scripted modules had."""
        parent = self.get_metadata(ParentNodeProvider, node, None)
        if isinstance(node, cst.Attribute) and isinstance(parent, cst.Call) and parent.func is node:
            known = METHODS.get(node.attr.value)
            if known is not None:
                self.suspects.append((self._line(node), f".{node.attr.value}()", known))

    def _assignment(self, node: cst.CSTNode) -> cst.Assign | None:
        """The statement that does nothing but give this one target a value."""
        target = self.get_metadata(ParentNodeProvider, node)
        if not isinstance(target, cst.AssignTarget):
            return None
        assign = self.get_metadata(ParentNodeProvider, target)
        return assign if isinstance(assign, cst.Assign) and len(assign.targets) == 1 else None

    # -- bindings and places ----------------------------------------------------------------------------------------

    def _bindings(self, scope: Scope, name: str) -> list[Binding]:
        """The imports that give a name its meaning in a scope, in the order of the file."""
        made = []
        for assignment in scope[name]:
            if (
                isinstance(assignment, ImportAssignment)
                and (b := self._binding(assignment, name)) is not None
            ):
                made.append(b)
        return sorted({b.alias: b for b in made}.values(), key=lambda b: self._place(b.alias))

    def _binding(self, assignment: ImportAssignment, name: str) -> Binding | None:
        statement = assignment.node
        assert isinstance(statement, cst.Import | cst.ImportFrom)
        if isinstance(statement.names, cst.ImportStar) or (
            isinstance(statement, cst.ImportFrom) and statement.relative
        ):
            return None
        for alias in statement.names:
            local = alias.name if alias.asname is None else alias.asname.name
            if local is not assignment.as_name:
                continue
            full = dotted(alias.name) or ""
            if isinstance(statement, cst.ImportFrom):
                full = f"{dotted(statement.module)}.{full}"
            elif alias.asname is None:
                full = name
            return Binding(statement, alias, full, assignment.scope)
        return None

    def _place(self, node: cst.CSTNode) -> tuple[int, int]:
        start = self.get_metadata(PositionProvider, node).start
        return int(start.line), int(start.column)

    def _line(self, node: cst.CSTNode) -> int:
        return self._place(node)[0]

    def _blocks(self, node: cst.CSTNode) -> Iterator[cst.CSTNode]:
        """The blocks that a node is in, the innermost first."""
        at: cst.CSTNode | None = node
        while at is not None:
            if isinstance(at, cst.IndentedBlock | cst.SimpleStatementSuite | cst.Module):
                yield at
            at = self.get_metadata(ParentNodeProvider, at, None)

    def _function(self, node: cst.CSTNode) -> cst.CSTNode | None:
        """The function that a node runs in; None for the module's own code."""
        at: cst.CSTNode | None = self.get_metadata(ParentNodeProvider, node, None)
        while at is not None and not isinstance(at, cst.FunctionDef | cst.Lambda):
            at = self.get_metadata(ParentNodeProvider, at, None)
        return at

    def _serves(self, early: cst.CSTNode, late: cst.CSTNode) -> bool:
        """Whether a statement has run whenever a later place is reached: it comes first, in a block around it."""
        return self._place(early) <= self._place(late) and next(self._blocks(early)) in set(
            self._blocks(late)
        )

    def _note(self, node: cst.CSTNode, what: str, why: Gone | None) -> None:
        if why is not None:
            self.found.notes.append((self._line(node), what, why))

    # -- the end ----------------------------------------------------------------------------------------------------

    def leave_Module(self, original_node: cst.Module) -> None:
        """What imports the changed names need, and which names changed imports no longer bind."""
        for use, first, scope in self.stays:
            self._keep(use, first, scope)
        self._replace_packages()
        longest_first = sorted(self.needs, key=lambda n: n[0], reverse=True)
        for module, binding, use in longest_first:
            inside = self._local(use)
            if any(
                (name == module or name.startswith(f"{module}."))
                and (self._serves(statement, use) or self._serves(statement, binding.statement))
                and (not inside or statement in inside)
                for statement, name in self.imported
            ):
                continue
            self.found.before.setdefault(binding.statement, set()).add(module)
            self.imported.append((binding.statement, module))
            if inside and self._function(binding.statement) is not self._function(use):
                self._unbound(use, module)
        for module, _, use in self.needs:  # an import that another use needed may have made the name local
            inside = self._local(use)
            if inside and not any(self._serves(statement, use) for statement in inside):
                self._unbound(use, module)
        if self.quantizes:
            self.found.notes += self.suspects

    def _unbound(self, use: cst.CSTNode, module: str) -> None:
        why = Gone("'pennyweight' is a local name here, imported further down", "Move that import up.")
        self._note(use, dotted(use) or module, why)

    def _local(self, use: cst.CSTNode) -> set[Statement]:
        """Imports that make `pennyweight` a local name of the function that a use is in."""
        function = self._function(use)
        if function is None:
            return set()
        ours = {s for s, name in self.imported if name.split(".")[0] == "pennyweight"}
        return {s for s in ours if self._function(s) is function}

    def _replace_packages(self) -> None:
        """`import torchao` of which nothing stays in use: it may not be installed any more."""
        used = {b.alias for _, first, scope in self.stays for b in self._bindings(scope, first)}
        for module, binding, _ in sorted(self.needs, key=lambda n: n[0]):
            package = isinstance(binding.statement, cst.Import) and not binding.moves
            if not package or binding.full.split(".")[0] not in PACKAGES:
                continue
            if binding.alias not in used and binding.alias not in self.found.instead:
                self.found.instead[binding.alias] = module
                self.imported.append((binding.statement, module))

    def _keep(self, use: cst.CSTNode, first: str, scope: Scope) -> None:
        """See to it that a name which stays in use is still bound where `import torch.quantization` bound it."""
        bindings = self._bindings(scope, first)
        kept = [b.statement for b in bindings if not (b.moves and b.is_root)]
        kept += [b.statement for b in bindings if first in self.found.before.get(b.statement, ())]
        lost = [b for b in bindings if b.moves and b.is_root]
        if not lost or any(self._serves(statement, use) for statement in kept):
            return
        outer = lost[0].scope.parent
        imports_only = all(isinstance(a, ImportAssignment) for a in scope[first])
        if not kept and imports_only and any(not b.moves for b in self._bindings(outer, first)):
            return  # the name is no longer local, and the one outside is the same module
        self.found.before.setdefault(lost[0].statement, set()).add(first)
        for other in lost[1:]:  # in another branch
            if not self._serves(lost[0].statement, other.statement):
                self.found.before.setdefault(other.statement, set()).add(first)


def analyse(wrapper: MetadataWrapper, code: str) -> Findings:
    """Resolve a file's names and find what has to change."""
    analysis = _Analysis(code)
    wrapper.visit(analysis)
    return analysis.found


def _is_expression(text: str) -> bool:
    """Whether a text is a name or a type, and no prose that mentions one."""
    try:
        cst.parse_expression(text)
    except cst.ParserSyntaxError:
        return False
    return True
