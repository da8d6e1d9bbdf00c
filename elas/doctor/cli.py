"""`elas doctor`: the command."""

import os
import re
import sys
from pathlib import Path

import elas
from elas.command import Parser
from elas.console import LiveLine
from elas.doctor import gpu, host, software
from elas.doctor.ask import Answer, ask
from elas.doctor.finding import Finding, report
from elas.errors import UserError
from elas.files import write_json
from elas.launch.preflight import facts

ABOUT = """\
Each finding is ✓ (present), ✗ (required, and missing or broken) or – (optional, not available); what is not available
comes with a fix. Exit status: 0, or 1 if something required is missing or broken. GPUs, and what training on them
takes, are required where the machine has one. --json FILE writes `ok` and `findings[]`: `what`, `ok`, `found`,
`needed_for`, `fix`, `required`.

"""


def main(argv: list[str]) -> int:
    """Run `elas doctor` with the arguments `argv`; returns 0, or 1 if something required is missing or broken."""
    parser = Parser("elas doctor", "Show what this machine has and lacks for ELAS.", "elas doctor", about=ABOUT)
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S",
                        help="seconds that imports and queries may take (default: %(default)g)")  # fmt: skip
    options = parser.parse_args(argv)
    if not 0 < options.timeout < float("inf"):
        raise UserError(f"--timeout {options.timeout:g}: must be above 0 seconds")
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
        [*early, "torch", "cpu kernel", "triton tiles", "import deepspeed"],
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
    torch: Answer = answers["torch"]
    nodes = len([path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])
    gpus = gpu.findings(
        facts.gpus(), nodes, os.environ.get("CUDA_VISIBLE_DEVICES"), torch, answers["triton tiles"]
    )  # fmt: skip
    seen = len(torch.value["gpus"]) if torch.value else 0
    return [*software.python(), *software.packages(answers), *gpus, *host.findings(seen, answers["cpu kernel"])]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
