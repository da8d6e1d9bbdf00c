"""`elas report`: one self-contained HTML page about a run, or several."""

import gc
import os
from pathlib import Path

from elas.command import Parser
from elas.errors import UserError
from elas.files import write_json


def main(argv: list[str]) -> int:
    """Run `elas report RUN_DIR…`; returns 0, raises `UserError` for mistakes."""
    parser = Parser(
        "elas report",
        "One self-contained HTML page about a run, or several beside each other, from their files.",
        "elas report runs/60m",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a run (train.run_dir)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: report.html in the run's folder; of several, in this one"
    )
    options = parser.parse_args(argv)
    output = _output(options.output, options.runs)
    from elas.report.page import write_page
    from elas.report.run_files import read_runs

    gc.disable()  # millions of values are read and none freed; collections among them take a tenth of the time
    try:
        runs = read_runs(options.runs)
        write_page(runs, output)
    finally:
        gc.enable()
    size = output.stat().st_size / 1e6
    print(f"{output} ({size:.1f} MB): open it in a browser; it needs no network")
    facts = {"html": str(output), "bytes": output.stat().st_size}
    rows = [{"run_dir": str(run.folder), "state": run.state, "steps": run.metrics[-1]["step"],
             "incidents": len(run.incidents)} for run in runs]  # fmt: skip
    write_json(options.json, facts | {"runs": rows})
    return 0


def _output(given: Path | None, runs: list[Path]) -> Path:
    """Where to write.

    Raises:
        UserError: a folder, not writable, or a file that is no page.
    """
    path = given or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    if given is None and not runs[0].is_dir():
        return path  # the reader says why
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{path}: is a folder or cannot be written; give a file's path with --output")
    if path.is_file() and path.stat().st_size and b"<html" not in path.read_bytes()[:1000].lower():
        raise UserError(f"--output {path}: exists and is no HTML, nothing is overwritten; give another file")
    return path
