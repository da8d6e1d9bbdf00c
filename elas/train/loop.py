"""The training run, readable as a recipe: resume, then step, log, validate, save, until done."""

import math
import time

from elas.checkpoint.folder import Checkpoint, read_checkpoint
from elas.checkpoint.resume import first_whole, restore
from elas.checkpoint.saver import Saver
from elas.config import Config
from elas.data.batches import build_datasets, micro_batches, whole_set
from elas.errors import Failure
from elas.model import observe
from elas.model.activation import set_sparse
from elas.model.provider import count_parameters
from elas.optim.schedule import learning_rate
from elas.parallel import Layout
from elas.report import describe
from elas.train import history
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
        tokens: trained on: labels that counted. What fills up a document's sample counts for nothing.
    """

    def __init__(
        self, config: Config, layout: Layout, resume: Checkpoint | None, watchdog: Watchdog, stop: StopRequest
    ):
        self.config, self.layout, self.stop = config, layout, stop
        if resume:
            resume = first_whole(resume, config)
        self.step = resume.step if resume else 0
        self.consumed = resume.manifest["consumed_samples"] if resume else 0
        self.tokens = resume.manifest["tokens"] if resume else 0
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
        self.clock = _Clock(self.step, self.tokens)
        _announce(config, layout, self.engine, resume, self.metrics)
        if layout.rank == 0:
            for line in history.record(config, resume):
                self.metrics.say(line)

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
        self.clock.restart(self.step, self.tokens)
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
        checkpoint = str(self.saver.last)
        if self.layout.rank == 0:
            write_marker(config, {"step": self.step, "checkpoint": checkpoint}, stopped)
        return RunResult(self.step, self.tokens, self.loss, self.valid_loss, checkpoint, stopped)

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
        self.tokens += engine.labels
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
            values = {"step": step, "tokens": self.tokens, "loss": self.loss, "grad_norm": norm, "lr": lr, **more}
            _log(config, engine, self.metrics, self.clock, values)

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
        self.step, self.tokens = checkpoint.step, checkpoint.manifest["tokens"]
        self._open_data()
        self.metrics.drop_after(self.step)
        self.clock.restart(self.step, self.tokens)
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
            saver.save(self.step, self.tokens, facts)
            self.clock.restart(self.step, self.tokens)
        return stopped

    def _validate(self) -> None:
        """Mean loss over the validation batches, with 2:4 as a trained model runs it: on, but for the first steps."""
        config, engine = self.config, self.engine
        if self.datasets.valid is None:
            return
        observe.look_next(engine.chunks, 0)
        set_sparse(engine.chunks, self.step > config.sparsity.dense_steps)
        total, tokens = 0.0, 0
        for micro in whole_set(self.datasets.valid, config, self.layout):
            losses, counted = engine.evaluate(micro)
            total, tokens = total + losses, tokens + counted
        loss = self.valid_loss = total / tokens
        if not math.isfinite(loss):
            raise self._diverged(f"validation loss {loss}")
        samples, available = len(self.datasets.valid), self.datasets.valid_available
        perplexity, share = math.exp(min(loss, 80.0)), samples / available
        row = {"step": self.step, "loss": loss, "ppl": perplexity, "tokens": tokens, "samples": samples, "share": share}
        self.metrics.log("validation", row)
        of = "all" if samples == available else f"{share:.1%}"
        of_set = f"({tokens:,} tokens, {of} of the validation set)"
        self.metrics.say(f"step {self.step:>6}  validation loss {loss:.4f}  perplexity {perplexity:,.1f}  {of_set}")
        self.clock.restart(self.step, self.tokens)

    def _diverged(self, what: str) -> FloatingPointError:
        """What to raise when numbers blew up."""
        last = self.saver.finish() or self.saver.last
        kept = f"the last checkpoint is {last}" if last else "no checkpoint was written"
        return FloatingPointError(
            f"step {self.step}: {what}; lower optimizer.lr or raise schedule.warmup_steps; {kept}"
        )


class _Clock:
    """Time since the last logged step, with validation and saving left out."""

    def __init__(self, step: int, tokens: int):
        self.restart(step, tokens)

    def restart(self, step: int, tokens: int) -> None:
        self.step, self.tokens, self.start = step, tokens, time.perf_counter()

    def per_step_and_second(self, step: int, tokens: int) -> tuple[float, float]:
        """Seconds a step, and tokens a second."""
        passed, trained, steps = time.perf_counter() - self.start, tokens - self.tokens, step - self.step
        self.restart(step, tokens)
        return passed / max(1, steps), trained / passed


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


def _log(config: Config, engine: Engine, metrics: Metrics, clock: _Clock, values: dict) -> None:
    counts = observe.sum_over_ranks(engine.chunks, config.model.num_layers)
    step_s, tokens_per_s = clock.per_step_and_second(values["step"], values["tokens"])
    row = {
        **values,
        "tokens_per_s": tokens_per_s,
        "step_s": step_s,
        **observe.shares(counts.sum(0)),
        "sparse_active": values["step"] > config.sparsity.dense_steps and config.sparsity.kind == "2:4",
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
