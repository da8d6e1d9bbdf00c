"""The study's other side: `elas.train.engine.Engine` from the same weights, on batches that Megatron's loop saw.

python tests/megatron/study_elas.py BATCHES.pt OUT.json
"""

import json
import sys
from pathlib import Path

import torch
from study import BATCH, DENSE_STEPS, LENGTH, MICRO, RANK, RATE, SIZES, VOCAB


def main() -> None:
    from elas import parallel
    from elas.config import load_config
    from elas.model.activation import set_sparse
    from elas.train.engine import Engine

    batches = torch.load(sys.argv[1])
    settings = {f"model.{name.replace('-', '_')}": value for name, value in SIZES.items()}
    settings |= {"model.vocab_size": -(-(VOCAB + 1) // 128) * 128, "model.norm_eps": 1e-5, "low_rank.rank": RANK}
    settings |= {"train.dtype": "float32", "train.micro_batch_size": MICRO, "train.global_batch_size": BATCH}
    settings |= {"optimizer.lr": RATE, "optimizer.weight_decay": 0.0, "train.seed": 1234, "optimizer.clip_grad": 1.0}
    settings |= {"optimizer.beta1": 0.9, "optimizer.beta2": 0.95, "sparsity.dense_steps": DENSE_STEPS}
    config = load_config(None, settings)
    layout = parallel.initialize(config.parallel, seed=config.train.seed)
    engine, losses, each = Engine(config, layout), [], BATCH // MICRO
    assert all(tokens.shape == (MICRO, LENGTH) for tokens, _ in batches)
    for step in range(len(batches) // each):
        set_sparse(engine.chunks, step >= DENSE_STEPS)
        engine.set_learning_rate(RATE)
        losses.append(engine.step(iter(batches[step * each : (step + 1) * each]))[0])
    Path(sys.argv[2]).write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
