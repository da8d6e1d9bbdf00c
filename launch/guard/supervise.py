"""Supervises a launch: forwards stop signals, ends the remaining hosts when one fails, and reports why.

The command runs below a guard (`elas.launch.guard.guard`) in its own session, on a leash: if this process dies for any
reason, the guard ends everything. Other hosts have guards too, whose leashes `elas.launch.ssh.wrapper` holds. The
wrapper and this process communicate through a folder: `order` holds `stop SIGNAL` or `kill`, `wrapper.HOST` the process
that holds a leash, `status.HOST` the exit status of a host's part.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from elas.launch.guard.processes import descendants, status_within
from elas.launch.hostfile import ranks_in_words

PEERS_S = 8.0
"""Seconds that the other hosts have to end by themselves, and report their errors, after one has failed."""
FINISH_S = 30.0
"""Ranks end together: a host that still runs this many seconds after another ended successfully is stuck."""
POLL_S = 0.2
SAY_S = 8.0
"""Seconds between two lines about what it waits for: the ranks' start, or their end after a stop signal."""
SAVED_S = 2.0
"""Seconds after the run has stopped to the line that a second signal loses nothing."""


@dataclass
class Outcome:
    """Outcome of a launch.

    Attributes:
        status: exit status of the guard.
        asked: the signal that stopped it; None if it ended by itself.
        hosts: exit status by host, where known.
        failed: the hosts that failed by themselves; the others were ended because of them.
    """

    status: int = 0
    asked: int | None = None
    hosts: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


def label(parts: dict[str, range]) -> str:
    """Format ranks by host as `ranks 0-1 on n1, rank 2 on n2`."""
    return ", ".join(f"{ranks_in_words(ranks)} on {host}" for host, ranks in parts.items())


def guarded(command: list[str], host: str, parts: dict[str, range]) -> list[str]:
    """The command line that runs `command` below a guard on a leash without a heartbeat limit."""
    guard = [sys.executable, "-m", "elas.launch.guard", "--leash", "--silence", "0"]
    return [*guard, "--host", host, "--label", label(parts), "--", *command]


class Supervisor:
    """Runs a command until it ends.

    Args:
        command: the command to run on this host.
        parts: ranks by host.
        folder: where the hosts' wrappers read orders and write their status; None if all ranks are descendants of
            `command`.
        env: environment of the command.
        saved: whether the run has written that it stopped; asked after a stop signal.
    """

    def __init__(
        self,
        command: list[str],
        parts: dict[str, range],
        folder: Path | None,
        env: dict[str, str],
        saved: Callable[[], bool] = lambda: False,
    ):
        self.command, self.parts, self.folder, self.env = command, parts, folder, env
        self._is_saved, self._saved = saved, False
        self._asked: list[int] = []
        self._failed_since: float | None = None
        self._ended_since: float | None = None
        self._killed = False
        self._since = self._said = time.monotonic()
        self._starting, self._seen = folder is None, False  # ranks on other hosts are not visible here
        self.result = Outcome()

    def run(self) -> Outcome:
        """Run the command; returns when everything has ended."""
        host = os.uname().nodename
        with noted_signals(self._asked):
            self._guard = subprocess.Popen(
                guarded(self.command, host, self.parts), stdin=subprocess.PIPE, env=self.env, start_new_session=True
            )
            self._since = self._said = time.monotonic()
            answered = 0
            while (status := status_within(self._guard, POLL_S)) is None:
                if len(self._asked) > answered:
                    answered = len(self._asked)
                    self._forward_stop()
                self._report_waiting()
                self._watch_hosts()
            self.result.status = status
            self._leash().close()
        self._read_statuses()
        self.result.asked = self._asked[0] if self._asked else None
        return self.result

    def _forward_stop(self) -> None:
        """Forward the first stop signal to the ranks; at the second, kill them."""
        name = signal.Signals(self._asked[-1]).name
        if len(self._asked) > 1:
            _say(f"{name}: killing all processes now")
            self._kill()
            return
        self._since = self._said = time.monotonic()
        if self.folder is not None:  # otherwise rank 0 prints on this console what a second signal would lose
            _say(f"{name}: asked {label(self.parts)} to save and end; a second one kills them at once")
        # The ranks get the same signal, for consistent messages; except SIGHUP, which is ignored below the guard.
        order = f"stop {'SIGTERM' if name == 'SIGHUP' else name}"
        if self.folder is None:
            self._order_guard(order)
        else:
            _order_hosts(self.folder, order)

    def _report_waiting(self) -> None:
        """Print a line every 8 s until the ranks print their own, and again from a stop signal to the end."""
        now = time.monotonic()
        if self._asked and not self._saved and self._is_saved():
            self._saved, self._said = True, now - SAY_S + SAVED_S
        if self._killed or not (self._asked or self._starting) or now - self._said < SAY_S:
            return
        self._said, passed = now, f"{now - self._since:.0f} s"
        if self._asked:
            name = signal.Signals(self._asked[-1]).name
            waits = f"waiting for {label(self.parts)} to end ({passed}); a second one kills them at once"
            if self._saved:
                _say(f"{name}: the run has stopped, {waits} and loses nothing but what trackers have yet to send")
            else:
                _say(f"{name}: {waits}, and what was trained since the last checkpoint is lost")
            return
        self._starting = not self._seen  # ranks seen 8 s ago print their own lines by now
        self._seen = any(process.rank is not None for process in descendants())
        if self._starting:
            _say(f"still starting {label(self.parts)} ({passed})")

    def _watch_hosts(self) -> None:
        """End all hosts if one has failed, or ended, and the others do not follow in time."""
        self._read_statuses()
        now = time.monotonic()
        if self.result.hosts and self._ended_since is None:
            self._ended_since = now
        if any(self.result.hosts.values()) and self._failed_since is None:
            self._failed_since = now
        late = self._failed_since is not None and now - self._failed_since > PEERS_S
        stuck = self._ended_since is not None and now - self._ended_since > FINISH_S
        if self._killed or not (late or stuck):
            return
        running = {host: ranks for host, ranks in self.parts.items() if host not in self.result.hosts}
        why = "" if late else f", still running {FINISH_S:.0f} s after another host ended"
        _say(f"ending {label(running) if running else 'the remaining processes'}{why}")
        self._kill()

    def _kill(self) -> None:
        self._killed = True
        if self.folder is not None:
            _order_hosts(self.folder, "kill")
            end = time.monotonic() + 3  # lets the hosts' last messages arrive
            while len(self.result.hosts) < len(self.parts) and time.monotonic() < end and self._guard.poll() is None:
                time.sleep(POLL_S)
                self._read_statuses()
        self._order_guard("kill")

    def _order_guard(self, order: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # the guard has just ended
            self._leash().write(f"{order}\n".encode())
            self._leash().flush()

    def _leash(self) -> IO[bytes]:
        assert self._guard.stdin is not None  # started with a pipe
        return self._guard.stdin

    def _read_statuses(self) -> None:
        if self.folder is None:
            return
        for host in self.parts.keys() - self.result.hosts.keys():
            gone = _is_gone(self.folder, host)  # before reading the status, which it may write just before it ends
            status = _left_by(self.folder, host, "status")
            if status is None and gone:
                status = 128 + signal.SIGKILL
            if status is not None:
                self.result.hosts[host] = status
                if status and not self._killed:
                    self.result.failed.append(host)


def _order_hosts(folder: Path, order: str) -> None:
    """Give the wrappers of all hosts an order."""
    partial = folder / ".order"
    partial.write_text(order)
    partial.replace(folder / "order")


def _left_by(folder: Path, host: str, what: str) -> int | None:
    """The number that a host's wrapper wrote; None if it has not."""
    with contextlib.suppress(FileNotFoundError):
        return int((folder / f"{what}.{host}").read_text())
    return None


def _is_gone(folder: Path, host: str) -> bool:
    """Whether the wrapper that holds a host's leash has ended."""
    wrapper = _left_by(folder, host, "wrapper")
    return wrapper is not None and not Path(f"/proc/{wrapper}").exists()


@contextlib.contextmanager
def noted_signals(asked: list[int]) -> Iterator[None]:
    """While entered, SIGINT, SIGTERM and SIGHUP are only appended to `asked`; ignored ones (nohup) stay ignored."""
    wanted = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda n, _frame: asked.append(n)) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def control_folder(parts: dict[str, range]) -> Iterator[Path]:
    """A temporary folder for one launch, readable only by its user; `hosts.json` in it gives the ranks of each host."""
    with tempfile.TemporaryDirectory(prefix="elas-launch-") as name:
        folder = Path(name)
        (folder / "hosts.json").write_text(json.dumps({host: ranks_in_words(r) for host, r in parts.items()}))
        yield folder


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be closed
        print(f"elas: {text}", file=sys.stderr, flush=True)
