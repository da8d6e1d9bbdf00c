"""How long the report of a long run takes to write and to open, and the pictures of docs/report.md.

    python docs/experiments/report.py                      writes docs/experiments/results/report.json
    python docs/experiments/report.py --pictures RUN_DIR   draws docs/figures/report_*.png of a run

It requires Chromium and playwright.
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from elas.accelerator import processor

HERE = Path(__file__).resolve().parent
RESULT, FIGURES = HERE / "results" / "report.json", HERE.parent / "figures"
STEPS, LAYERS, REPEATS = 100_000, 12, 5
PICTURES = {"desktop": (1280, 1500, "light"), "phone": (390, 1500, "dark")}


def main() -> int:
    """Measure, or draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, metavar="RUN_DIR")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        if options.pictures:
            _write(options.pictures, page)
            for name, (width, height, scheme) in PICTURES.items():
                _open(page, width, height, scheme, FIGURES / f"report_{name}.png")
            return 0
        run = synthetic(Path(folder) / "run")
        writing = [_write(run, page) for _ in range(REPEATS)]
        opening = [_open(page, 1280, 900, "light", None) for _ in range(REPEATS)]
        facts = {"steps": STEPS, "layers": LAYERS, "metrics_bytes": (run / "metrics.jsonl").stat().st_size}
        facts |= {"bytes": page.stat().st_size, "write_s": statistics.median(writing)}
        facts |= {"open_s": statistics.median(opening), "repeats": REPEATS, "cpu": processor()}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))
    return 0


def synthetic(folder: Path) -> Path:
    """The files of a run in which every step was logged."""
    folder.mkdir()
    dice = random.Random(0)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, STEPS + 1):
            share = [round(0.5 + 0.1 * dice.random(), 5) for _ in range(LAYERS)]
            row = {"step": step, "tokens": 2048 * step, "loss": 3 + 7 / step**0.3 + 0.1 * dice.random(),
                   "grad_norm": 1 + dice.random(), "lr": 1e-3, "tokens_per_s": 1e4 + 100 * dice.random(),
                   "step_s": 0.2, "flops": 1e9 * step, "goodput": 0.9, "data_share": 0.01, "start_s": 10.0,
                   "validation_s": 20.0, "save_s": 30.0, "lost_s": 0.0, "memory_peak_bytes": 4 * 10**9,
                   "tflops_per_rank": 0.1, "hardware_tflops_per_rank": 0.12, "dense_equivalent_tflops_per_rank": 0.2,
                   "sparsity": share[0], "dropped": share[1] / 4, "mask_flips": 0.02, "sparse_active": True,
                   "layers": {"sparsity": share, "dropped": share, "mask_flips": share},
                   "time": 1.8e9 + 0.2 * step, "elapsed_s": 0.2 * step}  # fmt: skip
            file.write(json.dumps(row) + "\n")
    (folder / "config.json").write_text("{}")
    return folder


def _write(run: Path, page: Path) -> float:
    begun = time.perf_counter()
    command = [sys.executable, "-m", "elas.cli", "report", str(run), "--output", str(page)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def _open(page: Path, width: int, height: int, scheme: str, picture: Path | None) -> float:
    """Seconds until every chart of the page is drawn."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, offline=True)
        opened = context.new_page()
        begun = time.perf_counter()
        opened.goto(page.absolute().as_uri())
        opened.wait_for_selector("html[data-ready]")
        opened.wait_for_function("Bokeh.documents.every((one) => one.is_idle)")
        seconds = time.perf_counter() - begun
        if picture:
            opened.screenshot(path=str(picture))
        browser.close()
    return seconds


def table() -> str:
    """The figures, for docs/report.md."""
    facts = json.loads(RESULT.read_text())
    lines = [
        "| run | metrics.jsonl | page | written in | opens in |", "|---" * 5 + "|",
        f"| {facts['steps']:,} logged steps, {facts['layers']} layers | {facts['metrics_bytes'] / 1e6:,.0f} MB | "
        f"{facts['bytes'] / 1e6:.1f} MB | {facts['write_s']:.1f} s | {facts['open_s']:.1f} s |",
    ]  # fmt: skip
    return "\n".join([*lines, "", f"Medians of {facts['repeats']} on {facts['cpu']}, with headless Chromium."]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
