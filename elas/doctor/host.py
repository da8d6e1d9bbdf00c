"""Findings about the machine itself: compilers, memory, disk, and the programs that start ranks."""

import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from elas import extensions
from elas.doctor.ask import Answer
from elas.doctor.finding import Finding, one_line, unchecked
from elas.launch import network
from elas.launch.preflight.compare import SHM_PER_RANK

GIB, MIB = 2**30, 2**20
MEMORY = 4 * GIB
"""Memory of two ranks of the quickstart, most of it the libraries."""
DISK = GIB
"""Free space that `elas launch check` requires of a run's folder by default."""


def findings(gpus: int, kernel: Answer, chosen: Answer) -> list[Finding]:
    """Everything about the machine.

    Args:
        gpus: number that torch sees.
        kernel: answer to worker.py's `cpu kernel`.
        chosen: answer to worker.py's `ffn kernel`.
    """
    kernels = [_kernel(kernel, gpus), build_locks(), _chosen(chosen)]
    return [
        *_compilers(gpus), *kernels, _shared_memory(max(1, gpus)), _memory(), *_disk(),
        interfaces(network.interfaces()), *launchers(),
    ]  # fmt: skip


def _program(name: str) -> str | None:
    """The path of a program on PATH, or beside Python, where launchers add it to PATH."""
    return shutil.which(name, path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))


def _compilers(gpus: int) -> list[Finding]:
    name = os.environ.get("CXX", "c++")
    cxx, cc = shutil.which(name), None
    for one in filter(None, (os.environ.get("CC"), "gcc", "clang", "cc")):
        cc = cc or shutil.which(one)
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    ninja = _program("ninja")
    install = "apt install g++, or set CXX; without it plain PyTorch is used on CPUs, which is slower"
    cc_fix = "apt install gcc, or set CC"
    dev = "apt install python{}.{}-dev, or use a Python that has its headers".format(*sys.version_info[:2])
    return [
        Finding("C++ compiler", cxx is not None, cxx or f"no {name}", "the CPU kernel", "" if cxx else install),
        Finding("C compiler", cc is not None, cc or "none", "Triton on GPUs", "" if cc else cc_fix, gpus > 0),
        Finding("Python's headers", headers.is_file(), str(headers) if headers.is_file() else f"no {headers}",
                "Triton on GPUs, CPU Adam", "" if headers.is_file() else dev, gpus > 0),
        Finding("ninja, the program", ninja is not None, ninja or "none", "compiling the CPU kernel",
                "" if ninja else f"{sys.executable} -m pip install ninja"),
    ]  # fmt: skip


def _kernel(answer: Answer, gpus: int) -> Finding:
    what, needed_for = "CPU kernel", "the fast FFN on CPUs"
    if not answer.finished:
        return unchecked(what, answer.error, needed_for)
    if answer.value is None:
        return Finding(what, False, one_line(answer.error), needed_for, "fix torch first")
    if answer.value["library"]:
        return Finding(what, True, f"built: {answer.value['library']}", needed_for)
    fix = "none needed on GPUs" if gpus else "elas build; the first run builds it otherwise, in about a minute"
    return Finding(what, False, f"not built in {answer.value['folder']}", needed_for, fix)


def _chosen(answer: Answer) -> Finding:
    what, needed_for = "FFN kernel, auto", "preset 60m; others may differ"
    if not answer.finished:
        return unchecked(what, answer.error, needed_for)
    if answer.value is None:
        return Finding(what, False, one_line(answer.error), needed_for, "fix torch first")
    return Finding(what, True, one_line(f"{answer.value['name']}: {answer.value['why']}"), needed_for)


def build_locks() -> Finding:
    """Lock files of builds that were killed."""
    what, needed_for = "build locks", "compiled extensions"
    try:
        stale = extensions.stale_locks()
    except (OSError, RuntimeError) as error:
        return Finding(what, False, one_line(error), needed_for, "set XDG_CACHE_HOME to another folder")
    if not stale:
        return Finding(what, True, "none of a killed build", needed_for)
    found = f"{len(stale)} of killed builds: {stale[0]}" + (", …" if len(stale) > 1 else "")
    return Finding(what, False, found, needed_for, "elas build removes them, as does the next run")


def interfaces(found: Sequence[network.Interface]) -> Finding:
    """Whether there is a network interface that other hosts can reach."""
    what, needed_for = "network interfaces", "runs on several hosts"
    usable = [one for one in found if one.up and not one.loopback and one.addresses]
    if usable:
        return Finding(what, True, ", ".join(f"{one.name} {one.addresses[0]}" for one in usable), needed_for)
    down = [one.name for one in found if not one.loopback]
    seen = f"only loopback; not up or without an IPv4 address: {', '.join(down)}" if down else "only loopback"
    fix = "runs on this host alone need none; connect it, or start the container with --network host"
    return Finding(what, False, seen, needed_for, fix)


def _shared_memory(ranks: int) -> Finding:
    what, needed_for, wanted = "/dev/shm", "several ranks on a machine", SHM_PER_RANK * ranks
    fix = "mount -o remount,size=16G /dev/shm; start a container with --shm-size 16g"
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError as error:
        return Finding(what, False, str(error.strerror), needed_for, fix)
    found = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    if usage.free >= wanted:
        return Finding(what, True, found, needed_for)
    return Finding(what, False, f"{found}, less than {wanted / MIB:.0f} MiB for {ranks} ranks", needed_for, fix)


def memory_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The memory limit of this container in bytes (cgroup v2, else v1); None without one."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (root / name).read_text().strip()
        except OSError:
            continue
        if text.isdecimal() and int(text) < 1 << 60:  # v1 writes no limit as a number of 63 bits
            return int(text)
    return None


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit()
    usable = min(total, limit or total)
    found = f"{usable / GIB:.1f} GiB" + (f", the container's limit, of {total / GIB:.1f} GiB" if usable < total else "")
    found += f"; {len(os.sched_getaffinity(0))} CPUs"
    fix = "" if usable >= MEMORY else f"give it {MEMORY / GIB:.0f} GiB: two ranks of the quickstart take as much"
    return Finding("memory", usable >= MEMORY, found, "training", fix)


def _disk() -> list[Finding]:
    return [
        _folder("disk", Path.cwd, "runs in this folder", "change to a folder with more space"),
        _folder("cache", extensions.cache_dir, "compiled extensions", "set XDG_CACHE_HOME to another folder"),
    ]


def _folder(what: str, path_of, needed_for: str, fix: str) -> Finding:
    """Free space of a folder, which need not exist, and whether it can be written."""
    try:
        path = path_of()
        there = next(folder for folder in (path, *path.parents) if folder.is_dir())
        usage = os.statvfs(there)
    except (OSError, RuntimeError, StopIteration) as error:  # no current folder, no home folder
        return Finding(what, False, one_line(error), needed_for, fix)
    free = usage.f_bavail * usage.f_frsize
    if not os.access(there, os.W_OK):
        return Finding(what, False, f"{there} cannot be written", needed_for, fix)
    found = f"{free / GIB:.1f} GiB free at {there}"
    return Finding(what, free >= DISK, found, needed_for, "" if free >= DISK else fix)


_LAUNCHERS: Mapping[str, tuple[str, str]] = {
    "deepspeed": ("deepspeed launch/pretrain.py", f"{sys.executable} -m pip install deepspeed"),
    "torchrun": ("torchrun launch/pretrain.py", "install torch (docs/install.md)"),
    "ssh": ("elas launch ssh", "apt install openssh-client"),
    "pdsh": ("elas launch ssh", "apt install pdsh"),
    "srun": ("elas launch slurm", "run it on a login node of a SLURM cluster"),
    "sbatch": ("elas launch slurm", "run it on a login node of a SLURM cluster"),
}


def launchers() -> list[Finding]:
    """The programs that start ranks, one finding each."""
    found = []
    for name, (needed_for, fix) in _LAUNCHERS.items():
        path = _program(name)
        found.append(
            Finding(f"launcher {name}", path is not None, path or "not on PATH", needed_for, "" if path else fix)
        )
    return found
