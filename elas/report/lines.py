"""Charts of lines: quantities of one run, or of several, over any of AXES.

Their figures have the tag `axes`: each glyph has all of AXES as columns, and the page's script changes which one is x.
Renderers have the tags `run:NAME` and `line:LABEL`, by which the page's legends hide them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import (
    BasicTickFormatter,
    ColumnDataSource,
    HoverTool,
    LinearScale,
    NumeralTickFormatter,
    Scatter,
    VSpan,
)

from elas.report.figures import COLORS, DASHES, Chart, new_figure, short_numbers
from elas.report.incidents import KINDS, ORDINARY
from elas.report.run_files import RunFiles
from elas.report.series import Axes, Columns, column, thin

ALARMS = {"killed": "#d0362f", "failed": "#d0362f", "rollback": "#d0362f", "skipped": "#e08a1e"}
"""Colors of incidents; others are gray."""
POINTS = 2000
"""Rows of a line, over all runs."""
OF_FEW_STEPS = ("exact_s", "pair_condition", "pair_norm_ratio", "effective_rank")
"""Keys that few rows have; the line goes from one to the next."""


@dataclass(frozen=True)
class Line:
    """One quantity."""

    label: str
    key: str
    """Of a row."""
    validation: bool = False
    """From validation.jsonl, drawn with its points."""
    scale: float = 1.0


@dataclass(frozen=True)
class LineChart:
    """What to draw."""

    title: str
    note: str
    lines: Sequence[Line]
    log: bool = False
    zero: bool = False
    """The scale begins at 0."""
    percent: bool = False
    points: str = ""
    """Key of the rows that are also drawn as points on the first line."""
    wide: bool = False


class LineCharts:
    """Draws charts of the same runs.

    Args:
        runs: each with at least one row of metrics.
    """

    def __init__(self, runs: list[RunFiles]):
        self.runs, self.axes = runs, [Axes(run) for run in runs]
        self._marks = [_marks(run, axes) for run, axes in zip(runs, self.axes)]

    def draw(self, chart: LineChart) -> Chart | None:
        """One chart; None if no run has a value for it."""
        made = new_figure(chart.title, y_axis_type="log" if chart.log else "linear", x_axis_label="tokens")
        made.tags = ["axes"]
        drawn: list[Any] = []
        used: dict[int, None] = {}
        for number in range(len(self.runs)):
            for index, line in enumerate(chart.lines):
                if renderer := self._line(made, number, index, line, chart.log):
                    drawn.append(renderer)
                    used[index] = None
            if chart.points:
                self._points(made, number, chart.points, chart.lines[0])
        if not drawn:
            return None
        value = "@y{0.[00]%}" if chart.percent else "@y{0,0.[0000]}"
        tips = [("", "$name"), ("value", value), ("step", "@step{0,0}"), ("tokens", "@tokens{0,0}")]
        made.add_tools(HoverTool(renderers=drawn, tooltips=tips, mode="vline", line_policy="nearest"))
        _scales(made, chart)
        self._widen(made, [renderer.data_source.data for renderer in drawn], chart.log)
        self._incidents(made)
        return Chart(chart.title, chart.note, made, self._legend(chart, list(used)), chart.wide)

    def _line(self, made: Any, number: int, index: int, line: Line, log: bool) -> Any:
        run, one = self.runs[number], len(self.runs) == 1
        columns = _columns(run, self.axes[number], line, max(200, POINTS // len(self.runs)), log)
        if columns is None:
            return None
        source, color = ColumnDataSource(columns), COLORS[(index if one else number) % len(COLORS)]
        label = line.label if one else f"{run.name}: {line.label}"
        dash = DASHES[0 if one else index]
        drawn = [made.line("tokens", "y", source=source, color=color, line_width=1.6, line_dash=dash, name=label)]
        if line.validation or len(columns["y"]) == 1:
            drawn.append(made.scatter("tokens", "y", source=source, color=color, size=5))
        for renderer in drawn:
            renderer.tags = [f"run:{run.name}", f"line:{line.label}"]
        return drawn[0]

    def _points(self, made: Any, number: int, key: str, line: Line) -> None:
        rows = self.runs[number].metrics
        chosen = ~np.isnan(column(rows, key))
        if chosen.any():
            columns = {**self.axes[number].of(rows), "y": column(rows, line.key)}
            source = ColumnDataSource({name: one[chosen] for name, one in columns.items()})
            made.add_glyph(source, Scatter(x="tokens", y="y", size=4, fill_color=COLORS[1], line_color=None))

    def _widen(self, made: Any, drawn: list[Columns], log: bool) -> None:
        """Give a chart of one step the width of the runs, and one of equal values a height of their size.

        Else bokeh shows one token, or one unit, to either side.
        """
        y, steps = (np.unique(np.concatenate([columns[name] for columns in drawn])) for name in ("y", "step"))
        y = y[~np.isnan(y)]
        if len(y) == 1 and not log:
            made.y_range.default_span = 0.2 * abs(float(y[0])) or 1.0
        if len(steps) == 1:
            ends = [axes.end for axes in self.axes]
            whole = {name: [0.0, max(end[name] for end in ends) or 1.0] for name in ends[0]}
            made.scatter("tokens", "y", source=ColumnDataSource({**whole, "y": [float(y[0])] * 2}), alpha=0.0)

    def _incidents(self, made: Any) -> None:
        for run, source in zip(self.runs, self._marks):
            if source is not None:
                span = VSpan(x="tokens", line_color="color", line_dash=[3, 3], line_width=1.4, line_alpha=0.9)
                glyph = made.add_glyph(source, span)
                glyph.tags = [f"run:{run.name}"]
                made.add_tools(HoverTool(renderers=[glyph], tooltips="@text"))

    def _legend(self, chart: LineChart, used: list[int]) -> tuple[tuple[str, str, str], ...]:
        if len(used) < 2:
            return ()
        if len(self.runs) == 1:
            return tuple((chart.lines[i].label, COLORS[i % len(COLORS)], DASHES[0]) for i in used)
        return tuple((chart.lines[i].label, "", DASHES[i]) for i in used)


def _marks(run: RunFiles, axes: Axes) -> ColumnDataSource | None:
    """Where the incidents of a run are; None without any out of the ordinary."""
    shown = [one for one in run.incidents if one.kind not in ORDINARY]
    shown.sort(key=lambda one: one.kind in ALARMS)  # drawn last, where several are at one step
    if not shown:
        return None
    at = axes.at(np.array([one.step for one in shown], float), np.array([one.time for one in shown], float))
    texts = [f"{KINDS[one.kind]} after step {one.step:,}: {one.text}" for one in shown]
    return ColumnDataSource({**at, "text": texts, "color": [ALARMS.get(one.kind, "#8b949e") for one in shown]})


def _columns(run: RunFiles, axes: Axes, line: Line, points: int, log: bool) -> Columns | None:
    rows = run.validation if line.validation else run.metrics
    values = column(rows, line.key) * line.scale
    if log:
        values[values <= 0] = np.nan  # a logarithm has no place for them
    if not len(values) or np.isnan(values).all():
        return None
    columns = {**axes.of(rows), "y": values}
    if line.key in OF_FEW_STEPS:
        columns = {name: one[~np.isnan(values)] for name, one in columns.items()}
    return thin(columns, ["y"], points // 2)


def _scales(made: Any, chart: LineChart) -> None:
    made.xaxis.formatter = short_numbers()
    if chart.percent:
        made.yaxis.formatter = NumeralTickFormatter(format="0.[0]%")
    elif isinstance(made.y_scale, LinearScale):  # as many digits as the ticks need to differ
        made.yaxis.formatter = BasicTickFormatter(use_scientific=False)
    else:
        made.yaxis.formatter = short_numbers()
    if chart.zero:
        made.y_range.start = 0
