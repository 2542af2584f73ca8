"""One `from ... import (...)` becomes several: every name keeps the comments that stand before and behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import libcst as cst

from pennyweight.compat.migrate.names import chain

_WIDTH = 88
Lines = Sequence[cst.EmptyLine]


@dataclass
class _Piece:
    """A name of an import, the lines before it and the comment behind it."""

    alias: cst.ImportAlias
    above: Lines
    behind: cst.TrailingWhitespace

    @property
    def speaks(self) -> bool:
        return self.behind.comment is not None or any(line.comment is not None for line in self.above)


def partition(
    node: cst.ImportFrom, targets: Sequence[str], renamed: Sequence[cst.ImportAlias]
) -> list[cst.ImportFrom]:
    """Split an import by the modules that its names come from now.

    Args:
        node: the import.
        targets: for each of its names, the module to import it from.
        renamed: the names as they are to be written.
    """
    old = chain_text(node)
    moved = sorted({t for t in targets if t != old})
    order = [*moved, old] if old in targets else moved
    pieces, opening, closing = _pieces(node, renamed)
    made = []
    for module in order:
        mine = [piece for piece, target in zip(pieces, targets, strict=True) if target == module]
        base = node if module == order[-1] else cst.ImportFrom(chain(module), node.names)
        base = base.with_changes(module=node.module if module == old else chain(module))
        multiline = any(p.speaks for p in mine) or (module == old and opening is not None)
        if not multiline and len(mine) > 1:
            text = f"from {module} import {', '.join(cst.Module([]).code_for_node(p.alias) for p in mine)}"
            multiline = opening is not None and len(text) > _WIDTH
        if multiline:
            last = module == order[-1]
            made.append(_tall(base, mine, opening if last else None, closing if last else ()))
        else:
            aliases = [p.alias.with_changes(comma=cst.MaybeSentinel.DEFAULT) for p in mine]
            keep = node.lpar is not None and opening is None and module == old
            parens = (
                {"lpar": cst.LeftParen(), "rpar": cst.RightParen()} if keep else {"lpar": None, "rpar": None}
            )
            made.append(base.with_changes(names=aliases, **parens))
    return made


def chain_text(node: cst.ImportFrom) -> str:
    """The dotted name of an import's module."""
    return cst.Module([]).code_for_node(node.module) if node.module is not None else ""


def _pieces(
    node: cst.ImportFrom, renamed: Sequence[cst.ImportAlias]
) -> tuple[list[_Piece], cst.ParenthesizedWhitespace | None, Lines]:
    """The names with their comments, the space behind the opening parenthesis if lines follow, the last lines."""
    assert not isinstance(node.names, cst.ImportStar)
    spaces = [node.lpar.whitespace_after if node.lpar is not None else None]
    for alias in node.names:
        spaces.append(alias.comma.whitespace_after if isinstance(alias.comma, cst.Comma) else None)
    if node.rpar is not None and not isinstance(spaces[-1], cst.ParenthesizedWhitespace):
        spaces[-1] = node.rpar.whitespace_before
    tall = [s if isinstance(s, cst.ParenthesizedWhitespace) else None for s in spaces]
    pieces = []
    for place, alias in enumerate(renamed):
        before, after = tall[place], tall[place + 1]
        above = () if before is None else before.empty_lines
        pieces.append(_Piece(alias, above, cst.TrailingWhitespace() if after is None else after.first_line))
    last = tall[-1]
    if not any(tall):
        return pieces, None, ()
    opening = tall[0] or cst.ParenthesizedWhitespace(indent=True, last_line=cst.SimpleWhitespace("    "))
    return pieces, opening, () if last is None else last.empty_lines


def _tall(
    base: cst.ImportFrom,
    pieces: Sequence[_Piece],
    opening: cst.ParenthesizedWhitespace | None,
    closing: Lines,
) -> cst.ImportFrom:
    """One name a line."""
    indent = cst.SimpleWhitespace("    ") if opening is None else opening.last_line
    first = cst.TrailingWhitespace() if opening is None else opening.first_line
    names = []
    for place, piece in enumerate(pieces):
        final = place == len(pieces) - 1
        space = cst.ParenthesizedWhitespace(
            first_line=piece.behind,
            empty_lines=closing if final else pieces[place + 1].above,
            indent=True,
            last_line=cst.SimpleWhitespace("") if final else indent,
        )
        names.append(piece.alias.with_changes(comma=cst.Comma(whitespace_after=space)))
    left = cst.ParenthesizedWhitespace(
        first_line=first, empty_lines=pieces[0].above, indent=True, last_line=indent
    )
    return base.with_changes(names=names, lpar=cst.LeftParen(whitespace_after=left), rpar=cst.RightParen())
