"""The example training loops train: losses fall, layouts agree, and checkpoints come back bit by bit."""

import re
import sys

import pytest
from started import copied, start, torchrun

pytestmark = pytest.mark.timeout(600)


def steps_of(output: str) -> dict[int, float]:
    """Losses by step."""
    return {int(step): float(loss) for step, loss in re.findall(r"^step (\d+) loss ([\d.]+)", output, re.MULTILINE)}


def test_megatron_cores_loop(tmp_path):
    """Tensor parallel, saved in the middle and read by data-parallel ranks: losses as without a stop, to 2e-5.

    2:4 begins after step 4, so the last losses also require that the step came back with the weights.
    """
    example, checkpoint = copied("megatron_core_loop.py", tmp_path), tmp_path / "checkpoint"
    whole = start([*torchrun(2), example, "--tensor", 2, "--steps", 16], tmp_path, 180)
    first = start([*torchrun(2), example, "--tensor", 2, "--steps", 12, "--save", checkpoint], tmp_path, 180)
    then = start([*torchrun(2), example, "--steps", 16, "--load", checkpoint], tmp_path, 180)
    losses = steps_of(whole)
    assert sorted(losses) == list(range(1, 17)) and losses[16] < losses[1] - 1.0  # from log 128 = 4.85
    parts = steps_of(first) | steps_of(then)
    assert sorted(steps_of(then)) == [13, 14, 15, 16] and sorted(parts) == sorted(losses)
    assert all(parts[step] == pytest.approx(losses[step], rel=2e-5) for step in losses), (losses, parts)
    weights, differ = re.search(r"^reloaded: (\d+) weights a rank, (\d+) of all differ", first, re.MULTILINE).groups()
    assert int(weights) > 20 and int(differ) == 0


@pytest.mark.parametrize("way", ["Trainer alone", "ZeRO stage 1"])
def test_trainer(tmp_path, way):
    """One process of the Trainer, and two with DeepSpeed: the loss falls by more than half of its fall to 1.1."""
    pytest.importorskip("accelerate")
    example = copied("hf_trainer.py", tmp_path)
    command = [sys.executable, example] if way == "Trainer alone" else [*torchrun(2), example, "--deepspeed"]
    output = start([*command, "--steps", 20], tmp_path, 180)
    found = re.search(r"^(.*), processes: (\d), loss: ([\d.]+) to ([\d.]+) in 20 steps", output, re.MULTILINE)
    assert found is not None, output
    assert (found[1], found[2]) == (way, "1" if way == "Trainer alone" else "2")
    assert float(found[3]) < 4.3 and float(found[4]) < float(found[3]) - 1.2  # from log 64 = 4.16
