"""Compiled extensions: our own folder, built once, never waited for in silence.

torch builds an extension on first use, in whichever process comes first, and marks the build with a `lock` file. A
process killed meanwhile leaves that file behind, and every later process waits on it, forever and without a word.
(DeepSpeed's CPU Adam, for offloading, is such an extension. So is its shared-memory op, which it builds on every CPU
host, 30–110 s, and uses for inference only: runs here do without it, and need no compiler.) So here:

- extensions lie in a folder of ours, one for each torch, Python and processor;
- a build holds a lock of ours, which the system releases when its holder dies. Whoever holds ours knows that nobody
  else builds, so a `lock` found then is stale and is removed, aloud;
- ranks load what is built, straight from its file. They never ask torch, which would run ninja again each time, and
  build again whenever another ninja is first on PATH.
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from elas.console import Console
from elas.errors import UserError

DEEPSPEED_OPS = {"cpu_adam": "CPUAdamBuilder"}
TIMEOUT_S = 900.0


def cache_dir() -> Path:
    """Our cache folder: `$XDG_CACHE_HOME/elas`, or `~/.cache/elas`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elas"


def extensions_dir(torch_version: str | None = None) -> Path:
    """Where compiled extensions go: one folder per torch, Python and processor.

    They are built for the machine's own instruction set, so a home folder shared by unlike nodes needs one each.

    Args:
        torch_version: None for the one that is installed, which imports it.
    """
    if torch_version is None:
        import torch

        torch_version = torch.__version__
    processor = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        processor += "".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))
    digest = hashlib.sha256(processor.encode()).hexdigest()[:8]
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return cache_dir() / "extensions" / f"torch{torch_version}-{python}-{digest}"


def library(name: str) -> Path | None:
    """The built extension's file, or None."""
    return _library(extensions_dir(), name)


def _library(folder: Path, name: str) -> Path | None:
    path = folder / name / f"{name}.so"
    return path if path.exists() and (path.parent / "elas-built").exists() else None


def is_built(name: str, *, torch_version: str) -> bool:
    """Whether an extension is built for a version of torch; torch itself is not imported."""
    return _library(extensions_dir(torch_version), name) is not None


def clear_stale_locks() -> list[Path]:
    """Remove the `lock` files that killed builds left, of every torch and Python; those of builds that run stay.

    Returns:
        The files removed.
    """
    removed = []
    for lock in sorted((cache_dir() / "extensions").glob("*/*/lock")):
        from filelock import FileLock, Timeout

        folder = lock.parent
        try:
            with FileLock(folder.parent / f"{folder.name}.elas-lock", timeout=0):
                lock.unlink()
                removed.append(lock)
        except (Timeout, FileNotFoundError):  # somebody builds, or was faster
            continue
    return removed


def compiler() -> str:
    """The C++ compiler torch will use.

    Raises:
        UserError: there is none.
    """
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        raise UserError(f"no C++ compiler ({os.environ.get('CXX', 'c++')}); install g++ or set CXX")
    return found


def build_once(name: str, build: Callable[[Path, float], None], *, what: str, timeout_s: float = TIMEOUT_S) -> float:
    """Build an extension if it is not there yet; other processes that want it wait, and then find it.

    Args:
        name: the extension; `NAME/NAME.so` will lie in `extensions_dir()`.
        build: called with the extension's folder and the time-out; leaves the library there, or raises.
        what: what a person calls it, for the message.
        timeout_s: how long to wait for another process's build.

    Returns:
        Seconds spent building; 0 when it was there.

    Raises:
        UserError: another process builds for too long; or what `build` raises.
    """
    from filelock import FileLock, Timeout

    folder = extensions_dir() / name
    lock = folder / "lock"
    if library(name) and not lock.exists():
        return 0.0
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.parent / f"{name}.elas-lock", timeout=timeout_s):
            if lock.exists():
                Console("err").say(f"elas: removing a stale build lock, left by a killed process: {lock}")
                lock.unlink()
            if library(name):
                return 0.0
            Console("err").say(f"elas: building {what}, once; this takes one to three minutes …")
            start = time.monotonic()
            try:
                build(folder, timeout_s)
            finally:
                lock.unlink(missing_ok=True)
            (folder / "elas-built").touch()
            seconds = time.monotonic() - start
            Console("err").say(f"elas: built in {seconds:.0f} s")
            return seconds
    except Timeout:
        raise UserError(
            f"another process has been building in {folder} for {timeout_s:.0f} s; end it and start again"
        ) from None


def run_build(code: str, folder: Path, timeout_s: float, what: str) -> None:
    """Run Python `code` that builds an extension, in a process of its own; its output is kept when it fails.

    Args:
        code: Python source.
        folder: the extension's folder, for the log.
        timeout_s: after which the build is given up.
        what: what a person calls it.

    Raises:
        UserError: it failed or took too long.
    """
    # The environment's own folder first: torch looks for its `ninja` on PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "TORCH_EXTENSIONS_DIR": str(folder.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that the compilers can be ended with it
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except BaseException as stopped:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(stopped, subprocess.TimeoutExpired):
            raise UserError(f"building {what} took over {timeout_s:.0f} s; see whether {compiler()} works") from None
        raise
    if process.returncode:
        log = folder / "build.log"
        log.write_text(output)
        last = (output.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"building {what} failed: {last}; see {log}")


def prebuild_deepspeed(*, offload: bool = False, timeout_s: float = TIMEOUT_S) -> float:
    """Build the DeepSpeed ops that a run will need, before any rank needs them.

    Args:
        offload: the optimizer is DeepSpeed's CPU Adam.
        timeout_s: how long to wait for another process's build, and for ours.

    Returns:
        Seconds spent building.

    Raises:
        UserError: no compiler, a failed build, or another process that builds for too long.
    """
    return sum(_build_deepspeed_op(name, timeout_s) for name in _wanted(offload))


def _wanted(offload: bool) -> list[str]:
    return ["cpu_adam"] if offload else []


def _build_deepspeed_op(name: str, timeout_s: float) -> float:
    what = f"DeepSpeed's {name} op"

    def build(folder: Path, limit: float) -> None:
        compiler()
        code = (
            "from deepspeed.accelerator import get_accelerator\n"
            f"get_accelerator().create_op_builder({DEEPSPEED_OPS[name]!r}).load()\n"
        )
        run_build(code, folder, limit, what)

    return build_once(name, build, what=what, timeout_s=timeout_s)


def load_deepspeed(*, offload: bool = False) -> None:
    """Load the prebuilt DeepSpeed ops and hand them to DeepSpeed, which then compiles nothing.

    It gets None for its shared-memory op: only `inference_all_reduce` would use it.

    Args:
        offload: the optimizer is DeepSpeed's CPU Adam.
    """
    from deepspeed.ops.op_builder.builder import OpBuilder

    prebuild_deepspeed(offload=offload)
    OpBuilder._loaded_ops.setdefault("deepspeed_shm_comm", None)
    for name in _wanted(offload):
        if name not in OpBuilder._loaded_ops:
            OpBuilder._loaded_ops[name] = load_library(name)


def load_library(name: str):
    """Import a built extension as a Python module, straight from its file."""
    spec = importlib.util.spec_from_file_location(name, library(name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
