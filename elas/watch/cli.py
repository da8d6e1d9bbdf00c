"""`elas watch`: how runs stand, from their files alone, on this host or another."""

import math
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elas.command import Parser
from elas.console import Console, Screen, clock, table
from elas.errors import UserError
from elas.files import check_is_no_input, write_json
from elas.live import position, render, values
from elas.train.lines import step_line, validation_line
from elas.watch.state import Run, State

_OF_RUNS = ("DONE", "REQUEUE", "run.json", ".lock", "metrics.jsonl", "validation.jsonl", "config_history.jsonl")
_UNKNOWN = {"loss_mean": 0.0, "loss_steps": 1, "grad_norm": math.nan, "lr": math.nan, "tokens_per_s": 0.0,
            "sparsity": None, "dropped": None, "step_s": 0.0, "ppl": math.nan, "tokens": 0, "share": 1}  # fmt: skip
"""For rows of another version."""


def main(argv: list[str]) -> int:
    """Run `elas watch`; returns 0 when all runs are done or stopped, raises `UserError` for mistakes."""
    parser = Parser(
        "elas watch",
        "Show how runs stand, from their files alone, until they are done or stopped: on a terminal a block that is "
        "rewritten, else a line for each logged step.",
        "elas watch runs/60m",
    )
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a run (train.run_dir)")
    every = "seconds between two looks at the files (default: %(default)s)"
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help=every)
    wait = "seconds to wait for a new start where all runs have ended (default: %(default)g)"
    parser.add_argument("--wait", type=float, default=10.0, metavar="SECONDS", help=wait)
    parser.add_argument("--once", action="store_true", help="print how the runs stand now, and exit")
    options = parser.parse_args(argv)
    if not 0 < options.every < math.inf:
        raise UserError(f"--every {options.every:g}: must be above 0")
    if not 0 <= options.wait < math.inf:
        raise UserError(f"--wait {options.wait:g}: must be at least 0")
    runs = [Run(folder) for folder in options.run_dirs]
    check_is_no_input(options.json, options.run_dirs)
    if options.json and options.json.name in _OF_RUNS and options.json.resolve().parent in _resolved(runs):
        raise UserError(f"--json {options.json}: is a file of the run; give another file")
    try:
        if options.once:
            print("\n".join(snapshot([run.state() for run in runs])))
        elif Console().has_blocks:
            _block(runs, options.every, options.wait)
        else:
            _lines(runs, options.every, options.wait)
    finally:
        write_json(options.json, {"runs": [facts(run) for run in runs]})
    return 0


def facts(run: Run) -> dict[str, Any]:
    """How a run stands, for `--json`."""
    state = run.state()
    view = asdict(state.view)
    del view["title"], view["now"]
    known = {"state": state.kind, "text": state.text, "silent_s": state.silent_s, "usual_s": state.usual_s}
    return {"run_dir": str(run.folder), **known, **view}


def snapshot(states: list[State]) -> list[str]:
    """The same as the block, as plain lines."""
    if len(states) > 1:
        return overview(states)
    view = states[0].view
    rows = [("run", view.title), ("state", view.now), ("step", position(view).removeprefix("step ")), *values(view)]
    return [f"{name:<12}{text}" for name, text in rows]


def overview(states: list[State]) -> list[str]:
    """A table of several runs."""
    rows = [(state, state.view, dict(values(state.view))) for state in states]
    cells = [
        [
            view.title,
            position(view).removeprefix("step "),
            "–" if view.loss is None else f"{view.loss:.4f}",
            "–" if view.ppl is None else f"{view.ppl:,.1f}",
            known.get("speed", "–").partition(" tok/s")[0],
            known.get("left", "–"),
            "–" if view.checkpoint is None else str(view.checkpoint),
            state.kind if state.silent_s is None or state.has_ended else f"{state.kind}, {clock(state.silent_s)}",
        ]
        for state, view, known in rows
    ]
    return table(["run", "step", "loss", "ppl", "tok/s", "left", "saved", "state, silent for"], cells).splitlines()


def _resolved(runs: list[Run]) -> set[Path]:
    return {run.folder.resolve() for run in runs}


class _Wait:
    """How long to wait for a new start, if all runs have ended at the first look: a resume may be coming up.

    Args:
        states: at the first look.
        seconds: longest wait; runs that end later are not waited for.
    """

    def __init__(self, states: Iterable[State], seconds: float):
        self._end = time.monotonic() + seconds if all(state.has_ended for state in states) else 0.0

    @property
    def seconds(self) -> float:
        """Seconds that are left; 0 for no wait."""
        return max(0.0, self._end - time.monotonic())

    def is_over(self, states: Iterable[State]) -> bool:
        """Whether all runs have ended and no start is waited for; a run that is not over ends the wait."""
        if all(state.has_ended for state in states):
            return not self.seconds
        self._end = 0.0
        return False

    def __str__(self) -> str:
        return f"waiting {math.ceil(self.seconds)} s for a new start (--wait; Ctrl-C ends this)"


def _block(runs: list[Run], every: float, wait_s: float) -> None:
    """Rewrite a block until all runs have ended, and leave a snapshot."""
    console, states, due = Console(), [run.state() for run in runs], time.monotonic() + every
    wait = _Wait(states, wait_s)

    def lines(screen: Screen) -> list[str]:
        more = [str(wait)[: screen.columns - 1]] if wait.seconds and all(state.has_ended for state in states) else []
        if len(states) == 1:
            return [*render(states[0].view, screen), *more]
        return [*(line[: screen.columns - 1] for line in overview(states)), *more]

    console.block(lines)
    try:
        while console.has_blocks and not wait.is_over(states):
            time.sleep(min(1.0, every))
            if time.monotonic() >= due:
                for run in runs:
                    run.read()
                due = time.monotonic() + every
            states[:] = [run.state() for run in runs]
            console.redraw()
    finally:
        console.block(None)
        for line in snapshot(states):
            console.say(line)


def _lines(runs: list[Run], every: float, wait_s: float) -> None:
    """Print a line for each new row and each change of state, until all runs have ended."""
    said: dict[Run, tuple[float, str]] = {}
    new = {run: _last(run) for run in runs}
    wait: _Wait | None = None
    while True:
        states = {run: run.state() for run in runs}
        for run, state in states.items():
            before, kind = said.get(run, (-math.inf, ""))
            prefix = f"{run.folder}: " if len(runs) > 1 else ""
            for row in new[run]:
                if row["time"] > before:  # a file that was replaced is read anew
                    print(f"{prefix}{line_of(row, run, state)}", flush=True)
                    before = row["time"]
            if state.kind != kind and state.kind in ("starting", "silent", "failed", "stopped", "done"):
                print(f"{prefix}{state.text}", flush=True)
            said[run] = before, state.kind
        if wait is None:
            wait = _Wait(states.values(), wait_s)
            if wait.seconds:
                print(wait, flush=True)
        if wait.is_over(states.values()):
            return
        time.sleep(every)
        new = {run: run.read() for run in runs}


def _last(run: Run) -> list[dict[str, Any]]:
    """The last step and the last validation, in the order of their times."""
    return sorted([*[*run.metrics.rows][-1:], *[*run.validation.rows][-1:]], key=lambda row: row["time"])


def line_of(row: dict[str, Any], run: Run, state: State) -> str:
    """The line that the run itself printed for a row of either file; without the time left if the run has ended."""
    whole = {**_UNKNOWN, **row}
    if "ppl" in row:
        return validation_line(whole)
    line = step_line(whole, run.steps or row["step"], more_s=run.more_s(row["step"]))
    if not run.steps:
        line = line.replace(f"/{row['step']}", "", 1)
    return line.rpartition("  left")[0] if state.has_ended or not run.steps else line
