"""The cases of the part `kernels`, in one process; kernels.py starts it, and again after a crash."""

import traceback

import torch

from elas.bench.kernel_check import BOUNDS, Case, Checker, bound, cases, registered
from elas.files import write_json
from elas.gpu_check.kernels import AT
from elas.gpu_check.rows import Row
from elas.gpu_check.setting import Setting
from elas.kernels.relu2_24 import registry

RANKS = (64, 128, 256, 512, 1024)
METHODS_RANK = 128
SIZES = {"cuda": (2048, 2752), "cpu": (64, 256)}
"""Tokens and features, by device."""


def run(setting: Setting) -> None:
    """Write a row for every case, from the implementation of index `setting.first` on."""
    torch.set_float32_matmul_precision("high")  # else the Triton kernels refuse fp32
    checker = Checker(torch.device(setting.device), *SIZES[setting.device])
    for index, one in enumerate(registered()[setting.first :], setting.first):
        for dtype in BOUNDS:
            _implementation(setting, checker, index, one, dtype)


def _implementation(setting: Setting, checker: Checker, index: int, one: registry.Implementation, dtype: str) -> None:
    found = list(cases(one, dtype, RANKS, METHODS_RANK))
    group = f"{one.ffn_memory} {one.name} {dtype}"
    _at(setting, index, group, "")
    reason = registry.obstacle(one, found[0].options, checker.device, getattr(torch, dtype))
    if reason is not None:
        setting.add(Row(part="kernels", group=group, result="not run", reason=reason))
        return
    for case in found:
        named = f"rank {case.rank}" if not case.method else case.method
        within = group if not case.method else f"{group} rank {case.rank}"
        _at(setting, index, within, named)
        print(f"{within} {named}", flush=True)
        setting.add(_row(checker, case, within, named))


def _at(setting: Setting, index: int, group: str, case: str) -> None:
    """Write down which case begins, for the process that sees this one crash."""
    # Atomic: the other process reads this at any moment.
    write_json(setting.work / AT, {"index": index, "group": group, "case": case})


def _row(checker: Checker, case: Case, group: str, named: str) -> Row:
    reason = checker.obstacle(case)
    if reason is not None:
        return Row(part="kernels", group=group, case=named, result="not run", reason=reason)
    checker.expected(case)  # an error here is not the implementation's
    try:
        errors = checker.errors(case)
    except Exception as error:
        traceback.print_exc()
        if checker.device.type == "cuda":
            torch.cuda.synchronize()  # after a bad access this raises too, and ends the process
        first = str(error).strip().splitlines()[:1]
        text = f"{type(error).__name__}: {first[0] if first else ''}"
        return Row(part="kernels", group=group, case=named, result="wrong", reason=text)
    worst = max(errors, key=lambda name: errors[name])
    most = bound(case.dtype, checker.device)
    right = errors[worst] <= most
    reason = (
        ""
        if right
        else "against fp64 " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items() if not error <= most)
    )
    return Row(part="kernels", group=group, case=named, result="right" if right else "wrong",
               reason=reason, error=errors[worst], bound=most)  # fmt: skip
