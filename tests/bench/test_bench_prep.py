"""`elas bench prep`: on a small corpus, all of it for real; no speed is asserted."""

import json

import pytest

from elas import cli
from elas.command import exit_status


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prep")
    for part in range(40):
        text = "".join(f"line {n} of part {part}: some words, {n * n} and {n**3 % 977}\n" for n in range(1500))
        (folder / f"{part}.txt").write_text(text)
    more = [
        "--vocab-size",
        "600",
        "--repeats",
        "1",
        "--memory",
        "2",
        "--kills",
        "2",
        "--json",
        str(folder / "facts.json"),
    ]
    assert exit_status(cli.run, ["bench", "prep", "--input", f"{folder}/*.txt", *more]) == 0
    return json.loads((folder / "facts.json").read_text())


def test_all_variants_give_the_same_tokens(facts):
    rows = {(row["tokenizer"], row["variant"]): row for row in facts["rows"]}
    assert list(rows) == [
        ("sentencepiece", "library"), ("sentencepiece", "elas"),
        ("fast", "library"), ("fast", "elas"), ("fast", "datatrove"),
    ]  # fmt: skip
    assert all(row["ok"] and row["mb_per_s"] > 0 for row in rows.values())


def test_memory_and_kills_are_told(facts):
    (memory,) = facts["memory"]
    assert memory["megabytes"] == 2 and 10 < memory["peak_rss_worker_mb"] < 2000
    assert facts["kills"]["killed"] == 2 and facts["kills"]["identical"]


@pytest.mark.parametrize("mistake", [["--memory", "big"], ["--workers", "0"], ["--repeats", "-1"]])
def test_mistakes_are_one_line(mistake, capsys):
    assert exit_status(cli.run, ["bench", "prep", *mistake]) == 2
    assert mistake[0] in capsys.readouterr().err
