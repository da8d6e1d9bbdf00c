"""Runs one host's part of a job and ensures that none of its processes outlives it.

    python -m elas.launch.guard [--leash] --host n2 --label "rank 2" -- COMMAND…

`elas launch` and `launch/slurm/pretrain.sbatch` run it between the launcher and the ranks on every host. It

- adopts orphaned processes, so it finds every process of the job, and kills the remaining ones at the end;
- reports which rank ended first and how, which no launcher does;
- forwards SIGTERM, SIGINT and SIGUSR1 once, and to the ranks only, which then save and end; the launchers in between
  would kill them within seconds;
- with `--leash`, ends the job when its launcher is gone: standard input closes, or heartbeats stop;
- ends the job when a rank has been stopped by a signal (SIGSTOP) for longer than `STOPPED_S`.

Commands on the leash are lines: `+` is a heartbeat, `stop NAME` acts like that signal, `kill` ends everything now. The
ranks in turn end when the guard does (`elas.launch.guard.leash`). Only the standard library is imported, for a fast
start.
"""

import argparse
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from elas import failed_rank
from elas.launch.guard.processes import (
    Process,
    adopt_orphans,
    catches,
    descendants,
    end_with_parent,
    exit_code,
    kill,
    status_in_words,
)

INTERVAL_S = 0.1
SILENCE_S = 15.0
"""Seconds without a heartbeat after which the leash counts as lost: the network or the launching host is down."""
STOPPED_S = 20.0
"""Seconds after which a stopped rank (SIGSTOP) is treated as failed."""
GRACE_S = 20.0
"""Seconds that ranks have to finish their step and save after the leash is lost."""
VARIABLE = "ELAS_GUARD"
"""Set in the environment of the job; see `elas.launch.guard.leash`."""


class Guard:
    """The guard of one command.

    Args:
        command: the command to run.
        host: this host's name, for messages.
        label: what runs here, for messages: `ranks 2-3`.
        leash: whether to end the job when standard input closes.
        silence_s: longest time without a heartbeat on the leash; 0 for no limit.
        stopped_s: longest time that a rank may be stopped by a signal.
        grace_s: time that ranks have to save when the leash is lost.
    """

    def __init__(
        self,
        command: list[str],
        *,
        host: str,
        label: str,
        leash: bool,
        silence_s: float = SILENCE_S,
        stopped_s: float = STOPPED_S,
        grace_s: float = GRACE_S,
    ):
        self.command, self.host, self.label, self.leash = command, host, label, leash
        self._silence_s, self._stopped_after, self._grace_s = silence_s, stopped_s, grace_s
        self._ranks: dict[int, int] = {}  # process to rank
        self._gone: set[int] = set()
        self._training: set[int] = set()  # processes that have handled stop signals at some time
        self._stopped_since: dict[int, float] = {}
        self._deadline: float | None = None  # when everything is killed
        self._asked = 0  # the stop signal that was forwarded to the ranks
        self._too_early = False  # SIGUSR1 before any rank could save: the sender requeues the job
        self._requests: list[int] = []
        self._status: int | None = None  # of the command, as from os.waitpid
        self._failed = False
        self._suspect: int | None = None  # a rank that disappeared before its exit status could be read
        self._buffer = b""

    def run(self) -> int:
        """Run the command until it ends or has to be ended.

        Returns:
            The command's exit status, 128 + n if signal n killed it; 1 if it left ranks behind or had to be ended; 0
            if SIGUSR1 came before any rank trained, as there was nothing to save.
        """
        adopt_orphans()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, lambda n, _frame: self._requests.append(n))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        folder = tempfile.mkdtemp(prefix="elas-guard-")
        self._failed_file = Path(folder) / "failed"
        readable, self._held = os.pipe()  # never written to; the ranks see end of input when this process ends
        self._main = subprocess.Popen(
            self.command,
            stdin=readable,
            env={**os.environ, VARIABLE: str(os.getpid()), failed_rank.VARIABLE: str(self._failed_file)},
            start_new_session=True,
            preexec_fn=_prepare,
        ).pid
        os.close(readable)
        self._heard = time.monotonic()
        while self._status is None:
            self._watch()
            if self._status is None:
                time.sleep(INTERVAL_S)
        status = self._finish(self._status)
        shutil.rmtree(folder, ignore_errors=True)
        return status

    def _watch(self) -> None:
        now = time.monotonic()
        for number in self._take_requests():
            self._stop(number)
        if self.leash:
            self._read_leash(now)
        processes = descendants()
        self._reap()  # before looking at ranks: if the command was killed, its ranks ended because of that
        self._look_at(processes, now)
        if self._deadline is not None and now > self._deadline and self._status is None:
            kill(processes)

    def _take_requests(self) -> list[int]:
        requests, self._requests = self._requests, []
        return requests

    def _find_ranks(self, processes: list[Process]) -> None:
        inside: set[int] = set()
        for process in processes:
            adopted = process.parent == os.getpid() and process.pid != self._main  # a child that a rank left behind
            if process.parent in self._ranks or process.parent in inside:
                inside.add(process.pid)  # shown with a rank of its own while that rank ends: its environment goes first
            elif process.rank is not None and not adopted and process.state not in "ZX":
                self._ranks.setdefault(process.pid, process.rank)

    def _look_at(self, processes: list[Process], now: float) -> None:
        """Note the ranks, and report those that ended or are stopped."""
        alive = set()
        self._find_ranks(processes)
        for process in processes:
            if process.pid not in self._ranks or process.pid in self._gone:
                continue
            alive.add(process.pid)
            if process.pid not in self._training and catches(process, signal.SIGTERM):
                self._training.add(process.pid)
            if process.state in "ZX":
                self._ended(process.pid, process.status)
            if process.state == "T":
                since = self._stopped_since.setdefault(process.pid, now)
                if now - since > self._stopped_after and self._deadline is None:
                    self._report(f"{self._name(process.pid)} has been stopped by a signal for {now - since:.0f} s")
                    self._failed, self._deadline = True, now
            else:
                self._stopped_since.pop(process.pid, None)
        for pid in self._ranks.keys() - self._gone - alive:
            self._ended(pid, None)

    def _ended(self, pid: int, status: int | None) -> None:
        """Report how a rank ended if it is the first to fail and its end was not requested."""
        first = not self._failed
        self._gone.add(pid)
        because_of_it = self._status is not None and os.WIFSIGNALED(self._status)
        how = "is gone" if status is None else status_in_words(status)
        if status is None or exit_code(status) not in (0, 2):  # with 2 the rank has printed the user error itself
            failed_rank.report(self._failed_file, f"{self._name(pid)} {how}")
        if status == 0 or not first or self._deadline is not None or because_of_it:
            return
        if status is None:  # its parent reaped it first; if the command fails, `_finish` names this rank
            self._suspect = pid
            return
        self._failed = True
        if exit_code(status) != 2:
            self._report(f"{self._name(pid)} {how}")

    def _name(self, pid: int) -> str:
        return f"rank {self._ranks[pid]} (process {pid})"

    def _stop(self, number: int) -> None:
        """Forward a stop signal to the ranks, which save and end; if none trains yet, end everything."""
        if self._asked:
            return
        self._asked = number
        # Python always handles SIGINT, so a handler for SIGTERM shows that a rank has begun to handle stop requests.
        caught = signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM
        processes = descendants()
        self._find_ranks(processes)  # those that started since the last look too, which a busy machine may delay
        ranks = [p for p in processes if p.pid in self._ranks and catches(p, caught)]
        latest = {rank: pid for pid, rank in self._ranks.items()}
        if not ranks and self._training.isdisjoint(latest.values()):  # else the ranks have saved and are leaving
            self._deadline, self._too_early = time.monotonic(), self._asked == signal.SIGUSR1
        kill(ranks, self._asked)

    def _read_leash(self, now: float) -> None:
        while select.select([0], [], [], 0)[0]:
            data = os.read(0, 4096)
            if not data:
                self._lost("the launcher is gone")
                return
            self._heard = now
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            if b"kill" in lines:
                self._deadline = now
            for line in lines:
                if line.startswith(b"stop "):
                    self._stop(signal.Signals[line.removeprefix(b"stop ").decode()])
        if self._silence_s and now - self._heard > self._silence_s:
            self._lost(f"no heartbeat from the launcher for {self._silence_s:.0f} s")

    def _lost(self, why: str) -> None:
        self.leash = False
        names = ", ".join(self._name(pid) for pid in self._ranks if pid not in self._gone)
        self._report(f"{why}; ending {names or self.label}")
        self._failed = True
        self._stop(signal.SIGTERM)
        self._deadline = self._deadline or time.monotonic() + self._grace_s

    def _reap(self) -> None:
        """Reap all ended children: the command and adopted processes."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._main:
                self._status = status

    def _finish(self, ended: int) -> int:
        """Kill the processes that the command, of wait status `ended`, left behind; returns the status of `run`."""
        left = [process for process in descendants() if process.state not in "ZX"]
        ranks = [self._name(p.pid) for p in left if p.pid in self._ranks]
        by_itself = self._deadline is None and not self._asked
        if by_itself and not self._failed and self._suspect is not None and exit_code(ended) not in (0, 2):
            self._report(f"{self._name(self._suspect)} was the first to end")
        if by_itself and (ranks or os.WIFSIGNALED(ended)):
            what = f"the process that started {self.label} {status_in_words(ended)}"
            self._report(f"{what}; ending {', '.join(ranks) or 'the rest'}")
        while left:
            kill(left)
            time.sleep(0.02)
            self._reap()
            left = [process for process in descendants() if process.state not in "ZX"]
        if self._too_early and not self._failed:
            return 0
        bad = ranks or self._deadline is not None
        return exit_code(ended) or (1 if bad else 0)

    def _report(self, what: str) -> None:
        try:
            print(f"error: {self.host}: {what}", file=sys.stderr, flush=True)
        except OSError:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115  the reader is gone


def _prepare() -> None:
    """In the child before exec: ignore SIGUSR1, which would kill launchers, and die with the guard."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    end_with_parent()


def main(argv: list[str]) -> int:
    """Run the guard; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m elas.launch.guard", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--leash", action="store_true", help="end the job when standard input closes")
    parser.add_argument(
        "--silence", type=float, default=SILENCE_S, help="seconds without a heartbeat on the leash; 0: no limit"
    )
    parser.add_argument("--host", default=os.uname().nodename, help="for messages")
    parser.add_argument("--label", default="the job", help="what runs here, for messages")
    parser.add_argument("--stopped", type=float, default=STOPPED_S, help="seconds that a rank may be stopped (SIGSTOP)")
    parser.add_argument("--grace", type=float, default=GRACE_S, help="seconds to save after the leash is lost")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command")
    try:
        return Guard(command, host=options.host, label=options.label, leash=options.leash,
                     silence_s=options.silence, stopped_s=options.stopped, grace_s=options.grace).run()  # fmt: skip
    except FileNotFoundError as error:
        print(f"error: {options.host}: {error.filename}: no such program", file=sys.stderr)
        return 127
