"""The last word on a run that was started: what to print, what to write, which exit status."""

import contextlib
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from elas.checkpoint.folder import Checkpoint, checkpoints_in, read_checkpoint
from elas.files import write_json
from elas.launch.guard.processes import signal_name
from elas.launch.guard.supervise import Watched
from elas.launch.hostfile import ranks_in_words
from elas.launch.job import Ending, Job, how_it_ended
from elas.run_dir import checkpoints_dir
from elas.train.standing import how_to_go_on


def conclude(
    job: Job,
    watched: Watched,
    parts: dict[str, range],
    before: dict[str, str],
    after: dict[str, str],
    json_file: Path | None = None,
    *,
    run_speaks: bool = False,
) -> int:
    """Say how a run ended.

    Args:
        job: the run.
        watched: how what was started ended.
        parts: which ranks ran where.
        before: the run's markers before it was started,
        after: and now.
        json_file: for the same facts; None for none.
        run_speaks: rank 0's own last line stands above: one of a run that is done or stopped as asked needs no other.

    Returns:
        The exit status: 0 done, 2 the user's mistake, 128 + n stopped by signal n, 1 everything else.
    """
    ending = how_it_ended(job, before, after, watched.status)
    if ending.state == "failed":
        ending = with_newest(ending, job)
    status = _status(ending, watched)
    statuses = {host: watched.hosts.get(host, watched.status if len(parts) == 1 else None) for host in parts}
    hosts = [{"host": h, "ranks": list(ranks), "status": statuses[h]} for h, ranks in parts.items()]
    facts = {"state": ending.state, "status": status, "step": ending.step, "checkpoint": ending.checkpoint}
    write_json(json_file, {**facts, "run_dir": str(job.run_dir), "world_size": job.world, "hosts": hosts})
    if run_speaks and (ending.state == "stopped" or (ending.state == "done" and watched.status == 0)):
        return status
    lines = "\n".join(_lines(job, ending, watched, parts))
    with contextlib.suppress(OSError):  # whoever would read it may be gone; the status says the same
        print(lines, file=sys.stdout if status == 0 else sys.stderr, flush=True)
    return status


def with_newest(ending: Ending, job: Job) -> Ending:
    """The ending of a failed run with the newest intact checkpoint that it has, if any."""
    saved = map(read_checkpoint, checkpoints_in(checkpoints_dir(job.config)))
    newest = next((found for found in saved if isinstance(found, Checkpoint)), None)
    return ending if newest is None else replace(ending, step=newest.step, checkpoint=str(newest.path))


def _status(ending: Ending, watched: Watched) -> int:
    if ending.state == "done":
        return 0
    if watched.asked is not None:
        return 128 + watched.asked
    mistaken = set(watched.hosts.values()) == {2} or watched.status == 2
    return 2 if ending.state == "failed" and mistaken else 1


def _lines(job: Job, ending: Ending, watched: Watched, parts: dict[str, range]) -> list[str]:
    saved = ending.checkpoint
    again = how_to_go_on(job.config, Path(saved)) if saved else "the same command begins again"
    where = f"step {ending.step}" + (f", {ending.checkpoint}" if ending.checkpoint else "")
    if ending.state == "done":
        late = f"; afterwards its launcher ended with status {watched.status}" if watched.status else ""
        return [f"done: {where}{late}" + (f" ({ending.reason})" if ending.reason else "")]
    name = signal.Signals(watched.asked).name if watched.asked is not None else ""
    if ending.state == "stopped":
        return [f"stopped at {where} ({name or ending.reason}); {again}"]
    kept = f"run the same command to go on from {ending.checkpoint}" if ending.checkpoint else "nothing was saved yet"
    if name:
        return [f"error: ended by {name} before it could save; {kept}"]
    failed = {host: watched.hosts[host] for host in watched.failed} or {os.uname().nodename: watched.status}
    if set(failed.values()) == {2}:
        return ["error: the settings were refused; see above"]
    named = [
        f"{host}{f' ({ranks_in_words(parts[host])})' if host in parts else ''} with status {_in_words(status)}"
        for host, status in failed.items()
    ]
    missing = "" if any(failed.values()) else f", but there is no {job.run_dir / 'DONE'}"
    return [f"error: the run did not come to its end: {', '.join(named)}{missing}; {kept}"]


def _in_words(status: int) -> str:
    """An exit status, with the signal that it stands for: 128 + n, or, where Python was asked for −n, 256 − n.

    255 is ssh's own, for a connection that is lost, and no signal.
    """
    number = status - 128 if 128 < status < 192 else 256 - status if 192 <= status < 255 else 0
    return f"{status} ({signal_name(number)})" if 0 < number < 32 else str(status)
