"""The training run, readable as a recipe: resume, then step, log, validate, save, until done."""

import math
import time

from elas.checkpoint.folder import Checkpoint, read_checkpoint
from elas.checkpoint.resume import first_whole, restore
from elas.checkpoint.saver import Saver
from elas.config import Config
from elas.data.batches import build_datasets, micro_batches
from elas.errors import Failure
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
from elas.train.troubles import BadSteps, Spikes
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
    with Watchdog(config) as watchdog, StopRequest(config.train.stop_after_minutes) as stop:
        return _Run(config, layout, resume, watchdog, stop).train()


class _Run:
    """A run under way.

    Attributes:
        step: optimizer steps taken, skipped ones included.
        consumed: samples consumed; more than `step` global batches after a rollback, which goes on with fresh ones.
    """

    def __init__(
        self, config: Config, layout: Layout, resume: Checkpoint | None, watchdog: Watchdog, stop: StopRequest
    ):
        self.config, self.layout, self.stop = config, layout, stop
        if resume:
            resume = first_whole(resume, config)
        self.step = resume.step if resume else 0
        self.consumed = resume.manifest["consumed_samples"] if resume else 0
        self._open_data()
        self.engine = Engine(config, layout)
        self.engine.mark = lambda operation: watchdog.mark(self.step, operation)
        if resume:
            restore(self.engine, resume)
        if layout.rank == 0:
            clear_markers(config)
        self.metrics = Metrics(config, last_step=self.step, writes=layout.rank == 0)
        self.saver = Saver(config, self.engine)
        self.saver.last = resume.path if resume else None
        self.cycle = LoroCycle(self.engine, config.optimizer) if config.optimizer.kind == "loro" else None
        self.bad, self.spikes = BadSteps(), Spikes(config.train.spike_nats)
        self.loss: float | None = None
        self.valid_loss: float | None = None
        self.clock = _Clock(self.step)
        _announce(config, layout, self.engine, resume, self.metrics)

    def _open_data(self) -> None:
        """Samples from `consumed` on, and as many more as the run will take."""
        beyond = self.consumed - self.step * self.config.train.global_batch_size
        self.datasets = build_datasets(self.config, beyond)
        self.batches = micro_batches(self.datasets.train, self.config, self.layout, consumed=self.consumed)

    def train(self) -> RunResult:
        """Go on to the end, or until somebody asks to stop."""
        config, stopped = self.config, ""
        if self.step == 0:
            self._validate()
        self.clock.restart(self.step)
        while self.step < config.train.steps and not stopped:
            self._one_step()
            if config.train.on_spike != "ignore" and self._spiked():
                continue
            if _validates(config, self.step):  # before saving: what cannot be evaluated is not worth keeping
                self._validate()
            stopped = self._save_if_due()
        self.saver.finish()
        stopped = stopped if self.step < config.train.steps else ""
        if self.valid_loss is None and not stopped:  # resumed at its last step
            self._validate()
        if stopped:
            self.metrics.say(f"stopped after step {self.step} ({stopped}); the same command goes on from there")
        self.metrics.close()
        tokens, checkpoint = self.step * _tokens_per_step(config), str(self.saver.last)
        if self.layout.rank == 0:
            write_marker(config, {"step": self.step, "checkpoint": checkpoint}, stopped)
        return RunResult(self.step, tokens, self.loss, self.valid_loss, checkpoint, stopped)

    def _one_step(self) -> None:
        config, engine, cycle = self.config, self.engine, self.cycle
        self.step += 1
        step = self.step
        set_sparse(engine.chunks, step > config.sparsity.dense_steps)
        due = bool(cycle and cycle.due(step))
        logged = step % config.log.every_steps == 0 or step in (1, config.train.steps) or due
        observe.look_next(engine.chunks, config.log.sparsity_tokens if logged else 0)
        lr = learning_rate(step, config.train.steps, config.optimizer, config.schedule)
        engine.set_learning_rate(lr)
        if cycle:
            cycle.begin(step)
        self.loss, norm = engine.step(self.batches)
        self.consumed += config.train.global_batch_size
        if self.bad.note(self.loss, norm):
            self._skipped(norm)
            return
        if due:
            engine.mark("the exact step")
        exact = cycle.end(step, lr) if cycle else None
        if logged:
            drawn = self.datasets.samples_by_source(self.consumed)
            more = (exact.metrics() if exact else {}) | ({"sources": drawn} if drawn else {})
            more |= self.bad.metrics() | self.spikes.metrics()
            _log(config, engine, self.metrics, self.clock, step, loss=self.loss, grad_norm=norm, lr=lr, **more)

    def _skipped(self, norm: float) -> None:
        """Tell of a step without an update; end the run when there are too many."""
        row = self.bad.in_a_row
        self.metrics.say(f"step {self.step:>6} skipped: loss {self.loss}, gradient norm {norm} ({row} in a row)")
        if row == self.config.train.max_bad_steps or math.isfinite(norm):  # else weights have moved
            what = f"loss {self.loss}, gradient norm {norm}, {row} bad steps in a row"
            raise self._diverged(f"{what}; it begins in {name_bad_layer(self.engine)}")

    def _spiked(self) -> bool:
        """Whether the loss jumped, and the run went back to its last checkpoint for it."""
        if self.bad.in_a_row:
            return False
        usual = self.spikes.note(self.loss)
        if usual is None:
            return False
        self.saver.finish()
        config, last = self.config, self.saver.last
        what = f"loss {self.loss:.3f}, where {usual:.3f} was usual"
        if config.train.on_spike == "stop" or last is None or self.spikes.rollbacks == config.train.max_rollbacks:
            raise self._diverged(f"{what} (train.on_spike={config.train.on_spike})")
        checkpoint = read_checkpoint(last)
        if not isinstance(checkpoint, Checkpoint):
            raise Failure(f"step {self.step}: {what}, but {last} {checkpoint}")
        checkpoint = first_whole(checkpoint, config)  # its bytes may have changed since it was written
        self.metrics.say(f"step {self.step:>6}: {what}; back to step {checkpoint.step}, with the samples after these")
        restore(self.engine, checkpoint)
        self.spikes.rolled_back()
        self.step = checkpoint.step
        self._open_data()
        self.metrics.drop_after(self.step)
        self.clock.restart(self.step)
        return True

    def _save_if_due(self) -> str:
        """Put in place what was written, and save where it is time; why to stop, if anybody asked."""
        saver, config = self.saver, self.config
        stopped, writing = self.stop.agree(saver.under_way and not saver.ready)
        if saver.under_way and not writing:
            saver.finish()
        if stopped or _saves(config, self.step):
            if not self.engine.is_finite():
                raise self._diverged("weights that are not finite after the update")
            self.engine.mark("saving")
            facts = {"consumed_samples": self.consumed, **self.bad.metrics(), **self.spikes.metrics()}
            saver.save(self.step, self.step * _tokens_per_step(config), facts)
            self.clock.restart(self.step)
        return stopped

    def _validate(self) -> None:
        """Mean loss over the validation batches, with 2:4 as a trained model runs it: on, but for the first steps."""
        config, engine = self.config, self.engine
        if self.datasets.valid is None:
            return
        observe.look_next(engine.chunks, 0)
        set_sparse(engine.chunks, self.step > config.sparsity.dense_steps)
        batches = micro_batches(self.datasets.valid, config, self.layout)
        losses = [engine.evaluate(batches) for _ in range(config.train.eval_batches)]
        loss = self.valid_loss = sum(losses) / len(losses)
        if not math.isfinite(loss):
            raise self._diverged(f"validation loss {loss}")
        perplexity, tokens = math.exp(min(loss, 80.0)), len(losses) * _tokens_per_step(config)
        self.metrics.log("validation", {"step": self.step, "loss": loss, "ppl": perplexity, "tokens": tokens})
        told = f"validation loss {loss:.4f}  perplexity {perplexity:,.1f}  ({tokens:,} tokens)"
        self.metrics.say(f"step {self.step:>6}  {told}")
        self.clock.restart(self.step)

    def _diverged(self, what: str) -> FloatingPointError:
        """What to raise when numbers blew up."""
        last = self.saver.finish() or self.saver.last
        kept = f"the last checkpoint is {last}" if last else "no checkpoint was written"
        return FloatingPointError(
            f"step {self.step}: {what}; lower optimizer.lr or raise schedule.warmup_steps; {kept}"
        )


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
    parameters = count_parameters(engine.chunks)
    sequence = ", sequence parallel" if layout.sequence_parallel else ""
    metrics.say(
        f"{describe(config)}, {config.train.dtype}, {parameters / 1e6:.1f} M parameters; "
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


def _validates(config: Config, step: int) -> bool:
    every = config.train.eval_every
    return step == config.train.steps or bool(every and step % every == 0)


def _saves(config: Config, step: int) -> bool:
    every = config.checkpoint.every_steps
    return step == config.train.steps or bool(every and step % every == 0)
