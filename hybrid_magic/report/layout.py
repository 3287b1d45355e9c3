"""How words are laid out: lines that hang, columns of text, the frame of an HTML table.

Knows no run, no ablation and no profile.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from html import escape

from . import quantities as q

WIDTH = 100  # columns of a text table


def unbroken(said: str) -> str:
    """Return words escaped for HTML, numbers and their units kept on one line."""
    return escape(q.unbroken(said))


def hang(head: str, body: str, later: str | None = None) -> str:
    """Return `body` after `head`, its further lines below its first, or after `later`."""
    return textwrap.fill(
        body,
        width=max(WIDTH, len(head) + 40),
        initial_indent=head,
        subsequent_indent=" " * len(head) if later is None else later,
        break_on_hyphens=False,
        break_long_words=False,
    )


def columns(rows: Sequence[Sequence[str]], words: int, indent: str = "  ") -> list[str]:
    """Return rows as lines of text, the first `words` columns left-aligned, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(wide) if at < words else cell.rjust(wide)
            for at, (cell, wide) in enumerate(zip(row, widths, strict=True))
        )
        lines.append((indent + "  ".join(cells)).rstrip())
    return lines


def table(caption: str, rows: str, attributes: str = "") -> str:
    """Return an HTML table of rows under a caption in bold, which scrolls where it is too wide."""
    return (
        f'<div style="overflow-x: auto"><table {attributes}style="color: inherit; '
        'margin: 0 0 0.8em 0"><caption style="text-align: left; color: inherit">'
        f"<b>{escape(caption)}</b></caption>{rows}</table></div>"
    )
