"""Runs that are cut, resumed on other layouts and cut again equal one uninterrupted run of the reference.

Each relay changes what public bug reports changed (docs/results.md lists them): the layout with tensor, pipeline and
virtual-pipeline sizes, data-parallel ranks, also three, the ZeRO stage, the micro-batch; across an epoch's end, a LORO
refresh, documents of unequal length. Tolerances are `test_reference`'s.
"""

import pytest
import torch
from elas_run import rotary_angles
from elas_run import train as train_with_elas
from plain_training import train as train_plainly
from support.corpora import write_corpus
from support.ranks import run_ranks
from test_reference import BASE, LORO, TIED, deviations

pytestmark = [pytest.mark.timeout(400), pytest.mark.any_device("processes")]

SETTINGS = {
    **BASE,
    "model.num_layers": 4,
    "train.global_batch_size": 12,
    "optimizer.weight_decay": 0.5,
    "checkpoint.every_steps": 4,
    "checkpoint.keep": 0,
}


def layout(ranks: int, micro: int, zero: int, tensor=1, pipeline=1, virtual=1, sequence=False) -> tuple[int, dict]:
    sizes = {"tensor": tensor, "pipeline": pipeline, "virtual_pipeline": virtual, "sequence": sequence, "zero": zero}
    return ranks, {"train.micro_batch_size": micro, **{f"parallel.{key}": value for key, value in sizes.items()}}


LORO_RELAY = {"optimizer.exact_every": 3, "schedule.kind": "cosine_restart", "optimizer.clip_grad": 0.3}
RELAYS = {  # model and data, and the layouts of steps 1 to 4, 5 to 8, 9 and 10
    "tied documents": (
        {**TIED, "data.packing": "document"},
        layout(4, 1, 1, tensor=2, pipeline=2, virtual=2, sequence=True),
        layout(4, 1, 2, tensor=2, sequence=True),
        layout(3, 2, 1),
    ),
    # Without 2:4: moments two steps after a refresh are two gradients, and one near-tie of 2:4 moves one by 7e-3.
    "loro": (
        {**LORO, **LORO_RELAY, "sparsity.kind": "none"},
        layout(3, 2, 3),
        layout(4, 3, 0, tensor=2, pipeline=2, virtual=2),
        layout(4, 3, 2, tensor=2, sequence=True),
    ),
    "soft threshold": (
        {"sparsity.method": "soft_threshold", "model.num_query_groups": 2, "train.eval_every": 1},
        layout(3, 1, 2),
        layout(4, 6, 3, tensor=2, sequence=True),
        layout(1, 4, 0),
    ),
}


@pytest.mark.parametrize("name", RELAYS)
def test_a_relay_of_layouts_equals_the_reference(name, tmp_path):
    changes, *legs = RELAYS[name]
    corpus = write_corpus(tmp_path / "text", documents=50, shortest=2, length=60, vocab=128)
    rows, resume = [], "none"
    for number, (ranks, parallel) in enumerate(legs):
        place = {"data.train": corpus, "train.run_dir": str(tmp_path / f"leg{number}"), "checkpoint.resume": resume}
        results = run_ranks(ranks, train_with_elas, {**SETTINGS, **changes, **parallel, **place})
        run = results[0]
        assert all(rank["result"] == run["result"] for rank in results)
        assert [row["step"] for row in run["rows"]] == list(range(4 * number + 1, 11))
        rows += [row for row in run["rows"] if row["step"] <= 4 * number + 4]
        resume = str(tmp_path / f"leg{number}" / "checkpoints" / f"step_{4 * number + 4:08d}")
    record = train_plainly(run["settings"], list(zip(*run["batches"])), run["valid"])
    whole = {**run, "rows": rows, "validation": run["validation"][-1:]}
    record.valid = record.valid[-1:]
    found = deviations(whole, record)
    print({key: f"{value:.0e}" for key, value in found.items()})
    assert max(found.values()) < 1, found


def test_a_bf16_run_goes_on_bit_for_bit(tmp_path):
    """The fp32 masters come back, not weights rounded to bf16 and widened again."""
    ranks, parallel = layout(4, 3, 2, tensor=2, sequence=True)
    corpus = write_corpus(tmp_path / "text", documents=50, shortest=2, length=60, vocab=128)
    settings = {**SETTINGS, **parallel, "train.dtype": "bfloat16", "data.train": corpus}
    whole = run_ranks(ranks, train_with_elas, {**settings, "train.run_dir": str(tmp_path / "whole")})[0]
    again = {
        "train.run_dir": str(tmp_path / "again"),
        "checkpoint.resume": f"{tmp_path}/whole/checkpoints/step_00000004",
    }
    cut = run_ranks(ranks, train_with_elas, {**settings, **again})[0]
    pairs = list(zip(whole["rows"][4:], cut["rows"], strict=True))
    assert all(a[key] == b[key] for a, b in pairs for key in ("step", "tokens", "loss", "grad_norm", "lr"))
    assert all(torch.equal(tensor, cut["state"][name]) for name, tensor in whole["state"].items())


@pytest.mark.parametrize("zero", (0, 1, 3))
def test_rotary_angles_stay_fp32_in_a_bf16_model(zero):
    """In bf16, 4,095 would be 4,096, and one neighbour of a word the other."""
    angles = run_ranks(1, rotary_angles, {**BASE, "train.dtype": "bfloat16", "parallel.zero": zero}, 4096)[0]
    wide = torch.arange(4096)[:, None] * 10000 ** (-torch.arange(4, dtype=torch.float64) / 4)
    assert torch.allclose(angles.double(), wide, rtol=1e-6, atol=0)
