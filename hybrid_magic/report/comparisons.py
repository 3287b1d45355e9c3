"""The table of an ablation as text, HTML, LaTeX and CSV: the paper's columns, with their spread.

What stands in a cell is decided once (`cells`) and laid out four times. Every name is escaped.
"""

from __future__ import annotations

import dataclasses
import io
from html import escape
from typing import Any

from ..ablation import Ablation, Row
from ..policy.comparison import Estimate
from ..records import TrialRecord
from . import bars, page, verdicts
from . import quantities as q
from .layout import columns, hang, table, unbroken

WORDS = ("variant", "precision")
HEADS = (*WORDS, "training time", "peak memory", "accuracy", "speedup")
MINUS, PLUS_MINUS, DELTA = "\N{MINUS SIGN}", q.PLUS_MINUS, "\N{GREEK CAPITAL LETTER DELTA}"


def heads() -> list[str]:
    """Return the columns: the paper's, and the differences from the first variant."""
    return [*HEADS, *(f"{DELTA} {what}" for what in ("time", "memory", "points"))]


def cells(ablation: Ablation) -> list[list[str]]:
    """Return a row of words for each variant; what is not known is left empty."""
    scale = verdicts.points_per_unit(ablation)
    return [_cells(row, scale, first=at == 0) for at, row in enumerate(ablation.variants)]


def _cells(row: Row, scale: float, *, first: bool) -> list[str]:
    if row.outcome != "finished":
        said = {"oom": "out of memory", "none": "not run"}.get(row.outcome, row.outcome)
        return [row.name, row.precision or "", said, *[""] * 6]
    known = [
        row.name,
        row.precision or "",
        _spread(row.seconds, q.seconds),
        _spread(row.peak_allocated_bytes, q.size),
        _points(row.accuracy, scale),
    ]
    if first:
        return [*known, f"1 {q.TIMES}", "", "", ""]
    return [
        *known,
        _spread(row.speedup, lambda ratio: f"{ratio:.2f}") + f" {q.TIMES}" if row.speedup else "",
        _reduction(row.time_reduction_ratio),
        _reduction(row.memory_reduction_ratio),
        _signed(row.accuracy_delta, scale),
    ]


def _spread(of: Estimate | None, said: Any) -> str:
    if of is None:
        return ""
    small = of.spread is None or of.spread < 5e-3 * of  # what the last digit shown hides anyway
    return said(of) if small else f"{said(of)} {PLUS_MINUS} {said(of.spread)}"


def _points(of: Estimate | None, scale: float) -> str:
    if of is None:
        return ""
    spread = "" if of.spread is None else f" {PLUS_MINUS} {scale * of.spread:.2f}"
    return f"{scale * of:.2f}{spread} %"


def _reduction(of: Estimate | None) -> str:
    """Return a reduction as the paper writes it: a minus for what was saved."""
    if of is None:
        return ""
    found = f"{-100 * of:+.1f}".replace("-", MINUS)
    return ("0.0" if found[1:] == "0.0" else found) + " %"


def _signed(of: Estimate | None, scale: float) -> str:
    if of is None:
        return ""
    found = f"{scale * of:+.2f}".replace("-", MINUS)
    if of.low is None or of.high is None or of.low == of.high:
        return found
    low, high = (f"{scale * end:+.2f}".replace("-", MINUS) for end in (of.low, of.high))
    return f"{found} [{low}, {high}]"


def caption(ablation: Ablation) -> str:
    """Return what the numbers are of: seeds, device, how the ablation ended."""
    n = len(ablation.seeds)
    device = ablation.environment.get("device")
    words = [f"{n} seed{'' if n == 1 else 's'}"]
    words += [f"on {device}"] if device else []
    words += [f"torch {ablation.environment['torch']}"] if "torch" in ablation.environment else []
    spread = "; mean and standard deviation over the seeds" if n > 1 else ""
    if len(ablation.names) > 1:
        spread += f"; {DELTA}: against {ablation.names[0]}, seed by seed"
    ended = "" if ablation.outcome == "finished" else f"; {ablation.outcome} before its end"
    return ", ".join(words) + spread + ended


def known(ablation: Ablation) -> list[list[str]]:
    """Return the heads and the rows, without the columns of which nothing is known."""
    columns = zip(heads(), *cells(ablation), strict=True)
    return [
        list(row) for row in zip(*(column for column in columns if any(column[1:])), strict=True)
    ]


def text(ablation: Ablation) -> str:
    """Return the table as text, with what may be said below it."""
    shown = known(ablation) or [[]]
    words = sum(head in WORDS for head in shown[0])  # they come first
    lines = [f"Ablation: {caption(ablation)}", "", *columns(shown, words, indent="")]
    said = [hang("- ", told) for told in (*verdicts.sentences(ablation), *ablation.notes)]
    return "\n".join([*lines, "", *said] if said else lines)


def html(ablation: Ablation) -> str:
    """Return the table as HTML, readable where styles are stripped, with what may be said below."""
    said = "".join(
        f"<li>{unbroken(sentence)}</li>"
        for sentence in (*verdicts.sentences(ablation), *ablation.notes)
    )
    return table_html(ablation) + (f"<ul>{said}</ul>" if said else "")


def table_html(ablation: Ablation) -> str:
    """Return the table alone, as HTML."""
    left = 'style="text-align: left; color: inherit"'
    right = 'style="text-align: right; color: inherit; white-space: nowrap"'
    top, *body = known(ablation) or [[]]
    styles = [left if head in WORDS else right for head in top]
    heading = "".join(
        f'<th scope="col" {style}>{escape(head)}</th>'
        for style, head in zip(styles, top, strict=True)
    )
    rows = []
    for name, *rest in body:
        said = "".join(
            f"<td {style}>{unbroken(cell)}</td>"
            for style, cell in zip(styles[1:], rest, strict=True)
        )
        rows.append(f'<tr><th scope="row" {left}>{escape(name)}</th>{said}</tr>')
    title = f"Ablation: {caption(ablation)}"
    return table(title, f"<tr>{heading}</tr>{''.join(rows)}")


_TEX = {"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}"}
_TEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
_TEX |= {MINUS: "$-$", PLUS_MINUS: r"$\pm$", q.TIMES: r"$\times$", DELTA: r"$\Delta$"}


def latex(ablation: Ablation) -> str:
    """Return the table as a tabular; it wants \\usepackage{booktabs}."""
    top, *body = known(ablation) or [[]]
    lines = [" & ".join(map(_tex, row)) + r" \\" for row in (top, *body)]
    columns = "".join("l" if head in WORDS else "r" for head in top)
    return "\n".join(
        [
            f"% {caption(ablation)}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _tex(said: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in said)


def csv(ablation: Ablation) -> str:
    """Return a line a trial with plain numbers; empty is unknown."""
    import csv as writing

    names = [item.name for item in dataclasses.fields(TrialRecord)]
    held = io.StringIO()
    writer = writing.writer(held, lineterminator="\n")
    writer.writerow(names)
    for trial in ablation.trials:
        values = (getattr(trial, name) for name in names)
        writer.writerow(["" if value is None else value for value in values])
    return held.getvalue()


def mimebundle(ablation: Ablation) -> dict[str, Any]:
    """Return the ablation for `display`: the table as text, table and figure as one HTML page."""
    shown = html(ablation) + page.picture(bars.figure(ablation), alt_text(ablation))
    return {"text/plain": text(ablation), "text/html": shown}


def figure_bundle(ablation: Ablation) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the figure alone and its metadata: a PNG, and the words that stand in for it."""
    return page.picture_bundle(bars.figure(ablation), alt_text(ablation))


def alt_text(ablation: Ablation) -> str:
    """Return what the figure shows, in words with its numbers."""
    name, _, seconds, memory, accuracy, *_ = zip(heads(), *cells(ablation), strict=True)
    told = [
        f"{name[at]}: " + ", ".join(word for word in cell if word)
        for at, cell in enumerate(zip(seconds[1:], memory[1:], accuracy[1:], strict=True), start=1)
    ]
    return "Training time, peak memory and accuracy of each variant. " + "; ".join(told) + "."
