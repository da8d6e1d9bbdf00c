"""Answers questions about this host; `elas launch check` runs this on every host.

    python -m elas.launch.preflight.probe NAME

A question is a line of JSON on standard input, `{"number": 1, "ask": "facts", …}`. Answers go to standard output in
marked pieces, which may be interleaved with shell greetings and other hosts' pieces; `Answers` joins them. Meanwhile
the probe listens on a port, so that hosts can test their connections, and keeps a file in the run's folder, so that
other hosts can check that they see it. When its input ends, it removes the file and exits.
"""

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from elas.launch import network
from elas.launch.preflight import facts

LIFE_S = 100.0
"""Seconds after which a probe ends, even if its connection hangs."""
CONNECT_S = 3.0
_MARK = "elas-answer"
_PIECE = re.compile(rf"{_MARK} (\S+) (\d+) (\d+) (.*)$")
_PIECE_LENGTH = 700  # srun cuts lines of more than 1024 bytes


def say(name: str, answer: dict) -> None:
    """Print an answer of host `name` in marked pieces."""
    text = json.dumps(answer)
    pieces = [text[at : at + _PIECE_LENGTH] for at in range(0, len(text), _PIECE_LENGTH)]
    for number, piece in enumerate(pieces):
        print(f"{_MARK} {name} {number} {len(pieces)} {piece}")
    sys.stdout.flush()


class Answers:
    """Joins the pieces that `say` printed."""

    def __init__(self):
        self._pieces: dict[str, list[str]] = {}

    def take(self, line: str) -> tuple[str, dict] | None:
        """Process a line of output; returns host and answer if it completes an answer, else None."""
        match = _PIECE.search(line)
        if match is None:
            return None
        name, number, count, piece = match.groups()
        pieces = self._pieces.setdefault(name, [])
        pieces.append(piece)
        if int(number) + 1 < int(count):
            return None
        del self._pieces[name]
        return name, json.loads("".join(pieces))


class Probe:
    """Answers questions about this host.

    Args:
        name: this host's name, as the asking process knows it.
    """

    def __init__(self, name: str):
        self.name = name
        self._server: socket.socket | None = None
        self._file: Path | None = None

    def facts(self, *, token: str, first: str, port: int | None, run_dir: str | None, files: list[str],
              names: list[str]) -> dict:  # fmt: skip
        """Facts that need no other host; also starts to listen and writes the file.

        Args:
            token: random token of this check.
            first: the host of the rendezvous, which listens on `port`.
            port: None for a free one.
            run_dir: the run's folder, which need not exist.
            files: the run's input files.
            names: host names to resolve.
        """
        wanted = port or 0 if self.name == first else 0
        self._server, port_error = facts.listen(wanted)
        if self._server is None:  # the port is in use; other hosts can still test the connection on another one
            self._server, why = facts.listen(0)
            assert self._server is not None, why
        threading.Thread(target=_answer_calls, args=(self._server, f"{token} {self.name}\n"), daemon=True).start()
        hostname = os.uname().nodename
        return {
            **facts.software(),
            **facts.machine(),
            "hostname": hostname,
            "hostname_addresses": network.resolve(hostname),
            "interfaces": [
                {"name": i.name, "addresses": network.ipv4(i), "mtu": i.mtu}
                for i in network.interfaces()
                if i.up and not i.loopback and network.ipv4(i)
            ],
            "resolves": {name: network.resolve(name) for name in names},
            "port": self._server.getsockname()[1],
            "port_error": port_error,
            "run_dir": self._leave_file(run_dir, token) if run_dir else None,
            "files": facts.files(files),
        }

    def _leave_file(self, run_dir: str, token: str) -> dict:
        folder = facts.there(run_dir)
        usage = os.statvfs(folder)
        found = {"folder": str(folder), "free": usage.f_bavail * usage.f_frsize, "error": None}
        path = folder / f".elas-check-{token}-{self.name}"
        try:
            path.write_text("written by elas launch check\n")
            self._file = path
        except OSError as error:
            found["error"] = error.strerror
        return found

    def clock(self) -> dict:
        """This host's clock, in seconds since 1970."""
        return {"clock": time.time()}

    def sources(self) -> dict:
        """The digest of each file of our source."""
        return {"sources": facts.source_files()}

    def others(self, *, token: str, first: str, run_dir: str | None, peers: dict[str, dict]) -> dict:
        """Try to connect to the other hosts, and look for the first host's file.

        Args:
            token: as in `facts`.
            first: the host whose file to look for.
            run_dir: the run's folder.
            peers: each host's `addresses` and `port`, by name.

        Returns:
            `reached`: by host and answering address, our own address and interface of that connection; `sees_file`.
        """
        ways = [(name, address, peer["port"]) for name, peer in peers.items() if name != self.name
                for address in peer["addresses"]]  # fmt: skip
        reached: dict[str, dict[str, list[str]]] = {name: {} for name in peers if name != self.name}
        owners = {address: i.name for i in network.interfaces() for address in i.addresses}
        with ThreadPoolExecutor(max(1, min(len(ways), 64))) as pool:
            for (name, address, _), local in zip(ways, pool.map(lambda way: _call(token, *way), ways)):
                if local is not None:
                    reached[name][address] = [local, owners.get(local, "")]
        file = facts.there(run_dir) / f".elas-check-{token}-{first}" if run_dir else None
        return {"reached": reached, "sees_file": file is not None and file.exists()}

    def close(self) -> None:
        """Remove the file."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def _answer_calls(server: socket.socket, text: str) -> None:
    """Send `text`, which identifies this host, to every connection."""

    def answer(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(CONNECT_S)
            connection.sendall(text.encode())
            connection.recv(1)  # lets the caller close first, so that TIME_WAIT is on its port and ours stays free

    while True:
        connection, _ = server.accept()
        threading.Thread(target=answer, args=(connection,), daemon=True).start()


def _call(token: str, name: str, address: str, port: int) -> str | None:
    """Our own address of a connection to a host; None if it does not answer, or another host does."""
    try:
        with socket.create_connection((address, port), timeout=CONNECT_S) as connection:
            said = connection.makefile().readline()
            return connection.getsockname()[0] if said == f"{token} {name}\n" else None
    except (OSError, UnicodeDecodeError):
        return None


def main(argv: list[str]) -> int:
    """Answer questions until the input ends; returns 0."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, lambda *_: sys.exit(1))
    signal.setitimer(signal.ITIMER_REAL, LIFE_S)
    probe = Probe(argv[0] if argv else os.environ.get("SLURMD_NODENAME", os.uname().nodename))
    try:
        for line in sys.stdin:
            question = json.loads(line)
            number, what = question.pop("number"), question.pop("ask")
            say(probe.name, {"number": number, **getattr(probe, what)(**question)})
    finally:
        probe.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
