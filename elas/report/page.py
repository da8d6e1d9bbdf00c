"""Makes the page: one HTML file with its style, its script, bokeh's script and all values inside."""

from pathlib import Path
from typing import Any

from elas.errors import UserError
from elas.report import tables
from elas.report.charts import charts_of
from elas.report.figures import COLORS
from elas.report.run_files import RunFiles

HERE = Path(__file__).resolve().parent


def write_page(runs: list[RunFiles], target: Path) -> Path:
    """Write the report of one or several runs to `target`; returns it.

    Raises:
        UserError: the file cannot be written.
    """
    text = page(runs)
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        partial.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); give another path with --output") from error
    return target


def page(runs: list[RunFiles]) -> str:
    """The page as text."""
    import jinja2
    from bokeh.embed import components
    from bokeh.resources import Resources

    from elas import __version__

    charts = charts_of(runs)
    script, places = components({str(number): chart.figure for number, chart in enumerate(charts)})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    values: dict[str, Any] = {
        "title": ", ".join(run.name for run in runs),
        "runs": [{**_of_run(run), "color": COLORS[number % len(COLORS)]} for number, run in enumerate(runs)],
        "comparison": tables.comparison(runs) if len(runs) > 1 else [],
        "charts": [(chart, places[str(number)]) for number, chart in enumerate(charts)],
        "differences": tables.differences(runs) if len(runs) > 1 else [],
        "bokeh": Resources(mode="inline", components=["bokeh"]).render_js(),
        "script": script,
        "page_script": (HERE / "page.js").read_text(),
        "style": (HERE / "page.css").read_text(),
        "version": __version__,
    }
    return environment.get_template("page.html").render(values)


def _of_run(run: RunFiles) -> dict[str, Any]:
    incidents, more = tables.incidents(run)
    return {
        "name": run.name,
        "state": run.state,
        "about": tables.facts_line(run),
        "dates": tables.dates(run),
        "cards": tables.summary(run),
        "times": tables.times(run),
        "plan": tables.plan(run),
        "incidents": incidents,
        "more_incidents": more,
        "evaluations": tables.evaluations(run),
        "settings": tables.settings(run),
    }
