"""Processes that begin with torch, Megatron-core and DeepSpeed imported: forks of one that imported them once.

Importing them costs a process 8 s of a core, and tests of stops and kills start two hundred. `Forked` stands in for
`subprocess.Popen` there: a process of its own, with its own id, environment and output, that runs a Python file as
`__main__`. What a test changes in the environment applies, but for what is read when a library is loaded
(OMP_NUM_THREADS, which is 1).
"""

import atexit
import contextlib
import faulthandler
import importlib
import os
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

IMPORTS = ("deepspeed", "megatron.core", "elas.train.loop", "elas.checkpoint.saver", "torch.utils.tensorboard")
HANDLE = 100
"""Number of the descriptor that a process is given."""
_SIZE = 1 << 17  # of a request, at most


class Forked:
    """A process that runs `python FILE ARGUMENTS…`, its stdout and stderr in one pipe.

    Args:
        command: the file, and its arguments.
        env: the environment.
        log: a file for its stdout and stderr instead of the pipe.
        handle: a file descriptor that it has as `HANDLE`.

    Attributes:
        pid: its id.
        returncode: its exit status, minus the signal that ended it; None until it is known to have ended.
        stdout: the reading end of the pipe, as text.
    """

    def __init__(self, command: list[str], env: dict[str, str], log: Path | None = None, handle: int | None = None):
        out, theirs = os.pipe()
        if log is not None:
            os.close(theirs)
            theirs = os.open(log, os.O_WRONLY | os.O_CREAT)
        self._status, status = os.pipe()
        request = {"argv": command, "env": env, "cwd": os.getcwd(), "path": sys.path}
        server = _server()
        socket.send_fds(server, [pickle.dumps(request)], [theirs, status, *([] if handle is None else [handle])])
        os.close(theirs)
        os.close(status)
        self.pid: int = pickle.loads(server.recv(_SIZE))
        self.args = command
        self.stdout = os.fdopen(out)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, if it has ended."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once it has ended."""
        if (status := self._ended(timeout)) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Its whole output, once it has ended."""
        end, content = time.monotonic() + (timeout or 1e9), []
        if self.stdout.closed:
            return "", None
        while True:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.stdout], [], [], left)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0, "".join(content).encode())
            if not (piece := os.read(self.stdout.fileno(), 1 << 16)):
                break
            content.append(piece.decode(errors="replace"))
        self.stdout.close()
        self.wait(max(1.0, end - time.monotonic()))
        return "".join(content), None

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            status = os.read(self._status, 64)
            self.returncode = pickle.loads(status) if status else -signal.SIGKILL  # empty: the one that forks has ended
            os.close(self._status)
        return self.returncode


_connection: socket.socket | None = None


def _server() -> socket.socket:
    """The connection to the process that forks, started when it is needed first."""
    global _connection
    if _connection is None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # With NVML alone it looks for GPUs: a process that has started CUDA cannot use it in its forks.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        command = [sys.executable, __file__, str(theirs.fileno())]
        process = subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()])
        theirs.close()
        assert ours.recv(_SIZE) == b"ready", "the process that forks ended"
        _connection = ours
        atexit.register(lambda: (ours.close(), process.wait(20)))
    return _connection


def _serve(connection: socket.socket) -> dict:
    """Fork for every request; returns in the child, with the request."""
    running: dict[int, int] = {}
    while True:
        ready = select.select([connection], [], [], 0.02)[0]
        for pid, status in list(running.items()):
            found, how = os.waitpid(pid, os.WNOHANG)
            if found:
                os.write(status, pickle.dumps(os.waitstatus_to_exitcode(how)))
                os.close(running.pop(pid))
        if not ready:
            continue
        content, handles, _, _ = socket.recv_fds(connection, _SIZE, 3)
        if not content:
            os._exit(0)
        request, (out, status, *given) = pickle.loads(content), handles
        pid = os.fork()
        if pid == 0:
            os.dup2(out, 1)
            os.dup2(out, 2)
            for handle in given:
                os.dup2(handle, HANDLE)
            for handle in (out, status, *given, connection.detach(), *running.values()):
                os.close(handle)
            return request
        for handle in (out, *given):
            os.close(handle)
        running[pid] = status
        connection.send(pickle.dumps(pid))


def _run(request: dict, imported: dict[str, str]) -> None:
    """Be the process that was asked for."""
    os.environ.clear()
    os.environ.update({**imported, **request["env"]})
    os.chdir(request["cwd"])
    sys.stdout = os.fdopen(1, "w", closefd=False)  # buffered as Python buffers a pipe
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    if "PYTHONUNBUFFERED" in os.environ:
        sys.stdout.reconfigure(line_buffering=True)
    faulthandler.enable()
    sys.argv, sys.path[:] = request["argv"], request["path"]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _main() -> None:
    before = dict(os.environ)
    import elas

    elas.prepare()
    for name in IMPORTS:
        importlib.import_module(name)
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.send(b"ready")
    imported = {key: value for key, value in os.environ.items() if before.get(key) != value}
    _run(_serve(connection), imported)


if __name__ == "__main__":
    _main()
