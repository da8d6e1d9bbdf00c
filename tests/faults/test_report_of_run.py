"""The report of a real run that was killed, resumed on another layout and skipped a step, in a real browser."""

import pytest
import spikes
from support.browser import opened
from support.corpora import SMALL, write_corpus
from support.ranks import run_ranks
from support.training_processes import rows, start, wait_for_step

from elas.report.cli import main
from elas.report.run_files import read_runs

pytestmark = pytest.mark.timeout(300)
SETTINGS = {"optimizer.kind": "loro", "optimizer.exact_every": 4, "schedule.kind": "cosine_restart",
            "log.pairs_every_steps": 4, "train.timeout_seconds": None, "train.eval_every": 5}  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    corpus = write_corpus(folder / "corpus" / "text", documents=200)
    settings = {
        **SMALL,
        **SETTINGS,
        "data.train": corpus,
        "data.split": "90,10,0",
        "train.run_dir": str(folder / "run"),
    }
    settings["train.steps"] = 16
    ranks = start(settings)
    wait_for_step(folder / "run", 5, ranks)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.communicate()
    outcome, _ = run_ranks(2, spikes.train, {**settings, "parallel.tensor": 2}, (), (4,))[0]
    assert "RunResult(step=16" in outcome
    return folder / "run"


def test_incidents_are_in_place(run_dir):
    (run,) = read_runs([run_dir])
    kinds = [one.kind for one in run.incidents]
    assert kinds[0] == "start" and kinds[-1] == "finished" and run.state == "finished"
    assert sorted(kinds[1:-1]) == ["killed", "layout", "resume", "settings", "settings", "skipped"]
    by_kind = {one.kind: one for one in run.incidents}
    assert by_kind["resume"].step == 3 and by_kind["skipped"].step == 3 + 4
    assert "DP 2" in by_kind["layout"].text and "→ TP 2" in by_kind["layout"].text
    settings = [one.text for one in run.incidents if one.kind == "settings"]
    assert settings == ["parallel.tensor: 1 → 2", "parallel.zero: 1 → null"]
    assert len(rows(run_dir, "events")) == 4  # two starts, a skipped step, the end


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_in_a_browser(run_dir, tmp_path, width, scheme):
    target = tmp_path / "report.html"
    assert main([str(run_dir), "--output", str(target)]) == 0
    with opened(target, width=width, scheme=scheme) as page:
        assert page.errors == [] and page.hangs_over() <= 0
        colors = page.colors()
        assert len(colors) >= 14 and min(colors.values()) > 3, colors
        lit = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert lit == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(13, 17, 23)")
        for axis in ("hours", "flops", "step"):
            page.page.click(f"[data-axis={axis}]")
            drawn = page.page.evaluate("Bokeh.documents[0].roots()[0].renderers[0].glyph.x.field")
            assert drawn == axis
        page.page.locator(".chart[data-title=Loss] button").first.click()
        assert not page.page.evaluate("Bokeh.documents[0].roots()[0].renderers[0].visible")
        said = hover(page.page, "Gradient norm")
        assert "norm" in said and "value" in said and "step skipped after step 7" in said
        assert page.errors == []


PRINTED = """() => [...document.querySelectorAll("figure.chart")].map((figure) => {
  const picture = figure.querySelector("canvas.printed"), box = picture.getBoundingClientRect()
  const frame = figure.getBoundingClientRect(), plot = figure.querySelector("[data-root-id]").getBoundingClientRect()
  const {data} = picture.getContext("2d").getImageData(0, 0, picture.width, picture.height)
  const colors = new Set()
  for (let at = 0; at < data.length; at += 4) colors.add(data.slice(at, at + 4).join())
  return {inside: box.width > 0.8 * frame.width && box.right <= frame.right && box.bottom <= frame.bottom,
    hidden: plot.width == 0, colors: colors.size, right: frame.right}
})"""


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("paper", [718, 624])
def test_on_paper(run_dir, tmp_path, width, paper):
    """A4 with a browser's margins, and a letter with wide ones: every chart is whole, within its frame."""
    target = tmp_path / "report.html"
    assert main([str(run_dir), "--output", str(target)]) == 0
    with opened(target, width=width, scheme="light") as page:
        page.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.page.emulate_media(media="print")
        page.page.set_viewport_size({"width": paper, "height": 1000})
        charts = page.page.evaluate(PRINTED)
        assert len(charts) >= 14
        assert all(one["inside"] and one["hidden"] and one["right"] <= paper + 1 for one in charts), charts
        assert min(one["colors"] for one in charts) > 3, charts
        page.page.emulate_media(media="screen")
        page.page.evaluate("dispatchEvent(new Event('afterprint'))")
        page.page.set_viewport_size({"width": width, "height": 1000})
        assert page.page.locator(".printed, .paper").count() == 0 and page.errors == []
        page.page.wait_for_timeout(500)
        assert min(page.colors().values()) > 3 and page.hangs_over() <= 0


def hover(page, title: str) -> str:
    """All that tooltips say while the mouse goes over a chart from left to right."""
    chart, said = page.locator(f".chart[data-title='{title}']"), ""
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    for x in range(0, int(box["width"]), 3):
        page.mouse.move(box["x"] + x, box["y"] + box["height"] / 2)
        tips = page.locator(".bk-Tooltip")
        said += " ".join(tips.evaluate_all("(all) => all.map((one) => one.shadowRoot.textContent)"))
    return said
