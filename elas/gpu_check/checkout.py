"""The part `tests`: the repository's tests that can run on a GPU, a process and a row for each folder.

They are there where the package runs from a clone. A dry run collects them only.
"""

import importlib.util
import os
import re
import signal
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import elas
from elas.gpu_check import processes
from elas.gpu_check.rows import NO_TIME, Result, Row
from elas.gpu_check.setting import Setting

NOT_HERE = "the tests are in the repository; clone it and pip install -e '.[test]'"
NO_PYTEST = "pytest is not installed; pip install -e '.[test]'"
FIRST = ("gpu", "kernels", "nn")
"""Folders that are tested first; the others are those with a test marked `any_device`."""
HANG_S = 300.0
"""Longest time of one folder."""
LEAST_S, STOPPING_S, GIB_A_WORKER, NO_TESTS = 15.0, 8.0, 12.0, 5
_COLLECTED = re.compile(r"^tests/(\w+)/\S+\.py::", re.MULTILINE)


def run(setting: Setting) -> None:
    """Write the rows of this part."""
    root = Path(elas.__file__).resolve().parent.parent
    reason = why_not(root)
    if reason:
        setting.add(Row(part="tests", group="tests", result="not run", reason=reason))
    elif setting.dry_run:
        _collect(setting, root)
    else:
        for folder in folders(root):
            setting.add(_folder(setting, root, folder))


def why_not(root: Path) -> str:
    """Why there are no tests to run, or empty."""
    if not all((root / "tests" / name).exists() for name in ("conftest.py", "gpu")):
        return NOT_HERE
    return "" if importlib.util.find_spec("pytest") else NO_PYTEST


def folders(root: Path) -> list[str]:
    """Folders below tests/ with tests that can run on a GPU, in the order in which they are run."""
    marked = {path.parent.name for path in (root / "tests").glob("*/test_*.py") if "any_device" in path.read_text()}
    return [*FIRST, *sorted(marked - set(FIRST))]


def workers() -> int:
    """Processes of pytest-xdist: half the cores, at most 8, each with 12 GiB of GPU memory or more; 1 without it."""
    if importlib.util.find_spec("xdist") is None:
        return 1
    import torch

    gib = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 16.0
    return max(1, min(8, (os.cpu_count() or 2) // 2, int(gib / GIB_A_WORKER)))


def _folder(setting: Setting, root: Path, folder: str) -> Row:
    group = f"tests/{folder}"
    limit = min(HANG_S, setting.left_s - STOPPING_S)
    if limit < LEAST_S:
        return Row(part="tests", group=group, result="not run", reason=NO_TIME)
    log, xml = setting.logs / f"tests-{folder}.log", setting.logs / f"tests-{folder}.xml"
    many = workers()
    command = [sys.executable, "-m", "pytest", group, "--device", "cuda", "-p", "no:cacheprovider", f"--junitxml={xml}"]
    process = processes.start(command + (["-n", str(many)] if many > 1 else []), log, cwd=root)
    try:
        in_time = processes.wait(process, limit)
        if not in_time:
            process.send_signal(signal.SIGINT)  # so that pytest writes what it has
            processes.wait(process, STOPPING_S)
    finally:
        processes.end(process)
    cut = "" if in_time else f"no end within {limit:.0f} s" if limit == HANG_S else NO_TIME
    return outcome(group, read_junit(xml), process.returncode, cut, processes.ended(process, log))


def outcome(group: str, found: tuple[Counter, list[str]] | None, status: int, cut: str, ended: str) -> Row:
    """The row of a folder.

    Args:
        group: the folder.
        found: what `read_junit` gave.
        status: pytest's exit status.
        cut: why it was stopped; empty if it ended by itself.
        ended: how the process ended.
    """

    def row(result: Result, reason: str) -> Row:
        return Row(part="tests", group=group, result=result, reason=reason)

    if found is None:
        if cut == NO_TIME:
            return row("not run", cut)
        return row("wrong", cut or ended)
    counts, failed = found
    text = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped"))
    if failed:
        return row("wrong", f"{text}: {', '.join(failed[:3])}" + (" and others" if len(failed) > 3 else ""))
    if cut:
        return row("not run" if cut == NO_TIME else "wrong", f"{cut}; until then {text}")
    if status == NO_TESTS:
        return row("not run", "no test there runs on a GPU")
    return row("wrong", f"{text}, but {ended}") if status else row("right", text)


def read_junit(xml: Path) -> tuple[Counter, list[str]] | None:
    """Tests by `passed`, `failed` and `skipped`, and the names of those that failed; None without a file."""
    try:
        cases = list(ET.parse(xml).getroot().iter("testcase"))
    except (OSError, ET.ParseError):
        return None
    counts, failed = Counter(), []
    for case in cases:
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[kind] += 1
        if kind == "failed":
            failed.append(case.get("name", "?"))
    return counts, failed


def _collect(setting: Setting, root: Path) -> None:
    """Write a row for each folder whose tests can be collected."""
    log = setting.logs / "tests-collected.log"
    names = [f"tests/{name}" for name in FIRST]
    command = [sys.executable, "-m", "pytest", *names, "--collect-only", "-p", "no:cacheprovider"]
    process = processes.start(command, log, cwd=root)
    try:
        done = processes.wait(process, setting.left_s)
    finally:
        processes.end(process)
    if not done or process.returncode:
        reason = processes.ended(process, log)
        setting.add(Row(part="tests", group="tests", result="wrong", reason=f"cannot be collected: {reason}"))
        return
    counts = Counter(_COLLECTED.findall(log.read_text(errors="replace")))
    for name in FIRST:
        reason = f"dry run: {counts[name]} collected"
        setting.add(Row(part="tests", group=f"tests/{name}", result="not run", reason=reason))
