"""The training loop: resume, then step, log, validate and save until done."""

import math
import time
from functools import partial

from elas.checkpoint.folder import Checkpoint, read_checkpoint
from elas.checkpoint.identity import manifest_facts
from elas.checkpoint.initial import Initial, load_initial
from elas.checkpoint.resume import first_intact, restore
from elas.checkpoint.saver import Saver
from elas.config import Config
from elas.console import Console
from elas.data.batches import build_datasets, micro_batches
from elas.engine import balance
from elas.engine.cycles import cycle_of
from elas.engine.engine import Engine
from elas.engine.micro_batches import Abandoned, MicroBatches
from elas.engine.nonfinite import name_bad_layer
from elas.errors import Failure
from elas.model import observe
from elas.model.activation import set_sparse
from elas.optim.schedule import learning_rate
from elas.parallel import Layout
from elas.run_dir import checkpoints_dir, clear_markers, write_marker
from elas.train import events, history, start
from elas.train.anomalies import BadSteps, Spikes
from elas.train.incidents import Incidents
from elas.train.lines import warn
from elas.train.metrics import Metrics
from elas.train.progress import FIRST_S, LATER_S, Progress
from elas.train.result import RunResult
from elas.train.signals import Agreement, StopRequest
from elas.train.standing import Ledger, Standing, stopped_line
from elas.train.step_log import StepLog
from elas.train.throughput import Goodput
from elas.train.trackers import Trackers, open_trackers
from elas.train.validation import Validation
from elas.train.watchdog import Watchdog


def run(config: Config, layout: Layout, resume: Checkpoint | None, initial: Initial | None = None) -> RunResult:
    """Train.

    Args:
        config: validated, its data checked.
        layout: this rank's place in the layout; process groups exist.
        resume: checkpoint to resume from, from `elas.checkpoint.choose.find_checkpoint`.
        initial: checkpoint whose weights to start with, from `elas.checkpoint.initial.find_initial`.

    Returns:
        The result, the same on every rank.

    Raises:
        FloatingPointError: the loss, the gradient norm or the weights became non-finite; the last checkpoint was saved
            before that.
        ConfigError: the requested checkpoint is damaged, or all checkpoints of the run are.
        Failure: a checkpoint could not be written.
    """
    ledger = Ledger(resume)
    progress = Progress(Console(), config.train.steps, layout.rank == 0, ledger.standing)
    run = None
    try:
        with (
            StopRequest(config.train.stop_after_minutes, progress.say, ledger.standing) as stop,
            Watchdog(config.train, stop) as watchdog,
            progress,
        ):
            run = _Run(config, layout, resume, initial, watchdog, stop, progress, ledger)
            return run.train()
    except Exception as error:  # after the watchdog, which notes what it ends itself: a rank that is gone or stuck
        if run and not run.over:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            run.incidents.note("failed", run.step, why=why)
        raise


class _Run:
    """A run in progress.

    Attributes:
        step: optimizer steps taken, including skipped ones; during a step, that step's number.
        first: first step of this start.
        consumed: samples consumed; after a rollback, which continues with new samples, more than `step` global batches.
        tokens: tokens trained on, which are the labels that count; padding of a document's sample does not.
        over: whether it has noted that it finished or stopped.
        agreed: what all ranks last agreed on about stopping: in the last step, or after a validation or a save.
        origin: facts of the checkpoint whose weights the run started with, stored in its manifests; or None.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        resume: Checkpoint | None,
        initial: Initial | None,
        watchdog: Watchdog,
        stop: StopRequest,
        progress: Progress,
        ledger: Ledger,
    ):
        self.config, self.layout, self.stop, self.progress = config, layout, stop, progress
        progress.begin("reading the checkpoint" if resume else "reading the corpus")
        if resume:
            resume = first_intact(resume, config)
            ledger.follow(partial(Standing.at_start, resume))  # perhaps an older one than the newest by manifest
            if layout.rank == 0:
                warn(config, resume.step)
        self.step = resume.step if resume else 0
        self.first = self.step + 1
        self.consumed = resume.manifest["consumed_samples"] if resume else 0
        self.tokens = resume.manifest["tokens"] if resume else 0
        progress.stepped(self.step, self.tokens)
        self._open_data()
        progress.begin("building the model and its optimizer")
        self.between = MicroBatches(stop, lambda operation: watchdog.mark(self.step, operation), progress)
        self.engine = Engine(config, layout, self.between)
        if resume:
            progress.begin("restoring the checkpoint")
            restore(self.engine, resume)
        if initial:
            progress.begin("reading the initial weights")
            load_initial(self.engine, initial)
        self.origin = initial.facts() if initial else resume.manifest.get("init_from") if resume else None
        if layout.rank == 0:
            clear_markers(config.train.run_dir)
        self.incidents = Incidents(config.train.run_dir, writes=layout.rank == 0)
        self._open_metrics()
        self.saver = Saver(config.checkpoint, checkpoints_dir(config), self.engine, manifest_facts(config), resume)
        self.saved = (self.step, self.consumed)  # state in the newest checkpoint; step 0 needs none
        ledger.follow(self._standing)
        due = bool(resume and resume.manifest.get("validation_due"))
        self.validation = Validation(config, layout, self.engine, self.datasets, due=due)
        self.cycle = cycle_of(self.engine)
        self.bad, self.spikes = BadSteps(), Spikes(config.train.spike_nats)
        self.goodput = Goodput(resume.manifest.get("goodput") if resume else None)
        self.log = StepLog(config, layout, self.goodput)
        self.over, self.agreed = False, Agreement()
        self.loss: float | None = None
        self.due = events.Due(config.train, config.checkpoint)
        self._announce(resume)
        if layout.rank == 0:
            for line in (*(initial.says() if initial else ()), *history.record(config, resume)):
                progress.say(line)

    def _open_data(self) -> None:
        """Open the training samples from number `consumed` on."""
        beyond = self.consumed - self.step * self.config.train.global_batch_size
        self.datasets = build_datasets(self.config, beyond)
        self.batches = micro_batches(self.datasets.train, self.config, self.layout, consumed=self.consumed)

    def _open_metrics(self) -> None:
        """Open the files of metrics, without the lines after `step`, and on rank 0 the trackers."""
        config, first = self.config, self.layout.rank == 0
        trackers = open_trackers(config, self.step, self.progress.say) if first else Trackers()
        self.metrics = Metrics(config.train.run_dir, trackers, last_step=self.step, writes=first)

    def train(self) -> RunResult:
        """Train to the last step, or until the run is asked to stop, and note which."""
        with self.metrics:
            result = self._train()
            # Before the trackers are closed, which may take seconds: a second signal then loses nothing here.
            self.incidents.note("stopped" if result.stopped else "finished", self.step, why=result.stopped)
            self.over = True
        return result

    def _train(self) -> RunResult:
        config = self.config
        self.goodput.started()
        stopped = self._validate() if self.step == 0 or self.validation.due else ""
        self.log.interval.restart(self.step, self.tokens)
        while self.step < config.train.steps and not stopped:
            completed = self._one_step()
            if completed and config.train.on_spike != "ignore" and self._spiked():
                continue
            if completed and events.validates(config, self.step):
                self._validate()  # before saving, so that a model with a non-finite validation loss is not saved
            stopped = self._save_if_due()
            if completed and self.step == self.first:
                self.progress.interval = LATER_S
                more_s = self.due.seconds(self.step, over=True)
                self.progress.say(start.after_first_step(config, self.step, self.step_s, more_s))
        self.saver.finish()
        stopped = stopped if self.step < config.train.steps or self.validation.due else ""
        if self.validation.loss is None and not stopped:  # resumed at its last step
            stopped = self._validate()
        if stopped:
            self.progress.say(stopped_line(config, self.step, stopped, self.saver.last))
        checkpoint = str(self.saver.last) if self.saver.last else None
        if self.layout.rank == 0:
            write_marker(config.train.run_dir, {"step": self.step, "checkpoint": checkpoint}, stopped)
        self.progress.begin("closing the trackers")
        return RunResult(self.step, self.tokens, self.loss, self.validation.loss, checkpoint, stopped)

    def _one_step(self) -> bool:
        """Take one step and log it if due; returns False if it was abandoned before its update."""
        config, engine, cycle = self.config, self.engine, self.cycle
        self.step += 1
        step = self.step
        set_sparse(engine.chunks, step > config.sparsity.dense_steps)
        due = bool(cycle and cycle.due(step))
        measured = events.measures_pairs(config, step)
        logged = events.logs(config, step, self.first) or due or measured
        observe.look_next(engine.chunks, config.log.sparsity_tokens if logged else 0)
        lr = learning_rate(step, config.train.steps, config.optimizer, config.schedule)
        engine.set_learning_rate(lr)
        if cycle:
            cycle.begin(step)
        begun = time.perf_counter()
        self.between.begin(f"step {step}", engine.micro_batches, len(engine.chunks))
        try:
            self.loss, norm = engine.step(self.batches, self._flags)
        except Abandoned:
            self.agreed = self.stop.agreed(engine.flags)
            self.step -= 1
            return False
        self.agreed = self.stop.agreed(engine.flags)
        self.between.adapt(self.agreed.pass_s)
        self.step_s = time.perf_counter() - begun
        self.goodput.add("train", self.step_s)
        self.goodput.add("data", engine.data_s)
        self.consumed += config.train.global_batch_size
        self.tokens += engine.labels
        self.progress.stepped(self.step, self.tokens, self.loss)
        if self.bad.note(self.loss, norm):
            self._skipped(norm)
            return True
        self.log.interval.losses.append(self.loss)
        if due:
            self.between.mark("the exact step")
        report = cycle.end(step, lr) if cycle else None
        if logged:
            drawn = self.datasets.samples_by_source(self.consumed)
            more = (report.metrics() if report else {}) | ({"sources": drawn} if drawn else {})
            more |= self.bad.metrics() | self.spikes.metrics()
            if measured:
                self.between.mark("measuring factor pairs")
                more |= balance.measure(engine)
            values = {"step": step, "tokens": self.tokens, "loss": self.loss, "grad_norm": norm, "lr": lr, **more}
            row = self.log.row(engine, values)
            self.metrics.log("metrics", row)
            self.progress.logged(row, self.due.seconds(step, over=False))
        return True

    def _skipped(self, norm: float) -> None:
        """Report a step without an update.

        Raises:
            FloatingPointError: there were too many consecutive ones, or the weights were updated.
        """
        count = self.bad.consecutive
        self.incidents.note("skipped", self.step, loss=self.loss, grad_norm=norm, consecutive=count)
        self.progress.say(f"step {self.step:>6} skipped: loss {self.loss}, gradient norm {norm} ({count} consecutive)")
        # With a finite norm the optimizer has updated the weights, although the loss was not finite.
        if count == self.config.train.max_bad_steps or math.isfinite(norm):
            what = f"loss {self.loss}, gradient norm {norm}, {count} consecutive bad steps"
            raise self._diverged(f"{what}; first non-finite layer: {name_bad_layer(self.engine)}")

    def _spiked(self) -> bool:
        """Roll back to the last checkpoint if the loss spiked; returns whether it did.

        Raises:
            FloatingPointError: with `on_spike: stop`, without a checkpoint, or after `max_rollbacks` rollbacks.
        """
        if self.bad.consecutive:
            return False
        assert self.loss is not None  # of the step just taken
        median = self.spikes.note(self.loss)
        if median is None:
            return False
        self.saver.finish()
        config, last = self.config, self.saver.last
        what = f"loss {self.loss:.3f} is a spike over the recent median {median:.3f}"
        if config.train.on_spike == "stop" or last is None or self.spikes.rollbacks == config.train.max_rollbacks:
            raise self._diverged(f"{what} (train.on_spike={config.train.on_spike})")
        checkpoint = read_checkpoint(last)
        if not isinstance(checkpoint, Checkpoint):
            raise Failure(f"step {self.step}: {what}, but {last} cannot be loaded: {checkpoint}")
        checkpoint = first_intact(checkpoint, config)  # it may have been damaged since it was written
        self.progress.say(
            f"step {self.step:>6}: {what}; rollback to step {checkpoint.step}, continuing with the samples after these"
        )
        self.incidents.note("rollback", self.step, to=checkpoint.step, loss=self.loss, median=median)
        restore(self.engine, checkpoint)
        self.spikes.rolled_back()
        self.log.interval.losses.clear()
        self.step, self.tokens = checkpoint.step, checkpoint.manifest["tokens"]
        self.progress.stepped(self.step, self.tokens)
        self.goodput.back_to(checkpoint.manifest.get("goodput"))
        self._open_data()
        self.metrics.drop_after(self.step)
        self.log.interval.restart(self.step, self.tokens)
        return True

    def _flags(self) -> list[float]:
        """What this rank tells the others in each step."""
        return self.stop.flags(self.saver.under_way and not self.saver.ready, self.between.seconds)

    def _agree(self) -> None:
        """Agree on stopping apart from a step, after what may have taken minutes."""
        self.agreed = self.stop.agree(self.saver.under_way and not self.saver.ready)

    def _save_if_due(self) -> str:
        """Finish an asynchronous save that is written, and save if due; returns the reason to stop, else ""."""
        saver, config = self.saver, self.config
        if saver.under_way and not self.agreed.busy:
            saver.finish()
        state = (self.step, self.consumed)
        if state != self.saved and (self.agreed.why or events.saves(config, self.step)):
            if not self.engine.is_finite():
                raise self._diverged("weights that are not finite after the update")
            self.between.mark("saving")
            self.progress.begin(f"saving step {self.step}")
            facts = {
                "goodput": self.goodput.facts(),
                "consumed_samples": self.consumed,
                **self.bad.metrics(),
                **self.spikes.metrics(),
            }
            facts |= {"validation_due": True} if self.validation.due else {}
            facts |= {"init_from": self.origin} if self.origin else {}
            saver.save(self.step, self.tokens, facts)
            self.saved, self.due.save_s = state, saver.blocked_s
            self.goodput.add("save", saver.blocked_s)
            if not self.agreed.why:
                self._agree()
            self.log.interval.restart(self.step, self.tokens)
        return self.agreed.why

    def _standing(self) -> Standing:
        """What is saved so far; also called from the signal thread."""
        unsaved = self.consumed != self.saved[1] or self.saver.under_way
        return Standing(self.saver.last, self.saver.last_step, unsaved)

    def _validate(self) -> str:
        """Validate and log it; returns the reason to stop, if the run was asked to during the validation."""
        if self.datasets.valid is None:
            return ""
        self.progress.interval = FIRST_S
        row = self.validation.run(self.step, self.between)
        self._agree()
        if row is None:  # the next start validates first
            return self.agreed.why
        self.due.validation_s = self.validation.seconds
        self.goodput.add("validation", self.validation.seconds)
        if not math.isfinite(row["loss"]):
            raise self._diverged(f"validation loss {row['loss']}")
        self.metrics.log("validation", row)
        self.progress.validated(row)
        self.log.interval.restart(self.step, self.tokens)
        return ""

    def _diverged(self, what: str) -> FloatingPointError:
        """The error to raise for non-finite numbers or a spike."""
        last = self.saver.finish() or self.saver.last
        kept = f"the last checkpoint is {last}" if last else "no checkpoint was written"
        return FloatingPointError(
            f"step {self.step}: {what}; lower optimizer.lr or raise schedule.warmup_steps; {kept}"
        )

    def _announce(self, resume: Checkpoint | None) -> None:
        """Print the model, the kernel and the data, and write the same facts to RUN_DIR/run.json."""
        lines, facts = start.announcement(self.config, self.layout, self.engine, self.step)
        if resume:
            lines += [f"skipped {skipped}" for skipped in resume.passed_over]
            lines.append(f"resumed from {resume.path} at step {resume.step}")
        for line in lines:
            self.progress.say(line)
        self.metrics.facts(self.config.to_dict(), {"first_step": self.step + 1, **facts})
        start_facts = {key: facts[key] for key in ("layout", "world_size", "kernel")}
        start_facts |= {"from_checkpoint": str(resume.path) if resume else None}
        self.incidents.note("start", self.step, **start_facts)
