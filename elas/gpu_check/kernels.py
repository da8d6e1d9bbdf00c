"""The part `kernels`: every implementation of the FFN core against fp64.

The cases run in a process of their own (kernel_cases.py). If that crashes, or has no result for a minute, the case that
ran is wrong, and another process goes on with the next implementation: after a bad memory access nothing else runs on
the GPU in the same process.
"""

import json
import time

from elas.gpu_check import processes, rows
from elas.gpu_check.rows import NO_TIME, Row
from elas.gpu_check.setting import Setting

CASES = "kernel_cases"
SILENCE_S = 60.0
"""Longest time of one case; compiling Triton's kernels takes a few seconds."""
BUILD_S = 300.0
"""And of the first case of the CPU kernel, which may have to be compiled, in one to three minutes."""
AT = "at.json"


def run(setting: Setting, module: str = "elas.gpu_check.worker", silence_s: float = SILENCE_S) -> None:
    """Write the rows of this part.

    Args:
        setting: of the part.
        module: runs the cases.
        silence_s: see `SILENCE_S`.
    """
    first, log = 0, setting.logs / f"{CASES}.log"
    while True:
        (setting.work / AT).unlink(missing_ok=True)
        process = processes.start(setting.command(module, part=CASES, first=first), log)
        try:
            failure = _watch(setting, process, silence_s)
        finally:
            processes.end(process)
        if failure == NO_TIME:
            setting.add(Row(part="kernels", group="kernels", case="(the rest)", result="not run", reason=NO_TIME))
            return
        if not failure and process.returncode == 0:
            return
        reason = failure or processes.ended(process, log)
        if not (setting.work / AT).exists():
            setting.add(Row(part="kernels", group="kernels", result="wrong", reason=reason))
            return
        at = json.loads((setting.work / AT).read_text())
        setting.add(Row(part="kernels", group=at["group"], case=at["case"], result="wrong", reason=reason))
        first = at["index"] + 1


def _watch(setting: Setting, process, silence_s: float) -> str:
    """Wait for the process of the cases; why it must be ended, or empty."""
    known, since = -1, time.monotonic()
    while not processes.wait(process, 0.5):
        count = len(rows.read(setting.rows).rows)
        if count != known:
            known, since = count, time.monotonic()
        if setting.left_s <= 0:
            return NO_TIME
        allowed = max(silence_s, BUILD_S) if silence_s == SILENCE_S and _builds(setting) else silence_s
        if time.monotonic() - since > allowed:
            return f"no result in {allowed:.0f} s, killed"
    return ""


def _builds(setting: Setting) -> bool:
    """Whether the case that runs is one of the CPU kernel."""
    at = setting.work / AT
    return at.exists() and " cpu " in f" {json.loads(at.read_text())['group']} "
