"""`elas gpu-check`: kernels, training, NCCL, speed and tests on one GPU, within a budget of minutes."""

import shutil
import tempfile
import time
from pathlib import Path

from elas.command import Parser
from elas.console import Console, LiveLine, clock
from elas.errors import UserError
from elas.files import write_json
from elas.gpu_check.parts import DEVICE, PARTS, Part
from elas.gpu_check.report import Report, count
from elas.gpu_check.runner import run_part, run_parts

SILENCE_S = 8.0
EXAMPLE = "elas gpu-check --minutes 10 --out gpu-check"


def main(argv: list[str]) -> int:
    """Run `elas gpu-check`.

    Args:
        argv: arguments after the command.

    Returns:
        Exit status: 0, or 1 if something is wrong.

    Raises:
        UserError: there is no CUDA device, or an option is invalid.
    """
    parser = Parser(
        "elas gpu-check", "Check this machine's GPU: what is right, what is wrong, how fast it is.", EXAMPLE
    )
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="budget (default: 10)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="report and logs (default: gpu-check-DATE-TIME)")
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", default=",".join(names), help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="run the parts on the CPU, at small sizes")
    options = parser.parse_args(argv)
    parts = _chosen(options.parts)
    if not options.minutes > 0:
        raise UserError(f"--minutes {options.minutes:g}: must be above 0")
    out = options.out or Path(time.strftime("gpu-check-%Y-%m-%d-%H%M%S"))
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out}: exists; give a folder that does not")
    report = Report(options.dry_run, options.minutes)
    try:
        check(parts, report, out)
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was found until then: {out}/report.txt", flush=True)
        raise
    write_json(options.json, report.facts())
    print(report.text())
    print(f"report and logs: {out}; to report a problem, send this folder")
    return 1 if report.counts["wrong"] else 0


def check(parts: list[Part], report: Report, out: Path) -> None:
    """Run the device's part and then the others; the report is also written after each, for one that is interrupted.

    Raises:
        UserError: there is no CUDA device, and this is not a dry run; nothing was written then.
    """
    ends = time.monotonic() + 60 * report.minutes
    progress, console = LiveLine(every_s=SILENCE_S), Console("err")
    with tempfile.TemporaryDirectory(prefix="elas-gpu-check-") as folder:
        first = run_part(DEVICE, "cpu" if report.dry_run else "cuda", Path(folder), 2 * DEVICE.limit_s, progress)
        if not report.dry_run and first.facts.get("cuda") is False:
            progress.clear()
            raise UserError(f"elas gpu-check: {first.facts['no_cuda']}; --dry-run runs the parts on the CPU")
        logs = out / "logs"
        try:
            shutil.copytree(folder, logs, ignore=lambda _, names: [one for one in names if not one.endswith(".log")])
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror}); give another folder") from error
    report.add(first)
    report.write(out)
    began = time.monotonic()
    for name, found in run_parts(parts, "cpu" if report.dry_run else "cuda", logs, ends, progress):
        progress.clear()
        report.add(found)
        report.write(out)
        counts = ", ".join(f"{number} {result}" for result, number in count(found.rows).items() if number)
        console.say(f"{name}: {counts} ({clock(time.monotonic() - began)})")
        began = time.monotonic()
    report.write(out)


def _chosen(text: str) -> list[Part]:
    """The parts of `--parts`, in their own order.

    Raises:
        UserError: an unknown or repeated name, or none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = [part.name for part in PARTS]
    for name in names:
        if name not in known:
            near = [one for one in known if one.lower() == name.lower()]
            fix = f"did you mean {near[0]!r}?" if near else f"choose from {','.join(known)} (device always runs)"
            raise UserError(f"--parts {text}: {name!r} is unknown; {fix}")
    if not names or len(set(names)) < len(names):
        raise UserError(f"--parts {text!r}: requires one or more different names; choose from {','.join(known)}")
    return [part for part in PARTS if part.name in names]
