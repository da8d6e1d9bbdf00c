"""A step waits for the device once, and one that is abandoned leaves nothing behind."""

import pytest
import stepping
from support.ranks import run_ranks

pytestmark = [pytest.mark.timeout(300), pytest.mark.any_device("processes")]
LAYOUTS = {
    "ZeRO 0": {"parallel.zero": 0},
    "ZeRO 0, bf16": {"parallel.zero": 0, "train.dtype": "bfloat16"},
    "ZeRO 1": {"parallel.zero": 1},
    "ZeRO 1, bf16": {"parallel.zero": 1, "train.dtype": "bfloat16"},
    "TP 2": {"parallel.tensor": 2, "parallel.sequence": True},
    "PP 2": {"parallel.pipeline": 2, "model.tie_embeddings": True},
    "PP 2, documents": {"parallel.pipeline": 2, "data.packing": "document"},
}
IN_ONE = {
    "ZeRO 2": {"parallel.zero": 2},
    "ZeRO 3": {"parallel.zero": 3, "data.packing": "document"},
    "ZeRO 0, documents": {"parallel.zero": 0, "data.packing": "document"},
}


@pytest.mark.parametrize("name", {**LAYOUTS, **IN_ONE})
def test_the_host_reads_the_device_once_a_step(name):
    """DeepSpeed's own reads are not ours to bound; they are printed."""
    for of_step, of_evaluation in run_ranks(2, stepping.reads_of_a_step, {**LAYOUTS, **IN_ONE}[name]):
        ours = [reader for reader in of_step if reader.startswith(("elas.", "tests"))]
        print(name, len(of_step), of_step)
        assert ours == ["elas.engine.engine._settle"]
        assert [reader for reader in of_evaluation if reader.startswith("elas.")] == ["elas.engine.engine.evaluate"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_abandoned_step_leaves_nothing_behind(name):
    """A rank that skips its passes has no gradients, but the others reduce theirs with it."""
    expected = run_ranks(2, stepping.two_steps, LAYOUTS[name])
    for knows in range(2):
        for rank, (results, why, stayed) in enumerate(run_ranks(2, stepping.abandon, LAYOUTS[name], knows)):
            assert why == ["SIGUSR1"] and stayed
            assert results == expected[rank]
