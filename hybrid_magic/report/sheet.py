"""The sheet that a run's plots are drawn on: a Figure on an Agg canvas, its layout, its PNG.

pyplot and its global state are never touched, matplotlib is imported when a sheet is asked for.
Room is made from the length of the tick labels: matplotlib's own layout measures every text twice
and took as long as the drawing. Knows no run.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .palette import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE_INCHES, DPI = (8.6, 6.8), 140  # 1204 x 952 pixels; 11 pt stands 7.5 px high at a width of 420
_WIDTH, _HEIGHT = (72 * inches for inches in SIZE_INCHES)  # from here on in points
_TITLE, _BELOW = 24.0, 42.0  # above each plot; below it, for tick labels and the name of the axis
_EDGE, _AT_RIGHT = 6.0, 6.0  # around the sheet; for half a tick label beyond a plot's end
_NAME, _TICK = 17.0, 8.0  # the name of a vertical axis; a tick and its distance to the label
_LETTER = 0.64 * STYLE["ytick.labelsize"]  # a digit's width
_TALL = (_HEIGHT - 2 * (_TITLE + _BELOW) - _EDGE) / 2


def figure(draw: Callable[[list[Axes]], None]) -> Figure:
    """Return a Figure that shows itself as a PNG in a notebook.

    Args:
        draw: is given four empty plots, row by row, and draws on them.
    """
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        sheet = blank(*SIZE_INCHES)
        plots = [sheet.add_axes(_place(row, 0.0, 100.0)) for row in (1, 1, 0, 0)]
        draw(plots)
        _settle(plots)  # while the style holds: ticks are made here
    return sheet


def blank(width: float, height: float, **options: Any) -> Figure:
    """Return an empty Figure, in inches, that a notebook shows although pyplot was never imported;
    `options` are those of Figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class Sheet(Figure):
        """A Figure that shows itself as a PNG."""

        def _repr_png_(self) -> bytes:
            return png(self)

    made = Sheet(figsize=(width, height), dpi=DPI, **options)
    FigureCanvasAgg(made)
    return made


def nothing(axes: Axes, title: str, why: str) -> None:
    """Say on a plot why there is nothing to be drawn."""
    axes.set_title(title)
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center")


def bare(axes: Axes) -> None:
    """Leave a plot of bars without grid and ticks: numbers stand beside them."""
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="both", length=0)


def png(sheet: Figure) -> bytes:
    """Return the figure as PNG bytes, in 256 colours: a third of the size, and no eye sees it."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas, small = FigureCanvasAgg(sheet), io.BytesIO()
    with mpl.rc_context(STYLE):
        canvas.draw()  # savefig would draw it twice, and encode what is decoded here
    drawn = Image.frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba()))
    few = drawn.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    colours, ground = few.getpalette() or [], 3 * int(few.getpixel((0, 0)))  # type: ignore[arg-type]
    colours[ground : ground + 3] = [255] * 3  # the ground is averaged with what is nearly white
    few.putpalette(colours)
    few.save(small, format="png", compress_level=6)  # 9 takes eight times as long for a tenth less
    return small.getvalue()


def _settle(plots: list[Axes]) -> None:
    """Place the plots so that each column has room for its longest tick label."""
    for axes in plots:
        axes.xaxis.get_ticklabels()
    letters = [max(map(_letters, plots[column::2])) for column in (0, 1)]
    room = [_NAME + _TICK + _LETTER * longest for longest in letters]
    width = (_WIDTH - 2 * _EDGE - sum(room) - 2 * _AT_RIGHT) / 2
    left = [_EDGE + room[0], _WIDTH - _EDGE - _AT_RIGHT - width]
    for at, axes in enumerate(plots):
        row, column = divmod(at, 2)
        axes.set_position(_place(1 - row, left[column], width))
        # Where a name stands is said, else all tick labels are measured for it.
        axes.yaxis.set_label_coords((_NAME - 3.0 - room[column]) / width, 0.5)
        axes.xaxis.set_label_coords(0.5, -(_BELOW - 20.0) / _TALL)
        title = axes.set_title(axes.get_title(loc="left"))
        fits = (width + _AT_RIGHT) * DPI / 72 / max(1.0, title.get_window_extent().width)
        if fits < 1:
            title.set_fontsize(fits * STYLE["axes.titlesize"])


def _letters(axes: Axes) -> float:
    """Return how wide the tick labels at the left are, in digits."""
    said = [label.get_text() for label in axes.yaxis.get_ticklabels()]
    if axes.yaxis.get_major_formatter().get_offset():  # "1e-7" would stand in the title
        axes.yaxis.set_major_formatter("{x:.7g}")
        said = [label.get_text() for label in axes.yaxis.get_ticklabels()]
    return max((len(label) - 0.5 * sum(map(label.count, ",.")) for label in said), default=0.0)


def _place(row: int, left: float, width: float) -> Any:
    """Return a plot's place as fractions of the sheet; row 0 is the lower one."""
    bottom = _EDGE / 2 + _BELOW + row * (_TALL + _TITLE + _BELOW)
    return left / _WIDTH, bottom / _HEIGHT, width / _WIDTH, _TALL / _HEIGHT
