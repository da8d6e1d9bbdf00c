"""The verdict on a launched run: its last line, the JSON file, and the exit status."""

import contextlib
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from elas.checkpoint.folder import Checkpoint, checkpoints_in, read_checkpoint
from elas.console import Console
from elas.files import write_json
from elas.launch.guard.processes import signal_name
from elas.launch.guard.supervise import Outcome
from elas.launch.hostfile import ranks_in_words
from elas.launch.job import Ending, Job, how_it_ended
from elas.run_dir import checkpoints_dir
from elas.train.standing import how_to_resume


def conclude(
    job: Job,
    outcome: Outcome,
    parts: dict[str, range],
    before: dict[str, str],
    after: dict[str, str],
    json_file: Path | None = None,
    *,
    run_speaks: bool = False,
) -> int:
    """Report how a run ended.

    Args:
        job: the run.
        outcome: how its processes ended.
        parts: ranks by host.
        before: the run's markers before the start.
        after: its markers now.
        json_file: also receives the facts as JSON; None for none.
        run_speaks: rank 0 prints to the same console, so for a run that is done or stopped its own last line suffices.

    Returns:
        The exit status: 0 done, 2 user error, 128 + n stopped by signal n, 1 everything else.
    """
    ending = how_it_ended(job, before, after, outcome.status)
    if ending.state == "failed":
        ending = with_newest(ending, job)
    status = _status(ending, outcome)
    statuses = {host: outcome.hosts.get(host, outcome.status if len(parts) == 1 else None) for host in parts}
    hosts = [{"host": h, "ranks": list(ranks), "status": statuses[h]} for h, ranks in parts.items()]
    facts = {"state": ending.state, "status": status, "step": ending.step, "checkpoint": ending.checkpoint}
    write_json(json_file, {**facts, "run_dir": str(job.run_dir), "world_size": job.world, "hosts": hosts})
    if run_speaks and (ending.state == "stopped" or (ending.state == "done" and outcome.status == 0)):
        return status
    lines = "\n".join(_lines(job, ending, outcome, parts))
    Console("err" if status else "out").clear_below()  # the block of a rank 0 that was killed
    with contextlib.suppress(OSError):  # the terminal may be closed; the exit status still reports the outcome
        print(lines, file=sys.stdout if status == 0 else sys.stderr, flush=True)
    return status


def with_newest(ending: Ending, job: Job) -> Ending:
    """Add the newest intact checkpoint of a failed run to its ending, if there is one."""
    saved = map(read_checkpoint, checkpoints_in(checkpoints_dir(job.config)))
    newest = next((found for found in saved if isinstance(found, Checkpoint)), None)
    return ending if newest is None else replace(ending, step=newest.step, checkpoint=str(newest.path))


def _status(ending: Ending, outcome: Outcome) -> int:
    if ending.state == "done":
        return 0
    if outcome.asked is not None:
        return 128 + outcome.asked
    user_error = set(outcome.hosts.values()) == {2} or outcome.status == 2
    return 2 if ending.state == "failed" and user_error else 1


def _lines(job: Job, ending: Ending, outcome: Outcome, parts: dict[str, range]) -> list[str]:
    saved = ending.checkpoint
    again = how_to_resume(job.config, Path(saved)) if saved else "the same command starts it again"
    where = f"step {ending.step}" + (f", {ending.checkpoint}" if ending.checkpoint else "")
    if ending.state == "done":
        late = f"; afterwards its launcher ended with status {outcome.status}" if outcome.status else ""
        return [f"done: {where}{late}" + (f" ({ending.reason})" if ending.reason else "")]
    name = signal.Signals(outcome.asked).name if outcome.asked is not None else ""
    if ending.state == "stopped":
        return [f"stopped at {where} ({name or ending.reason}); {again}"]
    kept = f"run the same command to resume from {ending.checkpoint}" if ending.checkpoint else "nothing was saved yet"
    if name:
        return [f"error: ended by {name} before it could save; {kept}"]
    failed = {host: outcome.hosts[host] for host in outcome.failed} or {os.uname().nodename: outcome.status}
    if set(failed.values()) == {2}:
        return ["error: the settings were refused; see above"]
    named = [
        f"{host}{f' ({ranks_in_words(parts[host])})' if host in parts else ''} with status {_in_words(status)}"
        for host, status in failed.items()
    ]
    missing = "" if any(failed.values()) else f", but there is no {job.run_dir / 'DONE'}"
    return [f"error: the run did not complete: {', '.join(named)}{missing}; {kept}"]


def _in_words(status: int) -> str:
    """An exit status, with its signal's name: 128 + n, or 256 − n if Python exited with −n.

    255 is ssh's own status for a lost connection, not a signal.
    """
    number = status - 128 if 128 < status < 192 else 256 - status if 192 <= status < 255 else 0
    return f"{status} ({signal_name(number)})" if 0 < number < 32 else str(status)
