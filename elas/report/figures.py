"""What all charts share: bokeh's figure, colors and labels.

Colors of text and grids are the page's, set by its script, so that they follow it into dark mode.
"""

from dataclasses import dataclass
from typing import Any

from bokeh.models import CustomJSTickFormatter
from bokeh.plotting import figure

COLORS = ("#3b7dc4", "#d0603f", "#4f9a5a", "#b58a2c", "#8d6cc0", "#2f9e9e", "#c25a8e", "#7d8590")
"""Legible on white and on near-black."""
DASHES = ("solid", "dashed", "dotted", "dotdash")
_SI = """
const a = Math.abs(tick)
if (a == 0) return "0"
const apart = ticks.length > 1 ? Math.abs(ticks[1] - ticks[0]) : a
const digits = Math.min(6, Math.max(3, Math.ceil(Math.log10(a / apart)) + 1))  // as many as ticks need to differ
if (a >= 1e15 || a < 1e-3) return tick.toExponential(1).replace("+", "")
for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
  if (a >= size) return Number((tick / size).toPrecision(digits)) + unit
return String(Number(tick.toPrecision(digits)))
"""


@dataclass(frozen=True)
class Chart:
    """A figure and its place on the page."""

    title: str
    note: str
    figure: Any
    legend: tuple[tuple[str, str, str], ...] = ()
    """Label, color and dash of each line; of several runs, whose colors the page explains, without a color."""
    wide: bool = False


def new_figure(title: str, **options: Any) -> Any:
    """An empty figure as wide as its place; neither dragging nor scrolling is taken from the page."""
    made = figure(
        height=280,
        sizing_mode="stretch_width",
        tools="box_zoom,xwheel_zoom,pan,reset,save",
        active_drag=None,
        active_scroll=None,
        toolbar_location="above",
        toolbar_inner=True,
        **options,
    )
    made.name = title
    made.toolbar.logo = None
    made.toolbar.autohide = True
    made.background_fill_alpha = made.border_fill_alpha = 0.0
    made.outline_line_color = None
    made.min_border_right = 16
    return made


def short_numbers() -> CustomJSTickFormatter:
    """Labels such as 12.5M."""
    return CustomJSTickFormatter(code=_SI)
