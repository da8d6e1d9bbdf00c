"""The training run, readable as a recipe: resume, then step, log, validate, save, until done."""

import math
import time

import torch
import torch.distributed as dist

from elas.checkpoint.folder import Checkpoint
from elas.checkpoint.resume import first_whole, restore
from elas.checkpoint.saver import Saver
from elas.config import Config
from elas.data.batches import Datasets, build_datasets, micro_batches
from elas.model import observe
from elas.model.activation import set_sparse
from elas.model.provider import count_parameters
from elas.optim.schedule import learning_rate
from elas.parallel import Layout
from elas.report import describe
from elas.train.culprit import name_bad_layer
from elas.train.engine import Engine
from elas.train.exact import LoroCycle
from elas.train.metrics import Metrics
from elas.train.result import RunResult
from elas.train.signals import StopRequest, clear_markers, write_marker
from elas.train.watchdog import Watchdog


def run(config: Config, layout: Layout, resume: Checkpoint | None) -> RunResult:
    """Train.

    Args:
        config: validated, its data checked.
        layout: where this rank stands; process groups exist.
        resume: checkpoint to go on from, from `elas.checkpoint.resume.find_checkpoint`.

    Returns:
        The same facts on every rank.

    Raises:
        FloatingPointError: the loss, the gradient norm or the weights stopped being finite; the last checkpoint is
            from before.
        ConfigError: the checkpoint that was asked for is damaged, or all of the run's are.
        Failure: a checkpoint could not be written.
    """
    with Watchdog(config) as watchdog:
        return _run(config, layout, resume, watchdog)


def _run(config: Config, layout: Layout, resume: Checkpoint | None, watchdog: Watchdog) -> RunResult:
    stop = StopRequest(config.train.stop_after_minutes)
    datasets = build_datasets(config)
    if resume:
        resume = first_whole(resume, config)
    engine = Engine(config, layout)
    engine.mark = lambda operation: watchdog.mark(step, operation)
    step = resume.step if resume else 0
    if resume:
        restore(engine, resume)
    if layout.rank == 0:
        clear_markers(config)
    metrics = Metrics(config, last_step=step, writes=layout.rank == 0)
    _announce(config, layout, engine, resume, metrics)
    if step == 0:
        _validate(config, layout, engine, datasets, metrics, step)
    loss, stopped = None, ""
    bad, saver = _BadSteps(), Saver(config, engine)
    saver.last = resume.path if resume else None
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
        if bad.note(step, loss, norm):
            metrics.say(f"step {step:>6} skipped: loss {loss}, gradient norm {norm} ({bad.in_a_row} in a row)")
            if bad.in_a_row == config.train.max_bad_steps or math.isfinite(norm):  # else weights have moved
                what = f"loss {loss}, gradient norm {norm}, {bad.in_a_row} bad steps in a row"
                raise _diverged(step, f"{what}; it begins in {name_bad_layer(engine)}", saver)
        if cycle and cycle.due(step):
            engine.mark("the exact step")
        exact = cycle.end(step, lr) if cycle and not bad.in_a_row else None
        if logged and not bad.in_a_row:
            more = (exact.metrics() if exact else {}) | _drawn(config, datasets, step) | bad.metrics()
            _log(config, engine, metrics, clock, step, loss=loss, grad_norm=norm, lr=lr, **more)
        if _validates(config, step):  # before saving: what cannot be evaluated is not worth keeping
            valid_loss = _validate(config, layout, engine, datasets, metrics, step, saver)
            clock.restart(step)
        stopped, writing = stop.agree(saver.under_way and not saver.ready)
        if saver.under_way and not writing:
            saver.finish()
        if stopped or _saves(config, step):
            if not engine.is_finite():
                raise _diverged(step, "weights that are not finite after the update", saver)
            engine.mark("saving")
            facts = {"consumed_samples": step * config.train.global_batch_size, **bad.metrics()}
            saver.save(step, step * _tokens_per_step(config), facts)
            clock.restart(step)
        if stopped and step < config.train.steps:
            break
    saver.finish()
    stopped = stopped if step < config.train.steps else ""
    if valid_loss is None and not stopped:  # resumed at its last step
        valid_loss = _validate(config, layout, engine, datasets, metrics, step, saver)
    if stopped:
        metrics.say(f"stopped after step {step} ({stopped}); the same command goes on from there")
    metrics.close()
    stop.close()
    result = RunResult(step, step * _tokens_per_step(config), loss, valid_loss, str(saver.last), stopped)
    if layout.rank == 0:
        write_marker(config, {"step": step, "checkpoint": result.checkpoint}, stopped)
    return result


def _drawn(config: Config, datasets: Datasets, step: int) -> dict:
    """Samples drawn from each source of a blend so far; nothing without a blend."""
    drawn = datasets.samples_by_source(step * config.train.global_batch_size)
    return {"sources": drawn} if drawn else {}


def _diverged(step: int, what: str, saver: Saver | None) -> FloatingPointError:
    """What to raise when numbers blew up."""
    last = saver and (saver.finish() or saver.last)
    kept = f"the last checkpoint is {last}" if last else "no checkpoint was written"
    return FloatingPointError(f"step {step}: {what}; lower optimizer.lr or raise schedule.warmup_steps; {kept}")


class _BadSteps:
    """Steps that were skipped because their loss or gradient norm was no finite number."""

    def __init__(self):
        self.in_a_row = self.in_all = 0

    def note(self, step: int, loss: float, norm: float) -> bool:
        """Count a step, the same on every rank; whether it was bad."""
        bad = not (math.isfinite(loss) and math.isfinite(norm))
        self.in_a_row = self.in_a_row + 1 if bad else 0
        self.in_all += bad
        return bad

    def metrics(self) -> dict[str, int]:
        """For metrics.jsonl, once there is one."""
        return {"skipped_steps": self.in_all} if self.in_all else {}


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
    saver: Saver | None = None,
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
        raise _diverged(step, f"validation loss {loss}", saver)
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
