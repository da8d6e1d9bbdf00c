"""What a part's process is given, and the command line that carries it."""

import argparse
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from elas.gpu_check import rows
from elas.gpu_check.rows import Row


@dataclass(frozen=True)
class Setting:
    """Arguments of a part.

    Args:
        part: its name.
        device: `cuda` or `cpu`.
        rows: file to which it appends rows and facts.
        logs: folder for the logs of processes that it starts.
        work: folder for temporary files.
        seconds: its time limit.
        tight: 1 if that is what the budget leaves; 0 if it is the part's own limit, which only a hang exceeds.
        first: for kernel_cases.py, the index of the first implementation.
    """

    part: str
    device: str
    rows: Path
    logs: Path
    work: Path
    seconds: float
    tight: int = 0
    first: int = 0
    _start: float = field(default_factory=time.monotonic)

    @property
    def dry_run(self) -> bool:
        """Whether it runs on the CPU, at small sizes."""
        return self.device == "cpu"

    @property
    def left_s(self) -> float:
        """Seconds left."""
        return self.seconds - (time.monotonic() - self._start)

    def add(self, row: Row) -> None:
        """Hand over a row."""
        rows.append(self.rows, row=asdict(row))

    def add_facts(self, **facts: Any) -> None:
        """Hand over facts about the machine."""
        rows.append(self.rows, facts=facts)

    def command(self, module: str = "elas.gpu_check.worker", **changed: Any) -> list[str]:
        """The command that runs the part, with some arguments changed."""
        values = {name: value for name, value in vars(self).items() if not name.startswith("_")} | changed
        return [sys.executable, "-m", module, *(f"--{name}={value}" for name, value in values.items())]

    @classmethod
    def read(cls, argv: list[str] | None = None) -> "Setting":
        """The setting of a command line made by `command`; without arguments, this process's."""
        parser = argparse.ArgumentParser()
        for name, kind in (("part", str), ("device", str), ("rows", Path), ("logs", Path), ("work", Path)):
            parser.add_argument(f"--{name}", type=kind, required=True)
        parser.add_argument("--seconds", type=float, required=True)
        for name in ("tight", "first"):
            parser.add_argument(f"--{name}", type=int, default=0)
        return cls(**vars(parser.parse_args(argv)))
