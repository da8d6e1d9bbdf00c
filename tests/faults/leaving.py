"""What the tests of stopping in the middle of a step run on each rank."""

import os
import signal
import time
from pathlib import Path


def leave_and_go_on(settings: dict, layouts: dict[str, dict], victim: int, operation: str, number: int) -> dict:
    """Train with each layout, send one rank SIGTERM in the middle, then start again and train to the end.

    Args:
        settings: configuration by dotted key; `train.run_dir` is the folder of all runs.
        layouts: more settings, by name.
        victim: the rank that gets the signal.
        operation: the one it gets it in, by its name in `MicroBatches.begin`,
        number: and before which of its passes.

    Returns:
        By layout: step and reason of the first end, passes that this rank computed after the signal, the manifest's
        `validation_due`, and the losses and validation losses of the whole run, by step.
    """
    return {name: _one(settings, name, layout, victim, operation, number) for name, layout in layouts.items()}


def _one(settings: dict, name: str, layout: dict, victim: int, operation: str, number: int) -> tuple:
    from elas import parallel
    from elas.checkpoint.choose import find_checkpoint
    from elas.checkpoint.folder import read_checkpoint
    from elas.config import load_config
    from elas.engine import micro_batches
    from elas.files import read_jsonl
    from elas.train.loop import run

    folder = Path(settings["train.run_dir"]) / name
    config = load_config(None, {**settings, **layout, "train.run_dir": str(folder)})
    real, look_s = micro_batches.MicroBatches.next, micro_batches.LOOK_S
    computed, sent = [0], []

    def next_pass(self, group) -> bool:
        here = self._operation == operation
        if here and not sent and self._done + 1 == number and read_jsonl(folder / "metrics.jsonl"):
            sent.append(True)
            if parallel.current_layout().rank == victim:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.3)  # for the thread that hears it
        left = real(self, group)
        computed[0] += here and bool(sent) and not left
        return left

    micro_batches.MicroBatches.next, micro_batches.LOOK_S = next_pass, 0.0  # looks before every pass
    try:
        first = run(config, parallel.initialize(config.parallel, seed=config.train.seed), None)
    finally:
        micro_batches.MicroBatches.next, micro_batches.LOOK_S = real, look_s
        parallel.shut_down()
    due = read_checkpoint(Path(first.checkpoint)).manifest.get("validation_due")
    run(config, parallel.initialize(config.parallel, seed=config.train.seed), find_checkpoint(config))
    parallel.shut_down()
    losses = {row["step"]: row["loss"] for row in read_jsonl(folder / "metrics.jsonl")}
    valid = {row["step"]: row["loss"] for row in read_jsonl(folder / "validation.jsonl")}
    return first.step, first.stopped, computed[0], due, losses, valid
