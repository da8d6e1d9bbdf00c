"""On a rank: what Python needs for a layer, a micro-batch and a step, from engines in which nothing else counts."""

import functools
import gc
import itertools
import statistics
from dataclasses import dataclass

import torch

from elas import accelerator
from elas.bench import measure
from elas.config import load_config
from elas.engine.engine import Engine
from elas.model.activation import set_step
from elas.parallel import Layout

TINY = {
    "model.hidden_size": 32, "model.num_attention_heads": 2, "model.ffn_hidden_size": 64, "model.vocab_size": 64,
    "model.seq_length": 8, "low_rank.rank": 8, "train.micro_batch_size": 1, "train.dtype": "float32",
    "train.recompute": "none", "sparsity.dense_steps": 0, "parallel.zero": 0,
}  # fmt: skip
STEPS = 7


@dataclass(frozen=True)
class Host:
    """Seconds."""

    layer_s: float
    """For one layer's passes of one micro-batch."""
    batch_s: float
    """For a micro-batch besides."""
    step_s: float
    """For a step besides."""


def host(layout: Layout) -> Host:
    """Measure on all ranks at once; they reduce gradients together, so the step's part includes small collectives."""
    least = _step(1, 1, layout)
    batches = _step(1, 3, layout)
    both = _step(3, 3, layout)
    layer = max(0.0, both - batches) / 6
    batch = max(0.0, (batches - least) / 2 - layer)
    return Host(layer, batch, max(0.0, least - layer - batch))


def _step(layers: int, micro_batches: int, layout: Layout) -> float:
    """Median seconds of a step."""
    values = {**TINY, "model.num_layers": layers, "train.global_batch_size": micro_batches * layout.dp}
    config = load_config(None, values)
    engine = Engine(config, layout)
    engine.set_learning_rate(1e-5)
    set_step(engine.chunks, 1)
    ids = torch.ones(1, 8, dtype=torch.int64, device=accelerator.device())
    batch = itertools.repeat((ids, ids))
    engine.step(batch)
    times = [measure.seconds(functools.partial(engine.step, batch), accelerator.device())[0] for _ in range(STEPS)]
    del engine
    gc.collect()  # engines have reference cycles
    return statistics.median(times)
