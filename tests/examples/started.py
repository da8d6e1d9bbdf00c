"""Examples as a user starts them: copied out of the checkout, as processes of their own, with a hard time-out."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"


def copied(name: str, folder: Path) -> Path:
    """A copy of an example, file or folder, so that it cannot find what is beside it in the checkout."""
    source, target = EXAMPLES / name, folder / "copied" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        return Path(shutil.copytree(source, target))
    return Path(shutil.copy(source, target))


def torchrun(ranks: int) -> list[object]:
    """The start of a command line of so many ranks, at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", port]


def start(words: list[object], folder: Path, timeout: float, status: int = 0, **environment: str) -> str:
    """Run a command to its end and return what it printed; after `timeout` seconds all of its processes are killed."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        variables.pop(name, None)
    process = subprocess.Popen(
        [str(word) for word in words],
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"not finished in {timeout:g} s: {words}\n{output[-4000:]}") from None
    assert process.returncode == status, f"status {process.returncode}: {words}\n{output[-4000:]}"
    return output
