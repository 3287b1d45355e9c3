"""The colours of the plots, told apart by colour-blind eyes too, and the figure's style.

Drawn on white, or on the page itself: every colour here is seen on light and on dark.
Source: Okabe & Ito 2008, Color Universal Design.
"""

from __future__ import annotations

from typing import Any

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
VERMILLION, SKY, PURPLE = "#D55E00", "#56B4E9", "#CC79A7"
INK, FAINT = "#333333", "#B5B5B5"

STAGE_COLOURS = (SKY, BLUE, ORANGE, PURPLE, FAINT)  # the last: what no stage accounts for

# Every setting that a person's own matplotlib style may have changed and that is seen here.
STYLE: Any = {
    "font.family": "DejaVu Sans",  # matplotlib brings it; a list of names is searched at each text
    "font.size": 11,
    "text.color": INK,
    "text.usetex": False,
    "text.hinting": "none",  # letters in this many pixels need none; it costs a fifth of a text
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.labelsize": 11,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # said, else all that might stand in a title's way is measured
    "axes.titlepad": 6.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linestyle": "-",
    "grid.linewidth": 0.8,
    "grid.alpha": 1.0,
    "lines.linewidth": 1.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "path.sketch": None,
}
