"""The study's other side: `elas.engine.engine.Engine` on batches that Megatron's loop saw.

    python tests/megatron/study_elas.py BATCHES.pt OUT.json RUN_DIR

Begins with the weights that Megatron's run began with, or goes on from RUN_DIR's checkpoint if it has one; else it
writes one after STOPS steps.
"""

import json
import sys
from pathlib import Path

import torch
from study import BATCH, DENSE_STEPS, MICRO, RANK, RATE, SIZES, STEPS, STOPS, VOCAB


def settings(run_dir: str) -> dict:
    """The study's model and optimizer, as `elas train` takes them."""
    given = {f"model.{name.replace('-', '_')}": value for name, value in SIZES.items()}
    given |= {"model.vocab_size": -(-(VOCAB + 1) // 128) * 128, "model.norm_eps": 1e-5, "low_rank.rank": RANK}
    given |= {"train.dtype": "float32", "train.micro_batch_size": MICRO, "train.global_batch_size": BATCH}
    given |= {"optimizer.lr": RATE, "optimizer.weight_decay": 0.0, "train.seed": 1234, "optimizer.clip_grad": 1.0}
    given |= {"optimizer.beta1": 0.9, "optimizer.beta2": 0.95, "sparsity.dense_steps": DENSE_STEPS}
    return given | {"train.run_dir": run_dir, "train.steps": STEPS, "schedule.warmup_steps": 0}


def main() -> None:
    from elas import parallel
    from elas.checkpoint.folder import checkpoints_in, read_checkpoint
    from elas.checkpoint.identity import manifest_facts
    from elas.checkpoint.resume import restore
    from elas.checkpoint.saver import Saver
    from elas.config import load_config
    from elas.engine.engine import Engine
    from elas.model.activation import set_step
    from elas.run_dir import checkpoints_dir

    batches, out, run_dir = torch.load(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    config = load_config(None, settings(run_dir))
    layout = parallel.initialize(config.parallel, seed=config.train.seed)
    engine, steps, each, first = Engine(config, layout), [], BATCH // MICRO, 0
    assert all(tokens.shape == (MICRO, SIZES["seq-length"]) for tokens, _ in batches)
    for path in checkpoints_in(checkpoints_dir(config)):
        restore(engine, read_checkpoint(path))
        first = STOPS
    for step in range(first, len(batches) // each):
        set_step(engine.chunks, step + 1)
        engine.set_learning_rate(RATE)
        loss, norm = engine.step(iter(batches[step * each : (step + 1) * each]))
        steps.append({"iteration": step + 1, "loss": loss, "norm": norm})
        if step + 1 == STOPS and not first:
            saver = Saver(config.checkpoint, checkpoints_dir(config), engine, manifest_facts(config))
            saver.save(STOPS, tokens=0, facts={"consumed_samples": STOPS * BATCH})
    out.write_text(json.dumps(steps))


if __name__ == "__main__":
    main()
