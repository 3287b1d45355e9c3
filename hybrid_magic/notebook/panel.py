"""Panel: the controls and the live plots under a training cell, as widgets of ipywidgets 7 and 8.

Callbacks may run on any thread: they only put a request into the RunControl's mailbox. Drawing is
the view's business, on the main thread. Knows nothing of the kernel and its messages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from html import escape
from typing import Any

import ipywidgets as W

from ..engine.control import RunControl
from ..report import quantities as q
from ..report.cards import cards, progress_bar
from .scene import Scene

_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_GIVEN_BACK = 0  # a choice of "auto": None to the control, which a Dropdown would show as nothing
_TOOLTIP = "tooltip" if "tooltip" in W.FloatSlider.class_trait_names() else "description_tooltip"


class Panel:
    """The panel of one run; `why_deaf` says why its controls cannot act, None when they can."""

    def __init__(self, control: RunControl, scene: Scene, why_deaf: str | None) -> None:
        self._control, self._scene = control, scene
        self._live = W.HTML()
        words = {"layout": self._live.layout, "style": self._live.style}  # shared: see _setting
        self._why, self._said = W.HTML(**words), W.HTML(**words)
        self._looks: dict[bool, dict[str, Any]] = {}
        self._settings = self._make_settings()
        self._pause, self._actions = self._make_actions()
        if why_deaf is not None:
            self.deafen(why_deaf)
        wrap = W.Layout(flex_flow="row wrap", grid_gap="0 20px", margin="8px 0 4px 0")
        pairs = [
            W.HBox(two, layout=self._live.layout) for two in (self._actions[:2], self._actions[2:])
        ]
        grid = W.Layout(
            grid_template_columns="repeat(auto-fit, minmax(300px, 1fr))",
            grid_gap="0 24px",
            width="100%",
        )
        self._box = W.VBox(
            [
                self._live,
                W.HBox(pairs, layout=wrap),
                W.GridBox(self._settings, layout=grid),
                self._said,
                self._why,  # last: it grows, and controls must not move under the hand
            ],
            layout=W.Layout(width="100%", max_width="1200px", padding="4px 8px", overflow="hidden"),
        )
        self._box._view_count = 0  # from now on the front end reports each view of it

    @property
    def views(self) -> int:
        """How many views of the panel the front ends have reported."""
        return self._box._view_count or 0

    def mimebundle(self) -> dict[str, Any]:
        view = {"version_major": 2, "version_minor": 0, "model_id": self._box.model_id}
        return {_WIDGET_VIEW: view, "text/plain": "Training: the panel is shown where widgets are."}

    def draw(self, now: float) -> None:
        """Show the scene as it is; on the main thread."""
        scene = self._scene
        self._live.value = _live_html(scene, now)
        why = _why_html(scene)
        if self._why.value != why:
            self._why.value = why
        label, icon = ("Resume", "play") if scene.paused else ("Pause", "pause")
        if self._pause.description != label:
            self._pause.description, self._pause.icon = label, icon
        if scene.stopping and not self._pause.disabled:
            self._disable()

    def say(self, words: str) -> None:
        """Show a sentence under the controls, or none."""
        said = f"<i>{escape(words)}</i>" if words else ""
        if self._said.value != said:
            self._said.value = said

    def deafen(self, why: str) -> None:
        """Disable the controls for good, and say why they cannot act."""
        self.say(why)
        self._disable()

    def _disable(self) -> None:
        for widget in (*self._settings, *self._actions):
            widget.disabled = True

    def close(self) -> None:
        """Close every widget, so that none is left alive in kernel or page."""
        for widget in list(_tree(self._box)):
            widget.close()

    def _make_actions(self) -> tuple[W.Button, list[W.Button]]:
        control, scene = self._control, self._scene

        def pause(_: Any) -> None:
            scene.paused = not scene.paused
            control.ask("pause" if scene.paused else "resume")

        def stop(_: Any) -> None:
            scene.stopping = True
            control.ask("stop")

        looks: dict[str, Any] = {"layout": {"width": "118px"}}

        def button(name: str, icon: str, tip: str, act: Callable[[Any], None]) -> W.Button:
            made = W.Button(description=name, icon=icon, tooltip=tip, **looks)
            looks.update(layout=made.layout, style=made.style)
            made.on_click(act)
            return made

        pausing = button("Pause", "pause", "Hold the run after this step, and go on", pause)
        return pausing, [
            pausing,
            button("Stop", "stop", "End the run at a whole step; the notebook goes on", stop),
            button(
                "Grow now",
                "arrow-up",
                "Ask for a larger global batch",
                lambda _: control.ask("grow"),
            ),
            button(
                "Shrink now",
                "arrow-down",
                "Halve the global batch",
                lambda _: control.ask("shrink"),
            ),
        ]

    def _make_settings(self) -> list[Any]:
        start = self._scene.start
        base, ceiling = start.base_batch_size, 0.9
        if start.memory_budget_bytes and start.device_bytes:
            ceiling = min(1.0, max(0.05, round(start.memory_budget_bytes / start.device_bytes, 2)))
        sizes = [(q.count(base * times), base * times) for times in (1, 2, 4, 8, 16, 32, 64)]
        accum = [("auto", _GIVEN_BACK), *((str(count), count) for count in _COUNTS)]
        largest = [("as set", _GIVEN_BACK), *sizes]
        unsized = "" if start.device_bytes else "This device does not tell how much memory it has"
        kept = "" if start.steered else "The batch is kept: nothing here waits for a stable loss"
        return [
            self._setting(
                W.Dropdown,
                "accum",
                "Accumulation",
                "Micro-batches in a step: auto lets the memory decide, a number pins them",
                options=accum,
            ),
            self._setting(
                W.Dropdown,
                "max_batch",
                "Largest batch",
                "The most that the global batch may grow to",
                options=largest,
            ),
            self._setting(
                W.FloatSlider,
                "memory",
                "Memory mark",
                unsized or "High-water mark: the fraction of the device's memory that may be used",
                disabled=bool(unsized),
                **_slider(0.05, 1.0, 0.01, ceiling, ".2f"),
            ),
            self._setting(
                W.FloatLogSlider,
                "lr_multiplier",
                f"Learning rate {q.TIMES}",
                "Multiplies the learning rate from the next step on",
                **_slider(-2, 1, 0.05, 1.0, ".3g"),
            ),
            self._setting(
                W.FloatSlider,
                "growth_factor",
                "Growth factor",
                "The most that the global batch grows by at once",
                **_slider(1.0, 4.0, 0.05, start.growth_factor or 1.5, ".2f"),
            ),
            self._setting(
                W.FloatLogSlider,
                "stability_threshold",
                "Stable below",
                kept or "The relative spread of the loss under which it counts as stable",
                disabled=bool(kept),
                **_slider(-3, 1, 0.1, start.stability_threshold or 0.25, ".3g"),
            ),
        ]

    def _setting(self, kind: type, name: str, label: str, tip: str, **traits: Any) -> Any:
        def changed(change: dict[str, Any]) -> None:
            self._control.set(name, change["new"] or None)

        own = {"style": {"description_width": "104px"}, "layout": {"width": "auto"}}
        looks = self._looks.get(kind is W.Dropdown, own)
        widget = kind(description=label, **looks, **{_TOOLTIP: tip}, **traits)
        # Shared by its kind: a look is a widget too, which is opened and closed with a message.
        self._looks[kind is W.Dropdown] = {"style": widget.style, "layout": widget.layout}
        widget.observe(changed, "value")
        return widget


def _slider(least: float, most: float, step: float, value: float, form: str) -> dict[str, Any]:
    """Return a slider's traits; it asks once a drag, as each request becomes a record."""
    ends = {"min": least, "max": most, "step": step, "value": value}
    return {**ends, "readout_format": form, "continuous_update": False}


def _live_html(scene: Scene, now: float) -> str:
    fraction = scene.fraction(now)
    part = "" if fraction is None else q.share(math.floor(fraction * 100) / 100)
    done = 0.0 if fraction is None else 100 * fraction
    where = ", ".join(
        f'<span style="white-space:nowrap">{escape(said)}</span>' for said in scene.progress(now)
    )
    return (
        '<div style="line-height:1.5"><div data-hybrid-magic="status" '
        'style="display:flex;flex-wrap:wrap;gap:0 12px">'
        f"<b>{escape(scene.state())}</b><span>{where}</span></div>"
        + progress_bar(done, f"Progress {part}")
        + cards(scene.trace, scene.start, scene.changes)
        + "</div>"
    )


def _why_html(scene: Scene) -> str:
    said = []
    why = scene.why()
    if why:
        said.append(f"<b>Last decision</b>, {escape(q.unbroken(why))}")
    if scene.validation is not None:
        numbers = ", ".join(
            f"{name}\N{NO-BREAK SPACE}{q.value(n)}"
            for name, n in scene.validation.metrics.items()
            if name != "epoch"
        )
        epoch = scene.validation.metrics.get("epoch")
        said.append(
            f"<b>Validation</b>{f' after epoch {epoch:g}' if epoch else ''}: {escape(numbers)}"
        )
    lines = "".join(f"<div>{line}</div>" for line in said)
    notes = "".join(f"<span>{escape(note)}</span>" for note in scene.notes)
    return (
        f'<div role="status" style="line-height:1.5;margin-top:6px">{lines}'
        f'<div style="display:flex;flex-wrap:wrap;gap:0 20px;opacity:.75">{notes}</div></div>'
    )


def _tree(widget: Any) -> Iterator[Any]:
    for child in getattr(widget, "children", ()):
        yield from _tree(child)
    for part in ("style", "layout"):
        if isinstance(getattr(widget, part, None), W.Widget):
            yield getattr(widget, part)
    yield widget
