"""Kill −9 and start again: the curve is the one of a run never killed, to the last digit."""

import blown_up
import pytest
from support.corpora import SMALL, write_corpus
from support.training_processes import curve, finish, rows, start, validations, wait_for_step

from elas.extensions import prebuild_deepspeed

pytestmark = [pytest.mark.timeout(300), pytest.mark.any_device("processes")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    prebuild_deepspeed()
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


LORO = {"optimizer.kind": "loro", "optimizer.exact_every": 4, "schedule.kind": "cosine_restart"}
"""Killed at 5 and resumed from 3: across the exact step and the refresh at 4, and into the cycle's ramp."""


@pytest.mark.parametrize("zero, more", [(1, {}), (3, {}), (2, LORO)], ids=["zero1", "zero3", "zero2-loro"])
def test_a_killed_run_continues_exactly(corpus, tmp_path, zero, more):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = {
        **SMALL,
        "data.train": corpus,
        "data.split": "90,10,0",
        "parallel.zero": zero,
        "train.dtype": "bfloat16",
        **more,
    }
    finish(start({**settings, "train.run_dir": whole}))

    ranks = start({**settings, "train.run_dir": killed})
    wait_for_step(killed, 5, ranks)  # past the save at step 3, before the next one
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.communicate()
    done = rows(killed)[-1]["step"]
    assert done < SMALL["train.steps"]

    output = finish(start({**settings, "train.run_dir": killed}))
    assert "resumed from" in output
    assert curve(killed) == curve(whole)
    assert len(curve(whole)) == SMALL["train.steps"]
    before, after = rows(whole)[-1], rows(killed)[-1]
    assert after["flops"] == before["flops"] > 0
    assert 0 < after["goodput"] < 1 and after["lost_s"] > 0  # of the steps after the save, and until the second start
    exact = [row["step"] for row in rows(whole) if row.get("exact_pairs")]
    assert exact == ([4, 8] if more else [])
    assert validations(killed) == validations(whole)

    # A finished run started again has nothing to do, and says so.
    assert "already trained to step 10; nothing to do" in finish(start({**settings, "train.run_dir": killed}))
    assert curve(killed) == curve(whole)
    assert validations(killed) == validations(whole)

    # More steps, but a byte of the newest checkpoint is another: the run goes on from the one before, and says so.
    damaged = killed / "checkpoints" / "step_00000010" / "__1_0.distcp"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    output = finish(start({**settings, "train.run_dir": killed, "train.steps": 12}))
    assert f"skipped {damaged.parent}: __1_0.distcp is damaged" in output
    assert "changed from step 10 on: train.steps=12 (was 10)" in output
    (change,) = rows(killed, "config_history")
    assert (change["step"], change["changed"]) == (9, {"train.steps": [10, 12]})
    assert "at step 9" in output and curve(killed)[:9] == curve(whole)[:9] and len(curve(killed)) == 12


def test_weights_that_blew_up_are_never_saved(corpus, tmp_path):
    """The one training loss there is was taken from good weights; validation tells."""
    settings = {**SMALL, "data.train": corpus, "data.split": "90,10,0", "train.run_dir": tmp_path, "train.steps": 1}
    (rank,) = start(settings, ranks=1, program=blown_up.__file__)
    output = rank.communicate(timeout=200)[0]
    assert rank.returncode == 1 and "Traceback" not in output
    assert "error: step 1: validation loss nan; lower optimizer.lr" in output
    assert "no checkpoint was written" in output and not list(tmp_path.glob("checkpoints/step_*"))
    assert [row["step"] for row in rows(tmp_path, "validation")] == [0]


def test_two_runs_in_one_folder_are_refused(corpus, tmp_path):
    from elas.config import load_config
    from elas.run_dir import claim

    settings = {**SMALL, "data.train": corpus, "data.split": "90,10,0", "train.run_dir": str(tmp_path)}
    lock = claim(load_config(None, settings))
    (rank,) = start(settings, ranks=1)
    output = rank.communicate(timeout=200)[0]
    lock.release()
    assert rank.returncode == 2 and "another run is writing there" in output
    assert rows(tmp_path) == []
