"""`elas doctor`: the command."""

import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import elas
from elas.command import Parser
from elas.console import LiveLine
from elas.doctor import gpu, host, software
from elas.doctor.ask import Answer, ask
from elas.doctor.finding import Finding, one_line, report
from elas.errors import UserError
from elas.files import write_json
from elas.launch.preflight import facts

ABOUT = """\
Each finding is ✓ (present), ✗ (required, and missing or broken), – (optional, not available) or ? (not checked: it took
longer than --timeout, as on a busy machine); what is not available comes with a fix. Exit status: 0, or 1 if something
required is missing, broken or not checked. GPUs, and what training on them takes, are required where the machine has
one. --json FILE writes `ok` and `findings[]`: `what`, `ok`, `found`, `needed_for`, `fix`, `required`, `checked`.

"""


def main(argv: list[str]) -> int:
    """Run `elas doctor` with the arguments `argv`; returns 0, or 1 if something required is not seen to work."""
    parser = Parser("elas doctor", "Show what this machine has and lacks for ELAS.", "elas doctor", about=ABOUT)
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S",
                        help="seconds that imports and queries may take (default: %(default)g)")  # fmt: skip
    options = parser.parse_args(argv)
    if not 0 < options.timeout < float("inf"):
        raise UserError(f"--timeout {options.timeout:g}: must be above 0 seconds")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # marks, in a locale without them
    print(
        f"elas {elas.__version__}: checking this machine; packages are imported once, which takes seconds", flush=True
    )
    found = examine(options.timeout)
    ok = all(of.ok for of in found if of.required)
    print(report(found))
    write_json(options.json, {"ok": ok, "findings": [of.to_dict() for of in found]})
    return 0 if ok else 1


def questions() -> list[list[str]]:
    """Questions for two processes: Megatron-core takes as long to import as all others together.

    What queries GPUs comes after the imports, so that a driver that hangs delays no others; importing DeepSpeed
    queries them as well.
    """
    late = ("megatron.core", "deepspeed")
    early = [f"import {of.module}" for of in software.REQUIRED if of.module not in late]
    return [
        [*early, "torch", "cpu kernel", "ffn kernel", "triton tiles", "import deepspeed"],
        ["megatron helpers", "import megatron.core"],
    ]


def examine(timeout_s: float) -> list[Finding]:
    """All findings about this machine.

    Args:
        timeout_s: seconds that imports and queries may take.
    """
    line = LiveLine(every_s=5)
    try:
        answers = ask(questions(), timeout_s, lambda names: line(f"still checking: {names.replace('import ', '')}"))
    finally:
        line.clear()
    seen = len(answers["torch"].value["gpus"]) if answers["torch"].value else 0
    checks = {
        "Python": software.python,
        "packages": lambda: software.packages(answers),
        "GPUs": lambda: _gpus(answers),
        "machine": lambda: host.findings(seen, answers["cpu kernel"], answers["ffn kernel"]),
    }
    return [finding for what, check in checks.items() for finding in _guarded(what, check)]


def _guarded(what: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of a check; its error, on a machine that is broken in a way not thought of, is one as well."""
    try:
        return check()
    except Exception as error:
        found = one_line(f"{type(error).__name__}: {error}")
        return [Finding(what, False, f"not checked: {found}", "everything", "please report this", required=True)]


def _gpus(answers: dict[str, Answer]) -> list[Finding]:
    nodes = [path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    try:
        smi = facts.gpus()
    except OSError as error:  # not a program of this machine
        smi = {"gpus": [], "driver": None, "gpu_error": f"cannot be started ({error.strerror})"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpu.findings(smi, len(nodes), visible, answers["torch"], answers["triton tiles"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
