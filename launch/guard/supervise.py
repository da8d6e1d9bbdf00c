"""Watches over what was started: hands on what it is asked to stop by, ends the rest when a host fails, tells why.

What is started runs below a guard (`elas.launch.guard.guard`) in a session of its own, on a leash: when this process
dies, however it dies, the guard ends everything. On other hosts there are guards too, whose leashes
`elas.launch.ssh.wrapper` holds; it and this process talk over a folder: `order` says `stop SIGNAL` or `kill`,
`wrapper.HOST` which process holds a leash, `status.HOST` how a host's part ended.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from elas.launch.guard.processes import descendants, status_within
from elas.launch.hostfile import ranks_in_words

PEERS_S = 8.0
"""How long the other hosts have to end by themselves, and to say what they saw, after one has failed."""
FINISH_S = 30.0
"""Ranks end together: a host that runs on so long after another has ended well is stuck."""
POLL_S = 0.2
SAY_S = 8.0
"""How often it says what it waits for: the ranks' start, and their end when they were asked to stop."""


@dataclass
class Watched:
    """How what was started ended.

    Attributes:
        status: exit status of the guard.
        asked: the signal that ended it; None when it ended by itself.
        hosts: exit status by host, of those that are known.
        failed: the hosts that failed by themselves; the others were ended because of them.
    """

    status: int = 0
    asked: int | None = None
    hosts: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


def told(parts: dict[str, range]) -> str:
    """`ranks 0-1 on n1, rank 2 on n2`."""
    return ", ".join(f"{ranks_in_words(ranks)} on {host}" for host, ranks in parts.items())


def guarded(command: list[str], host: str, parts: dict[str, range]) -> list[str]:
    """What runs `command` below a guard on a leash without a time limit."""
    guard = [sys.executable, "-m", "elas.launch.guard", "--leash", "--silence", "0"]
    return [*guard, "--host", host, "--told", told(parts), "--", *command]


class Supervisor:
    """Runs a command to its end.

    Args:
        command: what to run on this host.
        parts: which ranks run where.
        folder: where the hosts' wrappers look for orders and leave their status; None when all ranks are below
            `command` itself.
        env: environment of the command.
    """

    def __init__(self, command: list[str], parts: dict[str, range], folder: Path | None, env: dict[str, str]):
        self.command, self.parts, self.folder, self.env = command, parts, folder, env
        self._asked: list[int] = []
        self._failed_since: float | None = None
        self._ended_since: float | None = None
        self._killed = False
        self._since = self._said = time.monotonic()
        self._starting, self._seen = folder is None, False  # what runs on other hosts is not seen from here
        self.result = Watched()

    def run(self) -> Watched:
        """Run it; returns when everything has ended."""
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
                    self._hand_on()
                self._say_waiting()
                self._watch_hosts()
            self.result.status = status
            self._guard.stdin.close()
        self._read_statuses()
        self.result.asked = self._asked[0] if self._asked else None
        return self.result

    def _hand_on(self) -> None:
        """Ask the ranks to stop; the second time, end them."""
        name = signal.Signals(self._asked[-1]).name
        if len(self._asked) > 1:
            _say(f"{name}: ending everything at once")
            self._kill()
            return
        self._since = self._said = time.monotonic()
        if self.folder is not None:  # below this process rank 0 says so at once, and what is lost by once more
            _say(f"{name}: asked {told(self.parts)} to save and end; once more ends them at once")
        # The ranks get what this process got, so that all say the same; below the guard SIGHUP is ignored.
        order = f"stop {'SIGTERM' if name == 'SIGHUP' else name}"
        if self.folder is None:
            self._order_guard(order)
        else:
            self._order_hosts(order)

    def _say_waiting(self) -> None:
        """A line every eight seconds until a rank can speak for itself, and from a request to stop to the end."""
        now = time.monotonic()
        if self._killed or not (self._asked or self._starting) or now - self._said < SAY_S:
            return
        self._said, passed = now, f"{now - self._since:.0f} s"
        if self._asked:
            name = signal.Signals(self._asked[-1]).name
            _say(f"{name}: waiting for {told(self.parts)} to end ({passed}); once more ends them at once")
            return
        self._starting = not self._seen  # ranks had eight seconds to begin their own lines
        self._seen = any(process.rank is not None for process in descendants())
        if self._starting:
            _say(f"still starting {told(self.parts)} ({passed})")

    def _watch_hosts(self) -> None:
        """End all hosts when one has failed and the others do not notice."""
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
        why = "" if late else f", where nothing ends {FINISH_S:.0f} s after another host has"
        _say(f"ending {told(running) if running else 'what is left'}{why}")
        self._kill()

    def _kill(self) -> None:
        self._killed = True
        if self.folder is not None:
            self._order_hosts("kill")
            end = time.monotonic() + 3  # for what the hosts have to say
            while len(self.result.hosts) < len(self.parts) and time.monotonic() < end and self._guard.poll() is None:
                time.sleep(POLL_S)
                self._read_statuses()
        self._order_guard("kill")

    def _order_guard(self, order: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has just ended
            self._guard.stdin.write(f"{order}\n".encode())
            self._guard.stdin.flush()

    def _order_hosts(self, order: str) -> None:
        partial = self.folder / ".order"
        partial.write_text(order)
        partial.replace(self.folder / "order")

    def _read_statuses(self) -> None:
        for host in self.parts.keys() - self.result.hosts.keys() if self.folder is not None else ():
            gone = self._is_gone(host)  # before its last word is looked for
            status = self._left_by(host, "status")
            if status is None and gone:
                status = 128 + signal.SIGKILL
            if status is not None:
                self.result.hosts[host] = status
                if status and not self._killed:
                    self.result.failed.append(host)

    def _left_by(self, host: str, what: str) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return int((self.folder / f"{what}.{host}").read_text())
        return None

    def _is_gone(self, host: str) -> bool:
        """Whether what holds a host's leash here was killed."""
        wrapper = self._left_by(host, "wrapper")
        return wrapper is not None and not Path(f"/proc/{wrapper}").exists()


@contextlib.contextmanager
def noted_signals(asked: list[int]) -> Iterator[None]:
    """While entered, signals that ask for an end are only noted; one that is ignored (nohup) stays so."""
    wanted = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda n, _frame: asked.append(n)) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def control_folder(parts: dict[str, range]) -> Iterator[Path]:
    """A folder for one launch, readable by its user alone, with `hosts.json`: what runs on each host."""
    with tempfile.TemporaryDirectory(prefix="elas-launch-") as name:
        folder = Path(name)
        (folder / "hosts.json").write_text(json.dumps({host: ranks_in_words(r) for host, r in parts.items()}))
        yield folder


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"elas: {text}", file=sys.stderr, flush=True)
