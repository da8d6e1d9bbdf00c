"""Figures in README and docs are those of the result files, and the result files those of today's settings."""

import sys
from pathlib import Path

import pytest

from elas.config import Config, load_config
from elas.config.replaced import successor
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


def with_new_keys(recorded: dict) -> dict:
    """Settings of a result by the keys of today, with the defaults of those added after it, which change nothing."""
    return {**settings_of(Config()), **dict(successor(key, value) for key, value in recorded.items())}


def test_quickstart_was_measured_with_todays_preset():
    """Every setting of the preset, so that a new rate without a new measurement fails here."""
    measured = with_new_keys(pages.read("quickstart")["settings"])
    assert measured == settings_of(load_config("quickstart")), MEASURE_AGAIN


def test_quickstart_holds_for_seeds_and_corpora():
    """Three seeds on both corpora, with today's preset: within 9 % of each other and of the figure in README."""
    study, preset = pages.read("quickstart_rates"), load_config("quickstart")
    assert with_new_keys(study["settings"]) == settings_of(preset), (
        "measure again: python docs/experiments/quickstart.py"
    )
    rows = {(row["corpus"], row["seed"]): row["ppl"] for row in study["rows"] if row["lr"] == preset.optimizer.lr}
    assert rows.keys() >= {(corpus, seed) for corpus in ("stdlib", "stdlib_less_20") for seed in (1, 2, 3)}
    ppl = [*rows.values(), pages.read("quickstart")["val_ppl_end"]]
    assert max(ppl) <= 1.09 * min(ppl), MEASURE_AGAIN
