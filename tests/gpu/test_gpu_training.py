"""Training on a GPU against the CPU, resuming across them, saves in the background, NCCL: by `elas gpu-check`."""

import json

import pytest

from elas import cli
from elas.command import exit_status

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    arguments = ["--parts", "training,NCCL", "--out", str(folder / "out"), "--json", str(folder / "facts.json")]
    status = exit_status(cli.run, ["gpu-check", *arguments])
    facts = json.loads((folder / "facts.json").read_text())
    assert status == (1 if facts["counts"]["wrong"] else 0)
    return facts["rows"]


def test_nothing_is_wrong(rows):
    assert [(row["what"], row["reason"]) for row in rows if row["result"] == "wrong"] == []


def test_every_comparison_was_made(rows):
    right = {row["group"] for row in rows if row["result"] == "right"}
    assert right >= {
        "GPU float32 against CPU",
        "GPU float32 against CPU, AdamW",
        "GPU bfloat16 against float32",
        "GPU checkpoint continued on CPU",
        "CPU checkpoint continued on GPU",
        "GPU checkpoints saved in the background",
    }


def test_several_ranks_on_one_gpu_say_why_they_were_not_run(rows):
    left_out = [row for row in rows if row["part"] == "NCCL" and row["result"] == "not run"]
    assert all("NCCL takes one rank for each" in row["reason"] for row in left_out)
