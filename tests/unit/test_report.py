"""The report from files alone: incidents, thinning, tables, several runs, and mistakes in one line."""

import json
import math
from array import array

import numpy as np
import pytest
from support.browser import opened

from elas.cli import run as elas
from elas.errors import UserError
from elas.report import tables
from elas.report.incidents import incidents_of
from elas.report.run_files import read_runs
from elas.report.series import Axes, by_layer, thin


def rows(steps: int, *, layers: int = 3, start: float = 1e9) -> list[dict]:
    return [{"step": s, "tokens": 100 * s, "loss": 5 + 4 / s, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_s": 10.0,
             "flops": 6e5 * s, "goodput": 0.5, "start_s": 10.0, "validation_s": 0.0, "save_s": 5.0, "lost_s": 5.0,
             "memory_peak_bytes": 10**9, "sparsity": 0.5, "dropped": 0.1, "mask_flips": None,
             "layers": {"sparsity": [0.1 * n for n in range(layers)], "mask_flips": [None] * layers},
             "time": start + s} for s in range(1, steps + 1)]  # fmt: skip


def write(folder, steps: int = 20, **files):
    folder.mkdir(parents=True)
    files = {
        "metrics": rows(steps),
        "validation": [{"step": steps, "loss": 5.0, "ppl": math.exp(5), "time": 1e9}],
        **files,
    }
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "config.json").write_text(json.dumps({"train": {"steps": steps}, "optimizer": {"lr": 1e-3}}))
    return folder


def event(kind: str, step: int, time: float, **facts) -> dict:
    return {"event": kind, "step": step, "time": time, **facts}


def kinds(events: list[dict], history: list[dict] = ()) -> list[tuple[str, int]]:
    return [(one.kind, one.step) for one in incidents_of(events, list(history))]


def test_a_start_without_an_end_was_killed():
    first, second = event("start", 0, 1, layout="a"), event("start", 5, 9, layout="a", from_checkpoint="x")
    assert kinds([first, second]) == [("start", 0), ("killed", 5), ("resume", 5)]
    assert kinds([first, event("stopped", 5, 8, why="SIGTERM"), second]) == [
        ("start", 0),
        ("stopped", 5),
        ("resume", 5),
    ]
    assert kinds([first, event("failed", 5, 8, why="x"), second])[1] == ("failed", 5)


def test_another_layout_and_settings():
    events = [event("start", 0, 1, layout="a"), event("finished", 5, 2),
              event("start", 5, 3, layout="b", from_checkpoint="x")]  # fmt: skip
    history = [{"step": 5, "time": 3.5, "changed": {"optimizer.lr": [0.1, 0.2]}}]
    assert kinds(events, history)[2:] == [("resume", 5), ("layout", 5), ("settings", 5)]


def test_thinning_keeps_every_extreme():
    values = np.random.default_rng(0).normal(size=100_000)
    values[12_345], values[77_777], values[50_000:50_100] = 99.0, -99.0, np.nan
    found = thin({"x": np.arange(100_000.0), "y": values}, ["y"], 500)
    assert len(found["y"]) <= 1002 and {99.0, -99.0} <= set(found["y"])
    assert found["x"][0] == 0 and found["x"][-1] == 99_999 and (np.diff(found["x"]) > 0).all()
    few = {"x": np.arange(10.0), "y": np.arange(10.0)}
    assert thin(few, ["y"], 5) is few


def test_values_by_layer_are_means():
    found = by_layer(rows(100), "sparsity", 10)
    assert found is not None and found[0].shape == (3, 10) and found[1] == (100.0, 10_000.0)
    assert np.allclose(found[0], [[0.0], [0.1], [0.2]])
    assert by_layer(rows(5), "mask_flips", 10) is None


def test_arrays_and_lists_by_layer_give_the_same(tmp_path):
    made = rows(100)
    made[3]["layers"]["sparsity"] = [0.4, None, 0.1]
    folder = write(tmp_path / "a", metrics=made)
    (run,) = read_runs([folder])
    assert isinstance(run.metrics[0]["layers"]["sparsity"], array)
    (packed, _), (plain, _) = by_layer(run.metrics, "sparsity", 7), by_layer(made, "sparsity", 7)
    assert np.array_equal(packed, plain, equal_nan=True)
    (packed, _), (plain, _) = by_layer(run.metrics[10:], "sparsity", 7), by_layer(made[10:], "sparsity", 7)
    assert np.array_equal(packed, plain)


def test_a_chart_of_one_step_is_as_wide_as_the_run(tmp_path):
    """Also: a chart of equal values has a height of their size, and no two ticks have one label."""
    made = rows(20)
    made[9] |= {"pair_condition": 812.3, "exact_s": 0.113}
    assert elas(["report", str(write(tmp_path / "a", metrics=made)), "--output", str(tmp_path / "r.html")]) == 0
    ranges = """Object.fromEntries(Bokeh.documents.flatMap((one) => one.roots()).map((one) =>
        [one.name, [one.x_range.start, one.x_range.end, one.y_range.start, one.y_range.end]]))"""
    with opened(tmp_path / "r.html") as page:
        found = page.page.evaluate(ranges)
        page.page.click("[data-axis='step']")
        page.page.wait_for_function("Bokeh.documents.every((one) => one.is_idle)")
        by_step = page.page.evaluate(ranges)
    for title in ("Factor pairs: condition", "Time of exact steps", "Validation perplexity"):
        assert found[title][:2] == pytest.approx([0, 2000], abs=250), title
        assert by_step[title][:2] == pytest.approx([0, 20], abs=2.5), title
    assert found["Factor pairs: condition"][2:] == pytest.approx([812, 812], abs=110)
    assert found["Learning rate"][2:] == pytest.approx([1e-3, 1e-3], abs=2e-4)


def test_places_on_axes(tmp_path):
    (run,) = read_runs([write(tmp_path / "a")])
    at = Axes(run).of([{"step": 0, "time": 1e9}, {"step": 10, "time": 1e9 + 3601}])
    assert at["tokens"].tolist() == [0, 1000] and at["flops"].tolist() == [0, 6e6]
    assert at["hours"][1] - at["hours"][0] == pytest.approx(3601 / 3600)


def test_where_the_time_went_adds_up(tmp_path):
    (run,) = read_runs([write(tmp_path / "a")])
    found = {what: share for what, share, _ in tables.times(run)}
    assert sum(found.values()) == pytest.approx(1) and found["steps"] == pytest.approx(0.5)
    assert found["starting"] == pytest.approx(0.25)


def test_several_runs_in_a_browser(tmp_path):
    runs = [write(tmp_path / where / "run", steps) for where, steps in (("a", 20), ("b", 40), ("c", 7))]
    (runs[0] / "eval").mkdir()
    (runs[0] / "eval" / "wiki.json").write_text(json.dumps({"data": "wikitext", "loss": 3.21, "perplexity": 24.8}))
    (runs[1] / "DONE").write_text("{}")
    out, facts = tmp_path / "all.html", tmp_path / "facts.json"
    assert elas(["report", *map(str, runs), "--output", str(out), "--json", str(facts)]) == 0
    found = json.loads(facts.read_text())
    assert found["html"] == str(out) and [run["steps"] for run in found["runs"]] == [20, 40, 7]
    with opened(out) as page:
        assert page.errors == [] and min(page.colors().values()) > 3
        text = page.page.inner_text("body")
        for part in ("a/run", "b/run", "c/run", "Settings that differ", "train.steps", "wikitext", "24.8", "finished"):
            assert part in text
        page.page.click("[data-hides='run:b/run']")
        seen = page.page.evaluate("Bokeh.documents[0].roots()[0].renderers.filter((one) => !one.visible).length")
        assert seen >= 1


def test_names_in_html_are_text(tmp_path):
    folder = write(tmp_path / "<script>alert(1)</script>", events=[event("failed", 3, 1e9, why="</script><b>x")])
    assert elas(["report", str(folder), "--output", str(tmp_path / "r.html")]) == 0
    with opened(tmp_path / "r.html") as page:
        assert page.errors == [] and page.page.locator("td b").count() == 0
        assert "</script><b>x" in page.page.inner_text("body")


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda tmp: tmp / "none", "does not exist"),
        (lambda tmp: write(tmp / "runs" / "x").parent, "did you mean"),
        (lambda tmp: write(tmp / "x", metrics=[]), "no step in metrics.jsonl yet"),
        (lambda tmp: write(tmp / "x") / "metrics.jsonl", "is a file"),
    ],
)
def test_what_is_no_run(tmp_path, make, said):
    with pytest.raises(UserError, match=said):
        elas(["report", str(make(tmp_path))])


def test_nothing_is_overwritten(tmp_path):
    run, notes = write(tmp_path / "x"), tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(UserError, match="nothing is overwritten"):
        elas(["report", str(run), "--output", str(notes)])
    with pytest.raises(UserError, match="is given twice"):
        elas(["report", str(run), str(run)])
    with pytest.raises(UserError, match="is a folder"):
        elas(["report", str(run), "--output", str(tmp_path)])
    assert notes.read_text() == "mine"


def test_damaged_lines_and_values(tmp_path):
    run = write(tmp_path / "x", 30)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "tokens": 3100, "loss": null}\n{"step": 32, "tok')
    (run / "config.json").write_text("[")
    (run / "run.json").write_text("")
    assert elas(["report", str(run)]) == 0
    assert (run / "report.html").stat().st_size > 10**6
