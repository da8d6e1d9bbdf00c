"""Runs one host's part of a job, and sees to it that nothing of it is left when it ends, however it ends.

    python -m elas.launch.guard [--leash] --host n2 --told "rank 2" -- COMMAND…

`elas launch` and `launch/slurm/pretrain.sbatch` put it between the launcher and the ranks on every host. It

- adopts whatever loses its parent, so it finds every process of the job, and kills what is left at the end;
- says which rank ended first and by what, which no launcher does;
- hands SIGTERM, SIGINT and SIGUSR1 on to the ranks alone, once: they save and end; the launchers between would kill
  them within seconds;
- with `--leash`, ends the job when whoever started it is gone: its standard input closes, or nothing comes over it;
- ends a job of which a rank stands still, stopped by a signal, for longer than `STOPPED_S`.

Commands on the leash are lines: `+` a sign of life, `stop NAME` as that signal, `kill` end everything now. The ranks in
turn end when the guard does (`elas.launch.guard.leash`). Only the standard library is imported, so it starts at once.
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
"""A leash over which nothing comes for so long is lost: the network, or the host at its other end."""
STOPPED_S = 20.0
"""A rank that is stopped (SIGSTOP) for so long will not go on."""
GRACE_S = 20.0
"""What ranks that were asked to stop have to finish a step and save, when nobody is there to wait longer."""
VARIABLE = "ELAS_GUARD"
"""Set in the environment of the job; see `elas.launch.guard.leash`."""


class Guard:
    """The guard of one command.

    Args:
        command: what to run.
        host: this host's name, for messages.
        told: what runs here, for messages: `ranks 2-3`.
        leash: whether the job ends with whoever holds the other end of standard input.
        silence_s: how long nothing may come over the leash; 0 for any time.
        stopped_s: how long a rank may stand still.
        grace_s: how long ranks may take to save when the leash is lost.
    """

    def __init__(
        self,
        command: list[str],
        *,
        host: str,
        told: str,
        leash: bool,
        silence_s: float = SILENCE_S,
        stopped_s: float = STOPPED_S,
        grace_s: float = GRACE_S,
    ):
        self.command, self.host, self.told, self.leash = command, host, told, leash
        self._silence_s, self._stopped_after, self._grace_s = silence_s, stopped_s, grace_s
        self._ranks: dict[int, int] = {}  # process to rank
        self._gone: set[int] = set()
        self._training: set[int] = set()  # ranks that can be asked to stop, or were a moment ago
        self._stopped_since: dict[int, float] = {}
        self._deadline: float | None = None  # when everything is killed
        self._asked = 0  # the signal that the ranks were asked to stop with
        self._too_early = False  # SIGUSR1, and no rank that could save: whoever sent it will start all again
        self._requests: list[int] = []
        self._status: int | None = None  # of the command, as os.waitpid gives it
        self._failed = False
        self._suspect: int | None = None  # a rank that was gone before it could be seen how it ended
        self._buffer = b""

    def run(self) -> int:
        """Run the command to its end, or the end of what it needs.

        Returns:
            The command's exit status, 128 + n when it was killed by signal n; 1 when it left ranks behind, or had to
            be ended; 0 when SIGUSR1 came before a rank trained: there was nothing to save.
        """
        adopt_orphans()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, lambda n, _frame: self._requests.append(n))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        folder = tempfile.mkdtemp(prefix="elas-guard-")
        self._failed_file = Path(folder) / "failed"
        readable, self._held = os.pipe()  # the ranks' end of it closes when this process ends
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
        status = self._finish()
        shutil.rmtree(folder, ignore_errors=True)
        return status

    def _watch(self) -> None:
        now = time.monotonic()
        for number in self._take_requests():
            self._stop(number)
        if self.leash:
            self._read_leash(now)
        processes = descendants()
        self._reap()  # first, as ranks end with the command that started them
        self._look_at(processes, now)
        if self._deadline is not None and now > self._deadline and self._status is None:
            kill(processes)

    def _take_requests(self) -> list[int]:
        requests, self._requests = self._requests, []
        return requests

    def _look_at(self, processes: list[Process], now: float) -> None:
        """Find the ranks, and those of them that ended or stand still."""
        alive = set()
        for process in processes:
            adopted = process.parent == os.getpid() and process.pid != self._main  # what a rank left behind
            if process.rank is not None and not adopted and process.state not in "ZX":
                self._ranks.setdefault(process.pid, process.rank)
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
                    self._tell(f"{self._name(process.pid)} stands still, stopped by a signal, for {now - since:.0f} s")
                    self._failed, self._deadline = True, now
            else:
                self._stopped_since.pop(process.pid, None)
        for pid in self._ranks.keys() - self._gone - alive:
            self._ended(pid, None)

    def _ended(self, pid: int, status: int | None) -> None:
        """Say how a rank ended, if it is the first that did badly and nobody asked for it."""
        first = not self._failed
        self._gone.add(pid)
        because_of_it = self._status is not None and os.WIFSIGNALED(self._status)
        how = "is gone" if status is None else status_in_words(status)
        if status is None or exit_code(status) not in (0, 2):  # with 2 it has printed the mistake itself
            failed_rank.report(self._failed_file, f"{self._name(pid)} {how}")
        if status == 0 or not first or self._deadline is not None or because_of_it:
            return
        if status is None:  # its parent was faster; that the command fails will tell
            self._suspect = pid
            return
        self._failed = True
        if exit_code(status) != 2:
            self._tell(f"{self._name(pid)} {how}")

    def _name(self, pid: int) -> str:
        return f"rank {self._ranks[pid]} (process {pid})"

    def _stop(self, number: int) -> None:
        """Ask the ranks to save and end; where none trains yet, end everything."""
        if self._asked:
            return
        self._asked = number
        # Python always catches SIGINT: that a rank trains shows in another signal.
        caught = signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM
        ranks = [p for p in descendants() if p.pid in self._ranks and catches(p, caught)]
        latest = {rank: pid for pid, rank in self._ranks.items()}
        if not ranks and self._training.isdisjoint(latest.values()):  # else they have saved, and leave or have left
            self._deadline, self._too_early = time.monotonic(), self._asked == signal.SIGUSR1
        kill(ranks, self._asked)

    def _read_leash(self, now: float) -> None:
        while select.select([0], [], [], 0)[0]:
            data = os.read(0, 4096)
            if not data:
                self._lost("whoever started it is gone")
                return
            self._heard = now
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            if b"kill" in lines:
                self._deadline = now
            for line in lines:
                if line.startswith(b"stop "):
                    self._stop(signal.Signals[line.removeprefix(b"stop ").decode()])
        if self._silence_s and now - self._heard > self._silence_s:
            self._lost(f"nothing came from whoever started it for {self._silence_s:.0f} s")

    def _lost(self, why: str) -> None:
        self.leash = False
        names = ", ".join(self._name(pid) for pid in self._ranks if pid not in self._gone)
        self._tell(f"{why}; ending {names or self.told}")
        self._failed = True
        self._stop(signal.SIGTERM)
        self._deadline = self._deadline or time.monotonic() + self._grace_s

    def _reap(self) -> None:
        """Wait for everything that ended: the command, and adopted processes."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._main:
                self._status = status

    def _finish(self) -> int:
        """Kill what the command left behind, and judge."""
        left = [process for process in descendants() if process.state not in "ZX"]
        ranks = [self._name(p.pid) for p in left if p.pid in self._ranks]
        ended = self._status
        by_itself = self._deadline is None and not self._asked
        if by_itself and not self._failed and self._suspect is not None and exit_code(ended) not in (0, 2):
            self._tell(f"{self._name(self._suspect)} was the first to end")
        if by_itself and (ranks or os.WIFSIGNALED(ended)):
            self._tell(f"what started {self.told} {status_in_words(ended)}; ending {', '.join(ranks) or 'the rest'}")
        while left:
            kill(left)
            time.sleep(0.02)
            self._reap()
            left = [process for process in descendants() if process.state not in "ZX"]
        if self._too_early and not self._failed:
            return 0
        bad = ranks or self._deadline is not None
        return exit_code(ended) or (1 if bad else 0)

    def _tell(self, what: str) -> None:
        try:
            print(f"error: {self.host}: {what}", file=sys.stderr, flush=True)
        except OSError:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115  nobody listens any more


def _prepare() -> None:
    """In the command's process: launchers do not know SIGUSR1 and would die of it, and none outlives the guard."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    end_with_parent()


def main(argv: list[str]) -> int:
    """Run the guard; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m elas.launch.guard", description=__doc__.splitlines()[0])
    parser.add_argument("--leash", action="store_true", help="end with whoever holds the other end of standard input")
    parser.add_argument("--silence", type=float, default=SILENCE_S, help="seconds without a sign over the leash, or 0")
    parser.add_argument("--host", default=os.uname().nodename, help="for messages")
    parser.add_argument("--told", default="the job", help="what runs here, for messages")
    parser.add_argument("--stopped", type=float, default=STOPPED_S, help="seconds that a rank may stand still")
    parser.add_argument("--grace", type=float, default=GRACE_S, help="seconds that ranks have to save, at the end")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command")
    try:
        return Guard(command, host=options.host, told=options.told, leash=options.leash,
                     silence_s=options.silence, stopped_s=options.stopped, grace_s=options.grace).run()  # fmt: skip
    except FileNotFoundError as error:
        print(f"error: {options.host}: {error.filename}: no such program", file=sys.stderr)
        return 127
