"""The training run, readable as a recipe: resume, then step, log, validate, save, until done."""

import math
import time

import torch
import torch.distributed as dist

from elas.checkpoint import local, state
from elas.checkpoint.local import Checkpoint
from elas.config import Config
from elas.data.batches import Datasets, build_datasets, micro_batches
from elas.model import observe
from elas.model.activation import set_sparse
from elas.model.provider import count_parameters
from elas.optim.schedule import learning_rate
from elas.parallel import Layout
from elas.report import describe
from elas.train.engine import Engine
from elas.train.exact import LoroCycle
from elas.train.metrics import Metrics
from elas.train.result import RunResult


def run(config: Config, layout: Layout, resume: Checkpoint | None) -> RunResult:
    """Train.

    Args:
        config: validated, its data checked.
        layout: where this rank stands; process groups exist.
        resume: checkpoint to go on from, from `elas.checkpoint.local.find_checkpoint`.

    Returns:
        The same facts on every rank.

    Raises:
        FloatingPointError: the loss, the gradient norm or the weights stopped being finite; the last checkpoint is
            from before.
        ConfigError: a file of the checkpoint is damaged.
    """
    datasets = build_datasets(config)
    engine = Engine(config, layout)
    step = resume.step if resume else 0
    if resume:
        state.restore(engine, local.load(resume))
    identity = local.identity(config, layout.world)
    metrics = Metrics(config, last_step=step, writes=layout.rank == 0)
    _announce(config, layout, engine, resume, metrics)
    if step == 0:
        _validate(config, layout, engine, datasets, metrics, step)
    loss, checkpoint = None, str(resume.path) if resume else None
    valid_loss = None
    batches = micro_batches(datasets.train, config, layout, consumed=step * config.train.global_batch_size)
    clock = _Clock(step)
    cycle = LoroCycle(engine, config.optimizer) if config.optimizer.kind == "loro" else None
    while step < config.train.steps:
        step += 1
        set_sparse(engine.chunks, step > config.sparsity.dense_steps)
        logged = step % config.log.every_steps == 0 or step in (1, config.train.steps) or (cycle and cycle.due(step))
        observe.look_next(engine.chunks, config.log.sparsity_tokens if logged else 0)
        lr = learning_rate(step, config.train.steps, config.optimizer, config.schedule)
        engine.set_learning_rate(lr)
        if cycle:
            cycle.begin(step)
        loss, norm = engine.step(batches)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise _diverged(step, f"loss {loss}, gradient norm {norm}", checkpoint)
        exact = cycle.end(step, lr) if cycle else None
        if logged:
            more = (exact.metrics() if exact else {}) | _drawn(config, datasets, step)
            _log(config, engine, metrics, clock, step, loss=loss, grad_norm=norm, lr=lr, **more)
        if _validates(config, step):  # before saving: what cannot be evaluated is not worth keeping
            valid_loss = _validate(config, layout, engine, datasets, metrics, step, checkpoint)
            clock.restart(step)
        if _saves(config, step):
            if not engine.is_finite():
                raise _diverged(step, "weights that are not finite after the update", checkpoint)
            checkpoint = str(_save(config, engine, identity, step))
            clock.restart(step)
    if valid_loss is None:  # resumed at its last step
        valid_loss = _validate(config, layout, engine, datasets, metrics, step, checkpoint)
    metrics.close()
    return RunResult(step, step * _tokens_per_step(config), loss, valid_loss, checkpoint)


def _drawn(config: Config, datasets: Datasets, step: int) -> dict:
    """Samples drawn from each source of a blend so far; nothing without a blend."""
    drawn = datasets.samples_by_source(step * config.train.global_batch_size)
    return {"sources": drawn} if drawn else {}


def _diverged(step: int, what: str, checkpoint: str | None) -> FloatingPointError:
    """What to raise when numbers blew up."""
    kept = f"the last checkpoint is {checkpoint}" if checkpoint else "no checkpoint was written"
    return FloatingPointError(f"step {step}: {what}; lower optimizer.lr or raise schedule.warmup_steps; {kept}")


class _Clock:
    """Time since the last logged step, with validation and saving left out."""

    def __init__(self, step: int):
        self.restart(step)

    def restart(self, step: int) -> None:
        self.step, self.start = step, time.perf_counter()

    def seconds_per_step(self, step: int) -> float:
        seconds = (time.perf_counter() - self.start) / max(1, step - self.step)
        self.restart(step)
        return seconds


def _tokens_per_step(config: Config) -> int:
    return config.train.global_batch_size * config.model.seq_length


def _announce(config: Config, layout: Layout, engine: Engine, resume: Checkpoint | None, metrics: Metrics) -> None:
    sizes = torch.tensor(
        [count_parameters(engine.chunks) if layout.dp_rank == 0 else 0], device=torch.cuda.current_device()
    )
    dist.all_reduce(sizes)
    sequence = ", sequence parallel" if layout.sequence_parallel else ""
    metrics.say(
        f"{describe(config)}, {config.train.dtype}, {int(sizes) / 1e6:.1f} M parameters; "
        f"TP {layout.tp} × PP {layout.pp} × DP {layout.dp}, ZeRO {engine.stage}{sequence}"
    )
    if resume:
        for skipped in resume.passed_over:
            metrics.say(f"passed over {skipped}")
        metrics.say(f"resumed from {resume.path} at step {resume.step}")


def _log(config: Config, engine: Engine, metrics: Metrics, clock: _Clock, step: int, **values: float) -> None:
    counts = observe.sum_over_ranks(engine.chunks, config.model.num_layers)
    seconds = clock.seconds_per_step(step)
    row = {
        "step": step,
        "tokens": step * _tokens_per_step(config),
        **values,
        "tokens_per_s": _tokens_per_step(config) / seconds,
        "step_s": seconds,
        **observe.shares(counts.sum(0)),
        "sparse_active": step > config.sparsity.dense_steps and config.sparsity.kind == "2:4",
    }
    if counts.any():
        row["layers"] = observe.by_layer(counts)
    metrics.log("metrics", row)
    metrics.show(row)


def _validate(
    config: Config,
    layout: Layout,
    engine: Engine,
    datasets: Datasets,
    metrics: Metrics,
    step: int,
    checkpoint: str | None = None,
) -> float | None:
    """Mean loss over the validation batches, with 2:4 as a trained model runs it: on, but for the dense first steps."""
    if datasets.valid is None:
        return None
    observe.look_next(engine.chunks, 0)
    set_sparse(engine.chunks, step > config.sparsity.dense_steps)
    batches = micro_batches(datasets.valid, config, layout)
    losses = [engine.evaluate(batches) for _ in range(config.train.eval_batches)]
    loss = sum(losses) / len(losses)
    if not math.isfinite(loss):
        raise _diverged(step, f"validation loss {loss}", checkpoint)
    perplexity = math.exp(min(loss, 80.0))
    tokens = len(losses) * _tokens_per_step(config)
    metrics.log("validation", {"step": step, "loss": loss, "ppl": perplexity, "tokens": tokens})
    metrics.say(f"step {step:>6}  validation loss {loss:.4f}  perplexity {perplexity:,.1f}  ({tokens:,} tokens)")
    return loss


def _validates(config: Config, step: int) -> bool:
    every = config.train.eval_every
    return step == config.train.steps or bool(every and step % every == 0)


def _saves(config: Config, step: int) -> bool:
    every = config.checkpoint.every_steps
    return step == config.train.steps or bool(every and step % every == 0)


def _save(config: Config, engine: Engine, identity: dict, step: int):
    consumed = step * config.train.global_batch_size
    return local.save(
        config, state.capture(engine), identity, step=step, consumed=consumed, tokens=step * _tokens_per_step(config)
    )
