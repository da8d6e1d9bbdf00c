"""`elas launch local --sweep FILE`: the runs of a sweep on this machine, one after another or a few at a time.

Each run is an `elas launch local` of its own, in its own session, with its output in `RUN_DIR/launch.log`. Finished
runs are skipped, so repeating the command resumes the sweep. A failed run does not stop the others. A signal to stop is
forwarded: running ones save and end, the others are not started.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from elas.checkpoint.choose import find_checkpoint
from elas.errors import UserError
from elas.files import read_jsonl, write_json
from elas.launch.guard.processes import end_with_parent
from elas.launch.guard.supervise import noted_signals
from elas.launch.job import Ending, Job, how_it_ended, markers
from elas.launch.verdict import with_newest
from elas.run_dir import claim
from elas.train.result import finished

POLL_S, SAY_S = 0.2, 10.0
"""Seconds between polls of the processes, and between two progress lines of a run."""
LOG = "launch.log"


@dataclass
class _Run:
    """One line of the sweep, counted from 1."""

    number: int
    of: int
    job: Job
    state: str = "not started"
    status: int | None = None
    ending: Ending = field(default_factory=lambda: Ending("not started"))
    before: dict[str, str] = field(default_factory=dict)
    began: float = 0.0
    seconds: float | None = None
    said: float = 0.0
    log_begins: int = 0

    @property
    def name(self) -> str:
        return f"run {self.number}/{self.of} ({self.job.run_dir})"

    def facts(self) -> dict:
        """This run's entry in the JSON file."""
        valid = read_jsonl(self.job.run_dir / "validation.jsonl")
        done = self.state in ("done", "skipped")
        return {
            "line": self.number,
            "run_dir": str(self.job.run_dir),
            "state": self.state,
            "status": self.status,
            "step": self.ending.step,
            "checkpoint": self.ending.checkpoint,
            "val_loss": valid[-1]["loss"] if done and valid else None,
            "seconds": None if self.seconds is None else round(self.seconds, 1),
        }


def run_sweep(jobs: list[Job], options: list[str], parallel: int, json_file: Path | None) -> int:
    """Run a sweep.

    Args:
        jobs: one per line of the sweep, checked, each with its own folder.
        options: options of `elas launch local` that apply to every run.
        parallel: number of runs at a time.
        json_file: receives `runs[]`, one entry per line; None for none.

    Returns:
        0 if every run completed, 128 + n if signal n asked to stop, else 1.
    """
    runs = [_Run(number, len(jobs), job) for number, job in enumerate(jobs, 1)]
    waiting = [run for run in runs if not _is_finished(run)]
    under_way: list[tuple[_Run, subprocess.Popen]] = []
    asked: list[int] = []
    forwarded = 0
    with noted_signals(asked):
        while under_way or (waiting and not asked):
            while waiting and len(under_way) < parallel and not asked:
                run = waiting.pop(0)
                process = _start(run, options, parallel)
                if process is not None:
                    under_way.append((run, process))
            for number in asked[forwarded:]:
                name, left = signal.Signals(number).name, _runs(len(waiting))
                _say(f"{name}: {_runs(len(under_way))} asked to save and end, {left} not started")
                for _, process in under_way:
                    process.send_signal(number)
            forwarded = len(asked)
            time.sleep(POLL_S)
            for run, process in list(under_way):
                _show_progress(run)
                status = process.poll()
                if status is not None:
                    under_way.remove((run, process))
                    _judge(run, status)
    _table(runs)
    write_json(json_file, {"runs": [run.facts() for run in runs]})
    if asked:
        return 128 + asked[0]
    return 0 if all(run.state in ("done", "skipped") for run in runs) else 1


def _is_finished(run: _Run) -> bool:
    done = finished(run.job.config, find_checkpoint(run.job.config))
    if done is None:
        return False
    run.state, run.status, run.ending = "skipped", 0, Ending("done", done.step, done.checkpoint)
    _say(f"{run.name}: already trained to step {done.step}, skipped")
    return True


def _start(run: _Run, options: list[str], parallel: int) -> subprocess.Popen | None:
    """Start a run; None if its folder cannot be used."""
    run.began = time.monotonic()
    try:
        claim(run.job.config, starts=True).release()  # creates the folder
    except UserError as error:
        run.state, run.status = "failed", 2
        _say(f"{run.name}: {error}")
        return None
    run.before = markers(run.job.run_dir)
    log = run.job.run_dir / LOG
    command = [sys.executable, "-m", "elas.cli", "launch", "local", *options, *run.job.arguments]
    cores = max(1, len(os.sched_getaffinity(0)) // (run.job.world * parallel))
    with log.open("ab") as output:
        run.log_begins = output.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": str(cores), **os.environ},
            start_new_session=True,  # so Ctrl-C reaches it only once, forwarded from here
            preexec_fn=end_with_parent,
        )
    run.state = "running"
    _say(f"{run.name}: started; log {log}")
    return process


def _show_progress(run: _Run) -> None:
    now = time.monotonic()
    if now - max(run.began, run.said) < SAY_S:
        return
    rows = read_jsonl(run.job.run_dir / "metrics.jsonl")
    last = rows[-1] if rows else None
    news = f"step {last['step']}/{run.job.config.train.steps}, loss {last['loss']:.4f}" if last else "no step yet"
    run.said = now
    _say(f"{run.name}: {news}, {now - run.began:.0f} s")


def _judge(run: _Run, status: int) -> None:
    run.ending = how_it_ended(run.job, run.before, markers(run.job.run_dir), status)
    if run.ending.state == "failed":
        run.ending = with_newest(run.ending, run.job)
    run.state, run.seconds = run.ending.state, time.monotonic() - run.began
    run.status = status if status >= 0 else 128 - status
    why = "" if run.state == "done" else f": {_why(run)}"
    _say(f"{run.name}: {run.state}, {run.seconds:.0f} s{why}")


def _why(run: _Run) -> str:
    """The first `error:` line in the log of this start, else its last line."""
    with (run.job.run_dir / LOG).open("rb") as file:
        file.seek(run.log_begins)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[0] if errors else lines[-1] if lines else "no output"


def _table(runs: list[_Run]) -> None:
    from elas.console import table

    cells = []
    for run in runs:
        facts = run.facts()
        loss = "–" if facts["val_loss"] is None else f"{facts['val_loss']:.4f}"
        seconds = "–" if run.seconds is None else f"{run.seconds:.0f}"
        step = "–" if facts["step"] is None else f"{facts['step']:,}"
        cells.append([str(run.number), run.state, step, loss, seconds, facts["run_dir"]])
    print(table(["line", "state", "step", "validation loss", "seconds", "run folder"], cells), flush=True)


def _runs(number: int) -> str:
    return f"{number} run{'s' if number != 1 else ''}"


def _say(text: str) -> None:
    print(text, flush=True)
