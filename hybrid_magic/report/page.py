"""The page that a run leaves in a notebook: its table, and its figure with words that stand for it.

Under 300 kB, and readable without a kernel, on the web too.
"""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING, Any

from ..run import Run
from . import plots, series, tables
from . import quantities as q

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DISPLAY_WIDTH_PX = 860  # the PNG holds more pixels than that, for sharp screens


def mimebundle(run: Run) -> dict[str, Any]:
    """Return the run for `display`: the table as text, and table and figure as one HTML page."""
    page = tables.html(run) + picture(plots.figure(run), alt_text(run))
    return {"text/plain": tables.text(run), "text/html": page}


def picture(sheet: Figure, alt: str) -> str:
    """Return a figure as HTML."""
    return (
        f'<img src="data:image/png;base64,{_png(sheet)}" alt="{escape(alt)}" '
        f'width="{DISPLAY_WIDTH_PX}" style="max-width: 100%; height: auto">'
    )


def picture_bundle(sheet: Figure, alt: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a figure for `display` and its metadata: a PNG, and the words that stand for it."""
    data = {"image/png": _png(sheet), "text/plain": alt}
    return data, {"image/png": {"width": DISPLAY_WIDTH_PX, "alt": alt}}


def _png(sheet: Figure) -> str:
    return base64.b64encode(plots.png(sheet)).decode("ascii")


def table_bundle(run: Run) -> dict[str, Any]:
    """Return the table alone, as text and as HTML."""
    return {"text/plain": tables.text(run), "text/html": tables.html(run)}


def figure_bundle(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the figure alone and its metadata: a PNG, and the sentence that stands in for it."""
    return picture_bundle(plots.figure(run), alt_text(run))


def alt_text(run: Run) -> str:
    """Return what the figure shows, in sentences with its numbers."""
    said = ["Four plots of a training run."]
    losses = [record.loss for record in run.history if record.loss is not None]
    if losses:
        said.append(
            f"Loss: {q.value(losses[0])} at the first step, {q.value(losses[-1])} at the last."
        )
    if run.peak_allocated_bytes is not None:
        said.append(f"Memory: at most {q.size(run.peak_allocated_bytes)}.")
    if len(run.history):
        first = run.history[0].global_batch_size
        last = series.last_whole_step(run.history).global_batch_size
        said.append(f"Global batch: {q.count(first)} at the start, {q.count(last)} at the end.")
    if run.steps and run.seconds:
        each = q.duration(run.seconds / run.steps)
        said.append(f"Time per step: {each} on average over {q.count(run.steps)} steps.")
    return " ".join(said)
