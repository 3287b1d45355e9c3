"""Top-level statements of a notebook's cells as they were run: their text, and which names each
reads at once, and which only when a function of it is called.

Reads text and trees alone.
"""

from __future__ import annotations

import ast
import io
import re
import symtable
import tokenize
from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .names import FUNCTIONS, bound, own_scope

DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
IMPORTS = (ast.Import, ast.ImportFrom)
_AT_ONCE = ("listcomp", "setcomp", "dictcomp", "genexpr")


@dataclass(eq=False)
class Piece:
    """One statement that was run at the top level of a cell.

    `text` is the person's own, with its comments; `cell` the number of the cell, `line` and `end`
    where it stands in there; `apart`: a blank line, or another cell, stands before it. `trained` is
    None but for a run of ours, of which it is the names that it trained.
    """

    node: ast.stmt
    text: str
    cell: int
    line: int
    end: int
    apart: bool
    trained: frozenset[str] | None = None

    @cached_property
    def binds(self) -> frozenset[str]:
        """The names that it gives a value."""
        return frozenset(bound(self.node))

    @cached_property
    def _reads(self) -> tuple[frozenset[str], frozenset[str]]:
        return reads_of(self.text, self.node)

    @property
    def now(self) -> frozenset[str]:
        """The names that it reads when it is run."""
        return self._reads[0]

    @property
    def late(self) -> frozenset[str]:
        """The names that its functions read when they are called."""
        return self._reads[1]

    @property
    def place(self) -> str:
        return f"cell [{self.cell}], line {self.line}"


def pieces_of(text: str, cell: int, *, first_line: int = 1) -> list[Piece]:
    """Return the statements of a cell's text, the first line of which is its `first_line`.

    Raises:
        SyntaxError: it has none.
    """
    found: list[Piece] = []
    rows = lines_of(text)
    before = 0  # the last line of the statement before
    for node in ast.parse(text).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        top = first
        while top - 1 > before and rows[top - 2].startswith("#"):
            top -= 1
        written = _own_text(rows, node, first)
        said = [*rows[top - 1 : first - 1], written]
        apart = not found or (top - 2 >= 0 and not rows[top - 2].strip())
        before = node.end_lineno or first
        at = first + first_line - 1, before + first_line - 1
        found.append(Piece(node, "\n".join(said), cell, *at, apart))
    return found


def lines_of(text: str) -> list[str]:
    """Return the lines of a program as Python counts them: str.splitlines() ends some at a form
    feed, too."""
    rows = re.split(r"\r\n|\r|\n", text)
    return rows if rows[-1] else rows[:-1]


def _own_text(rows: list[str], node: ast.stmt, first: int) -> str:
    """Return a statement as written, with the comment that follows it on its last line."""
    end = node.end_lineno or node.lineno
    own = rows[first - 1 : end]
    after = own[-1].encode()[node.end_col_offset :].decode()
    if after.strip() and not after.strip().startswith("#"):  # another statement: a = 1; b = 2
        own[-1] = own[-1].encode()[: node.end_col_offset].decode()
    if first == node.lineno:
        own[0] = own[0].encode()[node.col_offset :].decode()
    return "\n".join(own).rstrip()


def reads_of(text: str, node: ast.AST) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of its surroundings that a statement reads: at once, and later."""
    now, late = set[str](), set[str]()
    for part in own_scope(node):  # which a symbol table does not count as read
        if isinstance(part, ast.AugAssign) and isinstance(part.target, ast.Name):
            now.add(part.target.id)
    top = symtable.symtable(text, "<cell>", "exec")
    for table, later in _tables(top, False):
        names = {
            symbol.get_name()
            for symbol in table.get_symbols()
            if (symbol.is_referenced() or (later and symbol.is_declared_global()))
            and (table is top or symbol.is_global())
        }
        (late if later else now).update(names)
        if table.get_name() == "lambda":
            now |= names  # it may be called at once, too
    return frozenset(now), frozenset(late)


def _tables(table: Any, later: bool) -> Iterator[tuple[Any, bool]]:
    yield table, later
    for child in table.get_children():
        function = child.get_type() == "function" and child.get_name() not in _AT_ONCE
        yield from _tables(child, later or function)


def undefined(text: str, known: Set[str]) -> set[str]:
    """Return the names that a whole program reads of its module and never gives a value.

    Args:
        known: names that are there without it.
    """
    top = symtable.symtable(text, "<script>", "exec")
    given, asked = set(known), set[str]()
    for table, _ in _tables(top, False):
        for symbol in table.get_symbols():
            if table is top or symbol.is_global():
                (given if _gives(symbol) else asked).add(symbol.get_name())
                if symbol.is_referenced():
                    asked.add(symbol.get_name())
    return asked - given


def _gives(symbol: symtable.Symbol) -> bool:
    return symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()


def indented(text: str, by: str = "    ") -> str:
    """Return a program's text with every line moved in, but for the insides of strings."""
    inside: set[int] = set()
    strings = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING),
               getattr(tokenize, "TSTRING_MIDDLE", tokenize.STRING)}  # fmt: skip
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in strings:
            inside.update(range(token.start[0] + 1, token.end[0] + 1))
    rows = lines_of(text)
    return "\n".join(
        row if number in inside or not row.strip() else by + row
        for number, row in enumerate(rows, 1)
    )
