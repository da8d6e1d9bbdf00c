"""What the parity tests run on each rank: a few optimizer steps of a small model on fixed tokens.

Every layout sees the same global batch and starts from the same weights (`elas.model.init`), so losses and gradient
norms of each step can be compared between layouts.
"""

from functools import lru_cache

import torch

STEPS = 10
DENSE_STEPS = 3  # 2:4 is switched on at this step, as the training loop does
GLOBAL_BATCH = 8

SMALL = {
    "model.hidden_size": 64,
    "model.num_layers": 4,
    "model.num_attention_heads": 4,
    "model.ffn_hidden_size": 128,
    "model.vocab_size": 256,
    "model.seq_length": 32,
    "low_rank.rank": 16,
    "sparsity.dense_steps": DENSE_STEPS,
    "optimizer.lr": 1e-3,
    "optimizer.clip_grad": 0.3,
    "train.dtype": "float32",
    "train.micro_batch_size": 2,
    "train.global_batch_size": GLOBAL_BATCH,
    "train.seed": 1234,
}


@lru_cache
def tokens(step: int, vocab: int = 256, length: int = 33) -> torch.Tensor:
    """Samples of one step, int64 `[GLOBAL_BATCH, length]`: half a Zipf law, half a fixed successor of the last."""
    generator = torch.Generator().manual_seed(100 + step)
    zipf = 1.0 / torch.arange(1, vocab + 1)
    drawn = torch.multinomial(zipf, GLOBAL_BATCH * length, replacement=True, generator=generator).view(-1, length)
    follow = torch.rand(drawn.shape, generator=generator) < 0.5
    for t in range(1, length):
        drawn[:, t] = torch.where(follow[:, t], (drawn[:, t - 1] * 7 + 3) % vocab, drawn[:, t])
    return drawn


def curve(overrides: dict, fault: str | None = None, steps: int = STEPS) -> list[tuple[float, float]]:
    """Train `steps` steps on this rank's layout, with LORO's exact steps and refreshes where the optimizer is that.

    Args:
        overrides: configuration by dotted key, over `SMALL`.
        fault: name of a function of `elas.engine.grads` to leave out, to see that the comparison notices.

    Returns:
        Loss and gradient norm of each step.
    """
    from elas import parallel
    from elas.config import load_config
    from elas.engine import grads
    from elas.engine.cycles import cycle_of
    from elas.engine.engine import Engine
    from elas.model.activation import set_sparse

    config = load_config(None, {**SMALL, **overrides})
    layout = parallel.initialize(config.parallel, seed=config.train.seed)
    kept = getattr(grads, fault) if fault else None
    if fault:
        setattr(grads, fault, lambda _models: None)
    try:
        engine = Engine(config, layout)
        cycle = cycle_of(engine)
        return [_step(engine, step, set_sparse, cycle) for step in range(steps)]
    finally:
        if fault:
            setattr(grads, fault, kept)


def saver_of(config, engine):
    """A `Saver` as the training loop makes it."""
    from elas.checkpoint.identity import manifest_facts
    from elas.checkpoint.saver import Saver
    from elas.run_dir import checkpoints_dir

    return Saver(config.checkpoint, checkpoints_dir(config), engine, manifest_facts(config))


def _step(engine, step: int, set_sparse, cycle) -> tuple[float, float]:
    set_sparse(engine.chunks, step >= DENSE_STEPS)
    lr = engine.config.optimizer.lr
    engine.set_learning_rate(lr)
    size, layout = engine.config.train.micro_batch_size, engine.layout
    samples = tokens(step)
    starts = [(m * layout.dp + layout.dp_rank) * size for m in range(engine.micro_batches)]
    if cycle:
        cycle.begin(step + 1)
    labels = samples[:, 1:]
    if engine.config.data.packing == "document":  # of very different lengths, from 2 tokens on
        lengths = 1 + torch.arange(GLOBAL_BATCH) * 31 % labels.shape[1]
        labels = torch.where(torch.arange(labels.shape[1]) < lengths[:, None], labels, -1)
    result = engine.step((samples[s : s + size, :-1], labels[s : s + size]) for s in starts)
    report = cycle.end(step + 1, lr) if cycle else None
    if report is not None and engine.config.optimizer.kind == "loro":
        assert report.not_taken == 0 and report.pairs == 6 * engine.config.model.num_layers
    return result


def seen_by_adam(overrides: dict) -> tuple[float, float]:
    """One step: the gradient norm that is logged, and that of what Adam was given (`exp_avg / (1 − β1)`)."""
    from elas import parallel
    from elas.checkpoint.state import capture
    from elas.config import load_config
    from elas.engine.engine import Engine
    from elas.model.activation import set_sparse

    config = load_config(None, {**SMALL, **overrides})
    layout = parallel.initialize(config.parallel, seed=config.train.seed)
    engine = Engine(config, layout)
    _, norm = _step(engine, 0, set_sparse, None)
    square = torch.zeros(())
    for name, tensor in capture(engine).items():  # each element once, over all ranks
        if name.startswith("exp_avg."):
            square += sum(part.float().square().sum() for part in tensor.parts.values())
    torch.distributed.all_reduce(square)
    return norm, float(square.sqrt()) / (1 - config.optimizer.beta1)


def exact_step_of_a_poor_factor(overrides: dict) -> tuple[int, int, bool]:
    """Two equal columns in one factor, then one exact step: pairs, those not taken, whether the poor one moved."""
    from elas import parallel
    from elas.config import load_config
    from elas.engine.engine import Engine
    from elas.engine.loro_cycle import LoroCycle
    from elas.engine.zero import fragments, publish, write_rows
    from elas.model.activation import set_sparse

    config = load_config(None, {**SMALL, **overrides, "optimizer.exact_every": 1})
    layout = parallel.initialize(config.parallel, seed=config.train.seed)
    engine = Engine(config, layout)
    cycle = LoroCycle(engine, config.optimizer)
    poor = cycle.pairs[-1][0].parameter
    rows = poor.detach().clone()
    rows[:, 1] = rows[:, 0]
    write_rows(engine, poor, fragments(engine).get(poor), rows, 0)
    publish(engine)
    reports = []
    cycle.end = lambda step, lr, end=cycle.end: reports.append(end(step, lr))
    with torch.no_grad():
        before = poor.detach().clone()
    _step(engine, 0, set_sparse, cycle)
    (report,) = reports
    return report.pairs, report.not_taken, not torch.equal(before, poor.detach())
