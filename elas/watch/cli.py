"""`elas watch`: how runs stand, from their files alone, on this host or another."""

import math
import time
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
    parser.add_argument("--once", action="store_true", help="print how the runs stand now, and exit")
    options = parser.parse_args(argv)
    if not 0 < options.every < math.inf:
        raise UserError(f"--every {options.every:g}: must be above 0")
    runs = [Run(folder) for folder in options.run_dirs]
    check_is_no_input(options.json, options.run_dirs)
    if options.json and options.json.name in _OF_RUNS and options.json.resolve().parent in _resolved(runs):
        raise UserError(f"--json {options.json}: is a file of the run; give another file")
    try:
        if options.once:
            print("\n".join(snapshot([run.state() for run in runs])))
        elif Console().has_blocks:
            _block(runs, options.every)
        else:
            _lines(runs, options.every)
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


def _block(runs: list[Run], every: float) -> None:
    """Rewrite a block until all runs have ended, and leave a snapshot."""
    console, states, due = Console(), [run.state() for run in runs], time.monotonic() + every

    def lines(screen: Screen) -> list[str]:
        if len(states) == 1:
            return render(states[0].view, screen)
        return [line[: screen.columns - 1] for line in overview(states)]

    console.block(lines)
    try:
        while console.has_blocks and not all(state.has_ended for state in states):
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


def _lines(runs: list[Run], every: float) -> None:
    """Print a line for each new row and each change of state, until all runs have ended."""
    said: dict[Run, tuple[float, str]] = {}
    new = {run: [*run.metrics.rows][-1:] for run in runs}
    while True:
        states = {run: run.state() for run in runs}
        for run, state in states.items():
            before, kind = said.get(run, (-math.inf, ""))
            prefix = f"{run.folder}: " if len(runs) > 1 else ""
            for row in new[run]:
                if row["time"] > before:  # a file that was replaced is read anew
                    print(f"{prefix}{line_of(row, run)}", flush=True)
                    before = row["time"]
            if state.kind != kind and state.kind in ("starting", "silent", "stopped", "done"):
                print(f"{prefix}{state.text}", flush=True)
            said[run] = before, state.kind
        if all(state.has_ended for state in states.values()):
            return
        time.sleep(every)
        new = {run: run.read() for run in runs}


def line_of(row: dict[str, Any], run: Run) -> str:
    """The line that the run itself printed for a row of either file."""
    whole = {**_UNKNOWN, **row}
    if "ppl" in row:
        return validation_line(whole)
    if run.steps:
        return step_line(whole, run.steps, more_s=run.more_s(row["step"]))
    return step_line(whole, row["step"]).replace(f"/{row['step']}", "", 1).rpartition("  left")[0]
