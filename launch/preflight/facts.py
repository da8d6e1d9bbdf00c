"""Facts about this host that decide whether a run can start on it. Does not import torch, to be fast."""

import errno
import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import elas
from elas import launch

PACKAGES = ("torch", "deepspeed", "megatron-core", "elas")
_SOURCES = {".py", ".cpp", ".h", ".sbatch"}


def software() -> dict:
    """Python, the versions of the packages a run imports, and a digest of our own source."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    digest = hashlib.sha256("".join(f"{name} {of}\n" for name, of in source_files().items()).encode())
    return {
        "folder": os.getcwd(),
        "executable": sys.executable,
        "python": platform.python_version(),
        "versions": versions,
        "package": str(Path(launch.__path__[0]).resolve()),
        "source": digest.hexdigest()[:12],
    }


def source_files() -> dict[str, str]:
    """SHA-256 (12 hex digits) of every file of our source, by its name in the package."""
    root, found = elas.__path__[0], {}
    for folder, _, names in os.walk(root, followlinks=True):  # launch/, kernels/ and data_prep/ are links in a checkout
        for path in (Path(folder) / name for name in names):
            if path.suffix in _SOURCES:
                name = f"elas/{path.relative_to(root)}"
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return dict(sorted(found.items()))


def machine() -> dict:
    """CPUs, memory and shared memory (bytes), GPUs, the C++ compiler and stale build locks."""
    shm = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "shm_total": shm.total if shm else 0,
        "shm_free": shm.free if shm else 0,
        **gpus(),
        **_extensions(),
    }


def gpus() -> dict:
    """Names of the GPUs, the driver, and why nvidia-smi failed, or None; without nvidia-smi, no GPUs."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"gpus": [], "driver": None, "gpu_error": None}
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=15)
    except subprocess.TimeoutExpired:
        return {"gpus": [], "driver": None, "gpu_error": "nvidia-smi did not finish in 15 s"}
    if done.returncode:
        words = (done.stdout + done.stderr).strip().splitlines() or ["no reason given"]
        return {"gpus": [], "driver": None, "gpu_error": words[-1]}
    rows = [line.rpartition(",") for line in done.stdout.splitlines() if "," in line]
    return {"gpus": [name.strip() for name, _, _ in rows], "driver": rows[0][2].strip() if rows else None,
            "gpu_error": None}  # fmt: skip


def _extensions() -> dict:
    """The compiler, which the CPU kernel needs, and the stale build locks, which this removes."""
    from elas.extensions import clear_stale_locks

    return {
        "stale_locks": [str(path) for path in clear_stale_locks()],
        "compiler": shutil.which(os.environ.get("CXX", "c++")),
    }


def files(paths: list[str]) -> dict[str, int | None]:
    """The size of each file in bytes; None if it does not exist."""
    return {path: os.path.getsize(path) if os.path.isfile(path) else None for path in paths}


def there(path: str) -> Path:
    """`path`, or the nearest folder above it that exists."""
    absolute = Path(path).absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.is_dir())


def listener(port: int) -> str | None:
    """The process that listens on a port: `process 7 (python train.py)`; None if it is not visible."""
    sockets = _listening(port)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            links = {os.readlink(link) for link in (folder / "fd").iterdir()}
            if links & sockets:
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f"process {folder.name} ({words[:80]})"
        except OSError:  # the process has ended, or belongs to another user
            continue
    return None


def _listening(port: int) -> set[str]:
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        lines = Path(table).read_text().splitlines()[1:] if os.path.exists(table) else ()
        for fields in (line.split() for line in lines):
            if int(fields[1].rpartition(":")[2], 16) == port:
                found.add(f"socket:[{fields[9]}]")
    return found


def listen(port: int) -> tuple[socket.socket | None, str | None]:
    """Listen on a port (0: a free one) on all addresses; returns the socket and None, or None and the reason."""
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind(("", port))
        server.listen(1024)
    except OSError as error:
        server.close()
        if error.errno == errno.EADDRINUSE:
            return None, listener(port) or "another process"
        return None, error.strerror
    return server, None
