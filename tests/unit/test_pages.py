"""Figures in README and docs are those of the result files, and the result files those of today's settings."""

import sys
from pathlib import Path

import pytest

from elas.config import load_config
from elas.quickstart import settings_of

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "docs" / "experiments"))

import pages  # noqa: E402  (found through the path above)

MEASURE_AGAIN = "measure again: elas quickstart --workdir NEW --json docs/experiments/results/quickstart.json"


@pytest.mark.parametrize("name", pages.PAGES)
def test_pages_show_the_result_files(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert pages.rendered(text) == text, "run python docs/experiments/pages.py"


def test_every_block_is_shown():
    shown = {match[2] for name in pages.PAGES for match in pages._BLOCK.finditer((ROOT / name).read_text())}
    assert shown == set(pages.BLOCKS)


def test_changed_figure_in_a_page_is_noticed():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert pages.rendered(text.replace("validation perplexity ", "validation perplexity 1")) == text


def test_quickstart_was_measured_with_todays_preset():
    """Every setting of the preset, so that a new rate without a new measurement fails here."""
    assert pages.read("quickstart")["settings"] == settings_of(load_config("quickstart")), MEASURE_AGAIN


def test_quickstart_rate_holds_for_seeds_and_corpora():
    """Every seed measured, on both corpora: within 12 % of each other and of the figure in README.

    The aim is 5 %: corpora differ by 1.5 %, seeds by 10 % so far (docs/results.md).
    """
    rate = load_config("quickstart").optimizer.lr
    rows = [row for row in pages.read("quickstart_rates")["rows"] if row["lr"] == rate]
    assert {row["corpus"] for row in rows} == {"stdlib", "stdlib_less_20"}
    ppl = [row["ppl"] for row in rows] + [pages.read("quickstart")["val_ppl_end"]]
    assert max(ppl) <= 1.12 * min(ppl), MEASURE_AGAIN
