"""`%hybrid_device`: what this machine offers a run, as text and as HTML, or as a plain dict.

What is said is decided in `device_words` and only laid out here, twice. The HTML needs no style
sheet and no script, and takes its colours from the page.
"""

from __future__ import annotations

import dataclasses
import keyword
import shlex
import sys
from html import escape
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.display import display

from ..report.layout import hang, table, unbroken
from ..telemetry import nvml
from .device_advice import Gauges, Place, place_here
from .device_words import Grid, Page, page_of

if TYPE_CHECKING:
    from ..engine.machine import Machine

_WANTED = "wanted %hybrid_device [-o NAME] [--plain]"


def show(shell: Any, line: str) -> None:
    """Run `%hybrid_device` in `shell`: show the page, and put its facts into the name of `-o`.

    Raises:
        UsageError: an argument that it does not have, or a name that is none.
    """
    name, plain = _read(line)
    from ..engine.machine import read_machine

    gauges: Gauges = {}

    def used_bytes(device: str, uuid: str | None, pci_bus_id: str | None) -> int | None:
        gauges[device] = found = _gauge(uuid, pci_bus_id)
        return None if found is None else found["used_bytes"]

    machine = read_machine(used_bytes)
    if not gauges:  # a GPU that torch does not see; where there are several, none is shown
        gauges["nvidia"] = _gauge(None, None)
    known = {device: found for device, found in gauges.items() if found is not None}
    place = place_here()
    page = page_of(machine, known, place, last_error())
    if name is not None:
        shell.user_ns[name] = as_dict(machine, known, place, page)
    if plain:
        sys.stdout.write(text(page) + "\n")
    else:
        display({"text/plain": text(page), "text/html": html(page)}, raw=True)


def _read(line: str) -> tuple[str | None, bool]:
    """Return the name of `-o`, None where there is none, and whether `--plain` was given."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UsageError(f"the line cannot be read ({error}); {_WANTED}; close them") from None
    name, plain = None, False
    while words:
        flag, equals, value = words.pop(0).partition("=")
        if flag == "--plain" and not equals:
            plain = True
        elif flag == "-o" and name is None and (equals or words):
            name = value if equals else words.pop(0)
        elif flag == "-o":
            what = "has no name" if name is None else "is given twice"
            raise UsageError(f"-o {what}; {_WANTED}; give it one name, such as -o machine")
        else:
            raise UsageError(
                f"%hybrid_device takes no {flag}{equals}{value}; {_WANTED}; leave it out"
            )
    if name is not None and (not name.isidentifier() or keyword.iskeyword(name)):
        raise UsageError(f"-o is {name!r}; wanted a name such as machine; use letters and _")
    return name, plain


def _gauge(uuid: str | None, pci_bus_id: str | None) -> dict[str, Any] | None:
    """Return what NVML shows of a GPU now, None where it shows none."""
    gpu = nvml.open_gpu(uuid, pci_bus_id)
    if gpu is None:
        return None
    try:
        of_gpu = ("name", "driver_version", "total_bytes", "power_limit_w")
        return {
            **{name: getattr(gpu, name) for name in of_gpu},
            **dataclasses.asdict(gpu.read()),
        }
    finally:
        gpu.close()


def last_error() -> str | None:
    """Return the name of the error that Python still keeps for %debug."""
    kept = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    return None if kept is None else type(kept).__name__


def as_dict(machine: Machine, gauges: Gauges, place: Place | None, page: Page) -> dict[str, Any]:
    """Return everything that the page stands on, in plain types."""
    return {
        "place": None if place is None else place.name,
        **dataclasses.asdict(machine),
        "gauges": gauges,
        "notes": list(page.notes),
    }


# -- layout


def text(page: Page) -> str:
    """Return the page as text, at most 100 columns wide where its words allow it."""
    width = max(len(name) for name, _ in page.facts)
    lines = [hang(f"{name:<{width}}  ", said) for name, said in page.facts]
    if page.notes:
        lines += ["", "what you should know"]
        lines += [hang("  - ", note) for note in page.notes]
    for grid in page.grids:
        widths = [max(map(len, column)) for column in zip(grid.heads, *grid.rows, strict=True)]
        lines += ["", grid.title]
        for device, *rest in (grid.heads, *grid.rows):
            lay = str.rjust if grid.numbers else str.ljust
            cells = (lay(cell, wide) for cell, wide in zip(rest, widths[1:], strict=True))
            lines.append("  ".join(("", device.ljust(widths[0]), *cells)).rstrip())
    return "\n".join(lines)


def html(page: Page) -> str:
    """Return the page as HTML; every name in it is escaped."""
    left = "text-align: left; vertical-align: top; color: inherit"
    rows = "".join(
        f'<tr><th scope="row" style="{left}; white-space: nowrap">{unbroken(name)}</th>'
        f'<td style="{left}">{unbroken(said)}</td></tr>'
        for name, said in page.facts
    )
    parts = [table("This machine", rows)]
    if page.notes:
        items = "".join(f"<li>{unbroken(note)}</li>" for note in page.notes)
        parts.append(f"<p><b>What you should know</b></p><ul>{items}</ul>")
    return "".join([*parts, *map(_grid, page.grids)])


def _grid(grid: Grid) -> str:
    left = 'style="text-align: left; white-space: nowrap; color: inherit"'
    right = 'style="text-align: right; white-space: nowrap; color: inherit"'
    cell = right if grid.numbers else 'style="text-align: left; color: inherit"'
    styles = [left, *[cell] * (len(grid.heads) - 1)]
    heads = "".join(
        f'<th scope="col" {style}>{escape(head)}</th>'
        for style, head in zip(styles, grid.heads, strict=True)
    )
    rows = "".join(
        f'<tr><th scope="row" {left}>{escape(device)}</th>'
        + "".join(f"<td {cell}>{unbroken(said)}</td>" for said in rest)
        + "</tr>"
        for device, *rest in grid.rows
    )
    return table(grid.title.capitalize(), f"<tr>{heads}</tr>{rows}")
