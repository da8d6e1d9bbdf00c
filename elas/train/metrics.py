"""What a run leaves behind: `metrics.jsonl`, `validation.jsonl`, TensorBoard events, and a console line.

Only rank 0 writes. On a resumed run, lines past the checkpoint are dropped first, so that a file never holds a step
twice. A line is written whole (one `write` of an unbuffered append), and flushed, so a killed run keeps its curve.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elas.config import Config


class Metrics:
    """The files of one run.

    Args:
        config: gives the run's folder, whether TensorBoard is wanted, and the number of steps.
        last_step: step of the checkpoint resumed from; 0 for a fresh run.
        writes: False on all ranks but 0, which then do nothing.
    """

    def __init__(self, config: Config, *, last_step: int, writes: bool):
        self.steps, self.writes = config.train.steps, writes
        self.is_terminal = sys.stdout.isatty()
        self._board = None
        if not writes:
            return
        folder = Path(config.train.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._paths = {name: folder / f"{name}.jsonl" for name in ("metrics", "validation")}
        for path in self._paths.values():
            _drop_after(path, last_step)
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)

    def drop_after(self, step: int) -> None:
        """Forget the lines after a step, to which the run went back."""
        if self.writes:
            for path in self._paths.values():
                _drop_after(path, step)

    def log(self, name: str, values: dict[str, Any]) -> None:
        """Append a line to `name` (`metrics` or `validation`), with its `step`, and the same to TensorBoard."""
        if not self.writes:
            return
        with self._paths[name].open("a") as file:
            file.write(json.dumps(values, allow_nan=False) + "\n")
        if self._board is not None:
            for key, value in _scalars(name, values):
                self._board.add_scalar(key, value, values["step"])

    def show(self, values: dict[str, Any]) -> None:
        """One line on the console: rewritten in place on a terminal, a line each otherwise."""
        if not self.writes:
            return
        left = (self.steps - values["step"]) * values["step_s"]
        sparsity = ""
        if values["sparsity"] is not None:
            sparsity = f"zeros {values['sparsity']:.1%}  dropped {values['dropped']:.1%}  "
        text = (
            f"step {values['step']:>6}/{self.steps}  loss {values['loss']:.4f}  norm {values['grad_norm']:.3f}  "
            f"lr {values['lr']:.2e}  {values['tokens_per_s']:,.0f} tok/s  {sparsity}left {left / 60:.1f} min"
        )
        self._print(f"\r\x1b[2K{text}" if self.is_terminal else text, end="" if self.is_terminal else "\n")

    def say(self, text: str) -> None:
        """A line of its own on the console."""
        if self.writes:
            self._print(("\n" if self.is_terminal else "") + text)

    def _print(self, text: str, end: str = "\n") -> None:
        """Print; a run whose terminal or launcher is gone still saves, and its files hold the same."""
        try:
            print(text, end=end, flush=True)
        except OSError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends

    def close(self) -> None:
        """Flush everything."""
        if self._board is not None:
            self._board.close()


def _scalars(name: str, values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """TensorBoard's view of a line: `name/key`, `sources/prefix`, and `layers/key/07` of what is given by layer."""
    for key, value in values.items():
        if key != "step" and isinstance(value, (int, float)):
            yield f"{name}/{key}", value
    for source, samples in values.get("sources", {}).items():
        yield f"sources/{source}", samples
    for key, of_layers in values.get("layers", {}).items():
        for layer, value in enumerate(of_layers):
            if value is not None:
                yield f"layers/{key}/{layer:02d}", value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Lines of a JSONL file; what is no row with a step, such as a line cut short by a kill, is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines up to `step`, whole or not at all."""
    if not path.exists():
        return
    kept = [row for row in read_jsonl(path) if row["step"] <= step and step > 0]
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
    partial.replace(path)
