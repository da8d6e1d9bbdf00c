"""Follows a submitted SLURM job until it ends.

A run's outcome is read from its markers (`elas.launch.job.how_it_ended`). SLURM's job state only explains failures.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

from elas.launch.job import Ending, Job, how_it_ended, markers

POLL_S, LOG_S = 2.0, 0.5
"""Seconds between two queries of SLURM, and between two reads of the log."""
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE",
          "OUT_OF_MEMORY", "REVOKED"}  # fmt: skip
_GONE = {"JobState": "", "ExitCode": ""}  # SLURM forgets a job some minutes after its end
_RANK = re.compile(r"^error: \S+: rank \d+ .*")


class Submitted:
    """A submitted job.

    Args:
        number: SLURM's job ID.
        jobs: its runs, in order of the array tasks.
        is_array: whether it is a job array.
    """

    def __init__(self, number: str, jobs: list[Job], *, is_array: bool):
        self.number, self.jobs, self.is_array = number, jobs, is_array
        self.before = [markers(job.run_dir) for job in jobs]

    def names(self) -> list[str]:
        """SLURM's name of each run's job: the job ID, in an array `ID_TASK`."""
        return [f"{self.number}_{i}" if self.is_array else self.number for i in range(len(self.jobs))]

    def log(self) -> str:
        """Path of the log; for an array, with `*` for the task number."""
        log = ask(self.names()[0]).get("StdOut", f"elas-{self.number}.out")
        if not self.is_array:
            return log
        return re.sub(r"_\d+(?=\.\w+$|$)", "_*", re.sub(r"_4294967294|_%a", "_0", log))

    def lines(self) -> list[str]:
        """Lines to print after submission."""
        runs = f", {len(self.jobs)} runs" if self.is_array else f", in {self.jobs[0].run_dir}"
        return [
            f"job    {self.number}: {self.jobs[0].world} ranks{runs}",
            f"log    {self.log()}",
            f"watch  squeue --job {self.number}; tail -F {self.log()}",
            f"stop   scancel {self.number}   (it saves first)",
        ]

    def still_there(self) -> str:
        """The line to print when the user stops waiting for the job."""
        return f"job {self.number} keeps running; watch it: tail -F {self.log()}; stop it: scancel {self.number}"


def ask(name: str) -> dict[str, str]:
    """Fields of `scontrol show job`; empty if SLURM does not answer, `_GONE` if it no longer knows the job."""
    try:
        done = subprocess.run(["scontrol", "show", "job", name], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return {}
    if done.returncode:
        return _GONE if "Invalid job id" in done.stderr else {}
    found: dict[str, str] = {}
    for line in done.stdout.split("\n\n")[0].splitlines():
        whole = line.strip()
        words = [whole] if whole.startswith(("StdOut=", "StdErr=", "Command=", "WorkDir=")) else whole.split()
        found |= dict(word.split("=", 1) for word in words if "=" in word)
    return found


def wait(submitted: Submitted) -> tuple[int, list[dict]]:
    """Follow a job until it ends: prints a single run's log, or the state changes of a sweep's runs.

    Returns:
        The exit status, and the outcome of each run: `run_dir`, `job`, `state`, `step`, `checkpoint`, `error`.
    """
    names = submitted.names()
    runs = [_Run(name, job, show_log=not submitted.is_array) for name, job in zip(names, submitted.jobs)]
    asked = 0.0
    while not all(run.ended for run in runs):
        if time.monotonic() - asked > POLL_S:
            for run in runs:
                if not run.ended:
                    run.look()
            asked = time.monotonic()
        for run in runs:
            run.read_log()
        time.sleep(LOG_S)
    for run in runs:
        run.read_log()
    statuses, facts = zip(*(run.judge(before) for run, before in zip(runs, submitted.before)))
    return max(statuses), list(facts)


class _Run:
    """One run of a job that is followed."""

    def __init__(self, name: str, job: Job, *, show_log: bool):
        self.name, self.job, self.show_log = name, job, show_log
        self.seen: dict[str, str] = {}
        self.ended = False
        self._reported = ""
        self._log: Path | None = None
        self._read = 0

    def look(self) -> None:
        """Query SLURM, and print the state if it has changed."""
        found = ask(self.name)
        if not found:
            return  # no answer; try again at the next poll
        state, last = found["JobState"], self.seen.get("JobState")
        # A requeued job may pass through such a state, so it must be seen twice.
        self.ended = state in ("", "COMPLETED") or (state in _ENDED and state == last)
        if found is not _GONE:
            self.seen = found
        if self._log is None and found.get("StdOut"):
            self._log = Path(found["StdOut"])
        where = {"RUNNING": found.get("NodeList"), "PENDING": found.get("Reason")}.get(state)
        text = state.lower() + (f" ({where})" if where and where != "None" else "")
        if text != self._reported and state not in ("", "COMPLETING"):
            self._reported = text
            run = "" if self.show_log else f" in {self.job.run_dir}"
            print(f"elas: job {self.name}{run}: {text}", file=sys.stderr, flush=True)

    def read_log(self) -> None:
        """Print what was added to the log since the last call."""
        if not self.show_log or self._log is None:
            return
        try:
            with self._log.open("rb") as file:
                file.seek(self._read)
                data = file.read()
        except OSError:
            return  # does not exist yet
        self._read += len(data)
        sys.stdout.write(data.decode(errors="replace"))
        sys.stdout.flush()

    def judge(self, before: dict[str, str]) -> tuple[int, dict]:
        """Print how the run ended.

        Args:
            before: its markers before it was submitted.

        Returns:
            The exit status, and the run's outcome as in `wait`.
        """
        status = int(self.seen.get("ExitCode", "0:0").split(":")[0] or 0)
        failed = self.seen.get("JobState", "COMPLETED") != "COMPLETED"
        ending = how_it_ended(self.job, before, markers(self.job.run_dir), status or int(failed))
        facts = {"run_dir": str(self.job.run_dir), "job": self.name, "state": ending.state}
        facts |= {"step": ending.step, "checkpoint": ending.checkpoint}
        if ending.state == "done":
            print(f"done: job {self.name}, step {ending.step}, {ending.checkpoint}", flush=True)
            return 0, facts
        facts["error"] = self._why(ending, status)
        print(f"error: {facts['error']}", file=sys.stderr, flush=True)
        return (2 if ending.state == "failed" and status == 2 else 1), facts

    def _why(self, ending: Ending, status: int) -> str:
        state = self.seen.get("JobState", "is gone")
        log = f"; its log is {self._log}" if self._log else ""
        again = "submit it again to resume from there"
        seen = "; ".join(complaints(self._log)) if self._log else ""
        if ending.state == "stopped":
            where = f"step {ending.step}, {ending.checkpoint}"
            return f"job {self.name} {state}: stopped at {where} ({seen or ending.reason}); {again}{log}"
        hint = {"TIMEOUT": " before it had saved: increase --signal-seconds"}.get(state, "")
        return f"job {self.name} {state} (status {status}){hint}" + (f": {seen}" if seen else "") + log


def complaints(log: Path) -> list[str]:
    """From the log of a job's last start, the first `error:` line and the first one that names a host and rank."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return []
    starts = [i for i, line in enumerate(lines) if line.startswith("elas: job ")]
    lines = [line for line in lines[starts[-1] if starts else 0 :] if line.startswith("error: ")]
    named = next((line for line in lines if _RANK.match(line)), None)
    return [line.removeprefix("error: ") for line in dict.fromkeys([*lines[:1], *([named] if named else [])])]
