"""The table of a run, as text and as HTML, in words that a student knows.

What is said is decided once (`facts`, `validations`, `decisions`) and only laid out twice. The HTML
needs no style sheet: it reads well where styles are stripped, and takes its colours from the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..records import StepRecord
from ..run import Run
from . import quantities as q
from . import series
from .layout import columns as laid
from .layout import hang, table, unbroken

LAST_DECISIONS, LAST_VALIDATIONS = 5, 10

_OUTCOMES = {
    "finished": "finished",
    "stopped": "stopped from the panel, at a whole step",
    "interrupted": "interrupted, at a whole step",
    "failed": "failed",
}


def facts(run: Run) -> list[tuple[str, str]]:
    """Return the run's totals: a name and a sentence each; what is unknown and idle is left out."""
    rows = [("outcome", _outcome(run))]
    if run.start is not None:
        start = run.start
        what = f"{start.model} ({_parameters(start.parameters)} parameters) on {start.device}"
        rows.append(("trained", f"{what} in {start.precision} with {start.optimizer}"))
    rows += [
        ("seen", _seen(run)),
        ("time", _time(run)),
        ("peak memory", _memory(run)),
        ("loss", _loss(run)),
    ]
    if run.energy_j is not None:
        rows.append(("energy", _energy(run, run.energy_j)))
    if len(run.history):
        rows.append(("batch", _batches(run)))
    if run.skipped_steps:
        steps = q.count(run.skipped_steps)
        rows.append(("skipped", f"{steps} of the steps: loss or gradient not finite"))
    if run.retries:
        times = "once" if run.retries == 1 else f"{q.count(run.retries)} times"
        rows.append(("memory ran out", f"{times}; the step started over in smaller micro-batches"))
    return rows


def validations(run: Run) -> tuple[list[str], list[list[str]]]:
    """Return the columns of the validation table, and a row of cells for each of the last few."""
    columns = list(dict.fromkeys(name for metrics in run.metrics for name in metrics))
    cell = {"epoch": lambda number: f"{number:g}"}
    rows = [
        [cell.get(name, q.value)(metrics[name]) if name in metrics else "" for name in columns]
        for metrics in run.metrics[-LAST_VALIDATIONS:]
    ]
    return columns, rows


def decisions(run: Run) -> list[tuple[str, str, str, str]]:
    """Return the last few decisions, oldest first: step, what, from → to, reason."""
    return [
        (q.count(made.step), made.what, q.change(made.before, made.after), made.reason)
        for made in run.changes[-LAST_DECISIONS:]
    ]


def text(run: Run) -> str:
    """Return the run as a table of text, at most 100 columns wide."""
    names = facts(run)
    width = max(len(name) for name, _ in names)
    lines = [hang(f"{name:<{width}}  ", said) for name, said in names]
    columns, rows = validations(run)
    if rows:
        lines += ["", _title("validation", run.metrics, rows), *laid([columns, *rows], 0)]
    made = decisions(run)
    if made:
        lines += ["", _title("decision", run.changes, made)]
        wide = [max(len(row[at]) for row in made) for at in range(3)]
        for step, what, change, reason in made:
            head = f"  step {step:>{wide[0]}}  {what:<{wide[1]}}  {change:<{wide[2]}}  "
            lines.append(hang(head, reason))
    if run.notes:
        lines += ["", "what was inferred, and what you should know"]
        lines += [hang("  - ", note) for note in run.notes]
    return "\n".join(lines)


def html(run: Run) -> str:
    """Return the run as HTML tables; every name is escaped, no style sheet is needed."""
    left = 'style="text-align: left; vertical-align: top; color: inherit"'
    right = 'style="text-align: right; color: inherit"'
    known = [
        f'<tr><th scope="row" {left}>{escape(name)}</th><td {left}>{unbroken(said)}</td></tr>'
        for name, said in facts(run)
    ]
    parts = [table("Hybrid run", "".join(known))]
    columns, rows = validations(run)
    if rows:
        heads = "".join(f'<th scope="col" {right}>{escape(name)}</th>' for name in columns)
        below = [
            "<tr>" + "".join(f"<td {right}>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        ]
        title = _title("validation", run.metrics, rows).capitalize()
        parts.append(table(title, f"<tr>{heads}</tr>{''.join(below)}"))
    made = decisions(run)
    if made:
        heads = "".join(
            f'<th scope="col" {left}>{name}</th>' for name in ("step", "what", "change", "why")
        )
        below = [
            "<tr>" + "".join(f"<td {left}>{unbroken(cell)}</td>" for cell in row) + "</tr>"
            for row in made
        ]
        title = _title("decision", run.changes, made).capitalize()
        parts.append(table(title, f"<tr>{heads}</tr>{''.join(below)}"))
    if run.notes:
        items = "".join(f"<li>{unbroken(note)}</li>" for note in run.notes)
        parts.append(f"<p><b>What was inferred, and what you should know</b></p><ul>{items}</ul>")
    return "".join(parts)


def _outcome(run: Run) -> str:
    said = _OUTCOMES.get(run.outcome, run.outcome)
    return f"{said}: {run.error}" if run.error else said


def _parameters(number: int) -> str:
    for least, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= least:
            return f"{q.value(number / least)} {letter}"
    return q.count(number)


def _seen(run: Run) -> str:
    said = f"{q.count(run.steps)} steps, {q.count(run.samples_seen)} samples"
    per_epoch = run.start.samples_per_epoch if run.start else None
    if per_epoch:
        epochs = f"{run.samples_seen / per_epoch:.2f}".rstrip("0").rstrip(".")
        said = f"{epochs} epoch{'' if epochs == '1' else 's'}, {said}"
    return said


def _time(run: Run) -> str:
    said = f"{q.duration(run.seconds)} training"
    if run.validation_seconds:
        said += f" + {q.duration(run.validation_seconds)} validation"
    if run.opening_seconds > 0.02 * run.seconds:
        said += f" + {q.duration(run.opening_seconds)} before it, to choose precision and sizes"
    said += f", {q.rate(run.samples_per_second)}"
    if run.drawing_seconds is not None and run.seconds > 0:
        share = q.share(run.drawing_seconds / run.seconds)
        said += f"; {share} of it ({q.duration(run.drawing_seconds)}) for what was shown live"
    return said


def _memory(run: Run) -> str:
    if run.peak_allocated_bytes is None:
        return "no reading on this device"
    said = q.size(run.peak_allocated_bytes)
    if run.peak_reserved_bytes is not None:
        said += f", reserved {q.size(run.peak_reserved_bytes)}"
    if run.start is not None and run.start.memory_budget_bytes:
        said += f", of a budget of {q.size(run.start.memory_budget_bytes)}"
    return said


def _energy(run: Run, joules: float) -> str:
    said = f"{_joules(joules)} drawn by the whole GPU"
    if joules >= 360:
        said += f" ({q.value(joules / 3600)} Wh)"
    if run.energy_j_per_1000_samples is not None:
        said += f", {_joules(run.energy_j_per_1000_samples)} per 1,000 samples"
    seconds = run.telemetry[-1].at_s
    return f"{said}; {q.value(joules / seconds)} W on average" if seconds > 0 else said


def _joules(number: float) -> str:
    for least, unit in ((1e6, "MJ"), (1e3, "kJ")):
        if number >= least:
            return f"{q.value(number / least)} {unit}"
    return f"{q.value(number)} J"


def _loss(run: Run) -> str:
    first = next((record.loss for record in run.history if record.loss is not None), None)
    return f"{q.value(first)} at the first step, {q.value(run.final_loss)} at the last"


def _batches(run: Run) -> str:
    processes = 1 if run.start is None else run.start.processes
    steps = run.history[0], series.last_whole_step(run.history)
    first, last = (_batch(step, processes) for step in steps)
    said = f"{first} at the start"
    if first != last:
        said += f", {last} at the end"
    number = len(run.changes)
    return f"{said}; {q.count(number) if number else 'no'} decision{'' if number == 1 else 's'}"


def _batch(record: StepRecord, processes: int) -> str:
    micro, pieces = record.microbatch_size, record.accumulation_steps
    return q.batch(record.global_batch_size, micro, pieces, processes)


def _title(what: str, everything: Sequence[object], shown: Sequence[object]) -> str:
    if len(shown) < len(everything):
        return f"the last {len(shown)} of {q.count(len(everything))} {what}s"
    return what if len(shown) == 1 else f"{what}s"
