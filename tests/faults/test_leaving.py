"""Asked to stop in the middle of a step or a validation, all ranks leave it, and the run stands after the step before.

Losses of a run that was left and went on equal those of one process that was not, within 2e-5: a layout changes only
the order of fp32 sums (`tests/parity`).
"""

import leaving
import pytest
from support.corpora import SMALL, write_corpus
from support.ranks import run_ranks

TENSOR, PIPELINE, ZERO = "parallel.tensor", "parallel.pipeline", "parallel.zero"
LAYOUTS = {
    "dp2-zero1": {ZERO: 1},
    "dp2-zero2": {ZERO: 2},
    "dp2-zero3": {ZERO: 3},
    "tp2-sp": {TENSOR: 2, "parallel.sequence": True},
    "pp2": {PIPELINE: 2},
    "pp2-vpp2": {PIPELINE: 2, "parallel.virtual_pipeline": 2},
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("leaving")
    more = {"model.num_layers": 4, "train.micro_batch_size": 1, "train.global_batch_size": 16, "train.steps": 2}
    more |= {"checkpoint.every_steps": 0, "train.eval_every": 1, "train.timeout_seconds": 100.0}
    more |= {"data.train": write_corpus(folder / "text"), "data.split": "90,10,0", "train.run_dir": str(folder)}
    return {**SMALL, **more}


@pytest.fixture(scope="module")
def whole(settings) -> tuple[dict, dict]:
    """Losses and validation losses of one process that nothing disturbs."""
    folder = {"train.run_dir": settings["train.run_dir"] + "/whole"}
    (((_, _, _, _, losses, valid),),) = [
        list(found.values())
        for found in run_ranks(1, leaving.leave_and_go_on, {**settings, **folder}, {"": {}}, -1, "step 2", 3)
    ]
    return losses, valid


def check(found: dict, whole: tuple[dict, dict], due: bool | None) -> None:
    for name, (step, stopped, _, noted, losses, valid) in found.items():
        assert (step, stopped, noted) == (1, "SIGTERM", due), name
        assert losses == pytest.approx(whole[0], rel=2e-5), name
        assert valid == pytest.approx(whole[1], rel=2e-5), name


@pytest.mark.timeout(400)
def test_a_step_is_left_on_every_layout(settings, whole):
    results = run_ranks(2, leaving.leave_and_go_on, settings, LAYOUTS, 1, "step 2", 3, timeout=350)
    for found in results:
        check(found, whole, None)
    for name, (_, _, computed, *_) in results[1].items():  # the rank that was asked
        assert computed == 0, name
    for name in ("tp2-sp", "dp2-zero2", "dp2-zero3"):  # ranks that compute together leave together
        assert results[0][name][2] == 0


@pytest.mark.timeout(300)
def test_a_validation_is_left_and_made_up_for(settings, whole):
    layouts = {name: LAYOUTS[name] for name in ("dp2-zero3", "pp2")}
    more = {**settings, "train.run_dir": settings["train.run_dir"] + "/validation"}
    for found in run_ranks(2, leaving.leave_and_go_on, more, layouts, 0, "validation", 2, timeout=250):
        check(found, whole, True)
