"""Compiled extensions, built once into our own folder, without stale locks.

torch builds an extension on first use, in the first process that needs it, and marks the build with a `lock` file. If
that process is killed, the file remains, and every later process waits on it forever without a message. (DeepSpeed's
CPU Adam, for offloading, is such an extension. So is its shared-memory op, which DeepSpeed builds on every CPU host in
30–110 s, but uses only for inference: runs here skip it and need no compiler.) Therefore

- extensions are in our own folder, one for each torch, Python and processor;
- a build holds our own lock, which the system releases when its holder dies. While it is held, no other process builds,
  so an existing `lock` file is stale and is removed, with a message;
- ranks load a built extension directly from its file, not through torch, which would run ninja each time and rebuild
  whenever another ninja comes first on PATH.
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
    """The cache folder: `$XDG_CACHE_HOME/elas`, or `~/.cache/elas`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elas"


def extensions_dir(torch_version: str | None = None) -> Path:
    """The folder of compiled extensions for a version of torch, this Python and this processor.

    Extensions are built for the machine's own instruction set, so nodes that share a home folder need separate ones.

    Args:
        torch_version: None for the installed version, which imports torch.
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
    """The file of a built extension; None if it is not built."""
    return _library(extensions_dir(), name)


def _library(folder: Path, name: str) -> Path | None:
    path = folder / name / f"{name}.so"
    return path if path.exists() and (path.parent / "elas-built").exists() else None


def is_built(name: str, *, torch_version: str) -> bool:
    """Whether an extension is built for a version of torch; does not import torch."""
    return _library(extensions_dir(torch_version), name) is not None


def stale_locks() -> list[Path]:
    """The `lock` files of killed builds, for all versions of torch and Python, without those of running builds."""
    return _stale_locks(remove=False)


def clear_stale_locks() -> list[Path]:
    """Remove the files of `stale_locks`; returns them."""
    return _stale_locks(remove=True)


def _stale_locks(*, remove: bool) -> list[Path]:
    found = []
    for lock in sorted((cache_dir() / "extensions").glob("*/*/lock")):
        from filelock import FileLock, Timeout

        folder = lock.parent
        try:
            with FileLock(folder.parent / f"{folder.name}.elas-lock", timeout=0):
                if remove:
                    lock.unlink()
                found.append(lock)
        except (Timeout, FileNotFoundError):  # a build is running, or another process removed the file first
            continue
    return found


def compiler() -> str:
    """Path of the C++ compiler that torch will use.

    Raises:
        UserError: there is no C++ compiler.
    """
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        raise UserError(f"no C++ compiler ({os.environ.get('CXX', 'c++')}); install g++ or set CXX")
    return found


def build_once(name: str, build: Callable[[Path, float], None], *, what: str, timeout_s: float = TIMEOUT_S) -> float:
    """Build an extension if it is not built yet; if another process is building it, wait for that.

    Args:
        name: the extension; the result is `NAME/NAME.so` in `extensions_dir()`.
        build: called with the extension's folder and the time-out; must write the library there or raise.
        what: description of the extension, for messages.
        timeout_s: longest wait for another process's build, in seconds.

    Returns:
        Seconds spent building; 0 if it was already built.

    Raises:
        UserError: another process takes too long to build it, or `build` raises it.
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
                Console("err").say(f"elas: removing a stale build lock of a killed process: {lock}")
                lock.unlink()
            if library(name):
                return 0.0
            Console("err").say(f"elas: building {what}; this takes one to three minutes, only once …")
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
    """Run Python `code` that builds an extension in a separate process; if it fails, its output goes to `build.log`.

    Args:
        code: Python source.
        folder: the extension's folder, for the log.
        timeout_s: seconds after which the build is killed.
        what: description of the extension, for messages.

    Raises:
        UserError: it failed or took too long.
    """
    # Python's own folder comes first on PATH, where torch looks for `ninja`.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "TORCH_EXTENSIONS_DIR": str(folder.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that the compilers can be killed with it
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except BaseException as stopped:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(stopped, subprocess.TimeoutExpired):
            raise UserError(f"building {what} took over {timeout_s:.0f} s; check that {compiler()} works") from None
        raise
    if process.returncode:
        log = folder / "build.log"
        log.write_text(output)
        last = (output.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"building {what} failed: {last}; see {log}")


def prebuild_deepspeed(*, offload: bool = False, timeout_s: float = TIMEOUT_S) -> float:
    """Build the DeepSpeed ops that a run needs.

    Args:
        offload: whether the optimizer is DeepSpeed's CPU Adam.
        timeout_s: longest wait for another process's build, and for ours, in seconds.

    Returns:
        Seconds spent building.

    Raises:
        UserError: there is no compiler, the build failed, or another process takes too long to build.
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
    """Load the built DeepSpeed ops into DeepSpeed's cache, so that it compiles nothing.

    The shared-memory op is set to None, since only `inference_all_reduce` uses it.

    Args:
        offload: whether the optimizer is DeepSpeed's CPU Adam.
    """
    from deepspeed.ops.op_builder.builder import OpBuilder

    prebuild_deepspeed(offload=offload)
    OpBuilder._loaded_ops.setdefault("deepspeed_shm_comm", None)
    for name in _wanted(offload):
        if name not in OpBuilder._loaded_ops:
            OpBuilder._loaded_ops[name] = load_library(name)


def load_library(name: str):
    """Import a built extension as a Python module, directly from its file."""
    spec = importlib.util.spec_from_file_location(name, library(name))
    assert spec is not None and spec.loader is not None, f"{name} is not built"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
