"""A profile as text and as HTML: one line, the advice, then what it rests on.

What is said is decided once (`profile_words`, `profile_rows`) and laid out twice. The HTML needs no
style sheet and no script: it reads well where styles are stripped, and takes its colours from the
page.
"""

from __future__ import annotations

from html import escape
from typing import Any

from ..profiles import Profile
from . import page, profile_plots, profile_rows, profile_words
from . import quantities as q
from .layout import columns, hang, table, unbroken
from .profile_rows import Table
from .profile_tree import branches, parts

ROWS, ROWS_IN_TEXT, ROWS_OPENED = 13, 40, 200  # of the tree of modules


def text(profile: Profile) -> str:
    """Return everything as text."""
    lines = [hang("", profile_words.headline(profile))]
    if not profile.advice:
        lines.append(profile_words.NOTHING)
    for at, advice in enumerate(profile.advice, start=1):
        brought = profile_words.brings(advice)
        lines += [
            "",
            hang(f"{at}. ", advice.what + (f": {brought}" if brought else "")),
            hang("   ", advice.evidence),
            hang("   ", f"do: {advice.do}"),
        ]
    shown = branches(profile.modules, profile.model, ROWS_IN_TEXT)
    tables = [
        profile_rows.stages(profile),
        profile_rows.modules(profile, shown),
        *_about_memory(profile),
        profile_rows.reads(profile),
    ]
    for made in tables:
        lines += _text_table(made)
    said = profile_words.sentences(profile)
    wide = max(len(name) for name, _ in said)
    lines += [
        "",
        *(hang(f"{name:<{wide}}  ", sentence) for name, sentence in said),
    ]
    return "\n".join([*lines, "", hang("", profile_words.caption(profile))])


def _about_memory(profile: Profile) -> list[Table]:
    return [
        profile_rows.kinds(profile),
        profile_rows.fits(profile),
        profile_rows.sizes(profile),
    ]


def _text_table(made: Table) -> list[str]:
    return ["", made.title, *columns([made.heads, *made.rows], made.words)] if made.rows else []


def html(profile: Profile) -> str:
    """Return everything but the figure as HTML."""
    return _top(profile) + _below(profile)


def _top(profile: Profile) -> str:
    """Return what is read at one glance: a line and the advice."""
    said = f"<p><b>{unbroken(profile_words.headline(profile))}</b></p>"
    if not profile.advice:
        return f"{said}<p>{escape(profile_words.NOTHING)}</p>"
    items = []
    for advice in profile.advice:
        brought = profile_words.brings(advice)
        items.append(
            f'<li style="margin-bottom: 0.5em"><b>{unbroken(advice.what)}</b>'
            + (f": {unbroken(brought)}" if brought else "")
            + f"<br>{unbroken(advice.evidence)}<br><i>Do</i>: {unbroken(advice.do)}</li>"
        )
    return f"{said}<ol>{''.join(items)}</ol>"


def _below(profile: Profile) -> str:
    """Return what the advice rests on."""
    items = "".join(
        f"<li><b>{name.capitalize()}</b>: {unbroken(said)}</li>"
        for name, said in profile_words.sentences(profile)
    )
    return "".join(
        [
            _html_table(profile_rows.stages(profile)),
            _modules(profile),
            _beside(_about_memory(profile)),
            _html_table(profile_rows.reads(profile)),
            f"<ul>{items}</ul>",
            f"<p><small>{unbroken(profile_words.caption(profile))}</small></p>",
        ]
    )


def _modules(profile: Profile) -> str:
    few = branches(profile.modules, profile.model, ROWS)
    every = branches(profile.modules, profile.model, ROWS_OPENED, brief=False)
    said = _html_table(profile_rows.modules(profile, few))
    if len(every) <= len(few):
        return said
    shown = _html_table(profile_rows.modules(profile, every))
    title = f"More of the {q.count(len(profile.modules))} modules"
    style = "margin: 0 0 0.8em 0"
    return f'{said}<details style="{style}"><summary>{title}</summary>{shown}</details>'


def _beside(tables: list[Table]) -> str:
    """Return tables side by side, where there is room for it."""
    style = "display: inline-block; vertical-align: top; margin-right: 2.5em; max-width: 100%"
    shown = filter(None, map(_html_table, tables))
    return "".join(f'<div style="{style}">{made}</div>' for made in shown)


# Said twice, as some places strip the one or the other.
_LEFT, _RIGHT = (f'align="{side}" style="text-align: {side}"' for side in ("left", "right"))
_ON_ONE_LINE = 'align="left" style="text-align: left; white-space: nowrap"'


def _html_table(made: Table) -> str:
    if not made.rows:
        return ""
    last = len(made.rows) - 1
    rows = [
        _row(made, row, "th" if made.summed and at == last else "td")
        for at, row in enumerate(made.rows)
    ]
    heads = _row(made, made.heads, "th")
    return table(made.title, heads + "".join(rows), 'cellpadding="4" ')


def _row(made: Table, cells: tuple[str, ...], tag: str) -> str:
    """Return a row; numbers and names stay on one line, heads and what is longer may break."""
    said = []
    for at, cell in enumerate(cells):
        long = len(cell.strip()) > profile_rows.LONGEST_NAME
        left = _LEFT if long or cells is made.heads else _ON_ONE_LINE
        shown = cell if long or cells is made.heads else cell.replace(" ", "\N{NO-BREAK SPACE}")
        said.append(f"<{tag} {left if at < made.words else _RIGHT}>{escape(shown)}</{tag}>")
    return f"<tr>{''.join(said)}</tr>"


def mimebundle(profile: Profile) -> dict[str, Any]:
    """Return the profile for `display`: all of it as text, and with its figure as an HTML page."""
    drawn = page.picture(profile_plots.figure(profile), alt_text(profile))
    return {
        "text/plain": text(profile),
        "text/html": f"{_top(profile)}<p>{drawn}</p>{_below(profile)}",
    }


def figure_bundle(profile: Profile) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the figure alone and its metadata: a PNG, and the words that stand in for it."""
    return page.picture_bundle(profile_plots.figure(profile), alt_text(profile))


def alt_text(profile: Profile) -> str:
    """Return what the figure shows, in words with its numbers."""
    modules = parts(profile.modules, profile.model, profile_plots.MODULES)
    peak, line = profile.peak, profile.line
    told = {
        f"Time by stage, of {q.brief(profile.step_s)} a step": [
            f"{stage.name} {q.brief(stage.seconds)}" for stage in profile.stages
        ],
        "Time by module": [f"{row.label} {q.brief(row.module.seconds)}" for row in modules],
        f"Memory at its peak, {q.size(peak.total_bytes)}" if peak else "": [
            f"{name} {q.size(amount)}" for name, amount in (peak.kinds if peak else {}).items()
        ],
        "Peak memory by micro-batch": [
            f"{q.count(size.samples)} samples {q.size(size.peak_bytes)}"
            for size in profile.sizes
            if size.peak_bytes is not None
        ],
        "The largest micro-batch": [
            f"{fit.device} {q.count(fit.largest) if fit.largest else 'none'}"
            for fit in (line.fits if line else ())
        ],
    }
    said = [f"{name}: {', '.join(words)}." for name, words in told.items() if words]
    return " ".join(["Where time and memory of a training step go.", *said])
