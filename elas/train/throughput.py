"""What of a device's peak a run reaches, and what share of its time it trains: columns of metrics.jsonl.

Three figures are never mixed (`elas.plan.flops`): MFU counts the FLOPs that the configured model needs, on its
factors; HFU what is computed, with recomputation; dense-equivalent TFLOP/s what the full-rank twin would need for the
same tokens. Both shares are of the peak of dense bf16 products, which stands beside them; in fp32, and on a device
whose peak is unknown, there is none.
"""

import resource
import time
from pathlib import Path
from typing import Any

import torch

from elas import accelerator
from elas.config import Config
from elas.plan.flops import hardware_flops, model_flops, twin_flops
from elas.plan.hardware import peak_of


class Throughput:
    """Converts tokens per second.

    Args:
        config: the run's.
        ranks: of the whole run.
    """

    def __init__(self, config: Config, ranks: int):
        self._ranks = ranks
        self._model, self._hardware = model_flops(config).training, hardware_flops(config)
        self._twin = twin_flops(config).training
        bf16 = accelerator.has_cuda() and config.train.dtype == "bfloat16"
        self._peak = peak_of(torch.cuda.get_device_name()) if bf16 else None

    def of(self, tokens_per_s: float, tokens: int) -> dict[str, float | None]:
        """Columns for a rate, and for the tokens trained on so far; padding does not count."""
        each = tokens_per_s / self._ranks
        peak = self._peak.flops if self._peak else None
        return {
            "tokens_per_s_per_rank": each,
            "tflops_per_rank": each * self._model / 1e12,
            "hardware_tflops_per_rank": each * self._hardware / 1e12,
            "dense_equivalent_tflops_per_rank": each * self._twin / 1e12,
            "mfu": each * self._model / peak if peak else None,
            "hfu": each * self._hardware / peak if peak else None,
            "peak_tflops": peak / 1e12 if peak else None,
            "flops": tokens * self._model,
        }


def memory() -> dict[str, int]:
    """This rank's largest memory so far in bytes: of the GPU's allocator, or the process; counters of the host."""
    if accelerator.has_cuda():
        return {
            "memory_peak_bytes": torch.cuda.max_memory_allocated(),
            "memory_reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    return {"memory_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


class Goodput:
    """The share of the time since a run was first started in which it took the steps that it consists of.

    A checkpoint's manifest keeps the seconds, so the time of steps that are repeated after a crash or a rollback is
    lost, like that between two starts.

    Args:
        kept: of the manifest that the run resumes from; None for a new run, and from checkpoints without.
    """

    KINDS = ("start", "train", "data", "validation", "save")

    def __init__(self, kept: dict[str, float] | None):
        self._began = _process_start()
        self._seconds: dict[str, float] = dict.fromkeys(self.KINDS, 0.0)
        self._first = self._began
        if kept:
            self._follow(kept)
            self._first = kept["first_start"]

    def add(self, kind: str, seconds: float) -> None:
        """Count time; that of waiting for data is part of `train`."""
        self._seconds[kind] += seconds

    def started(self) -> None:
        """The process has done all that comes before its first validation or step."""
        self.add("start", time.time() - self._began)

    def back_to(self, kept: dict[str, float] | None) -> None:
        """A rollback to a checkpoint: what was trained since is lost."""
        if kept:
            self._seconds["train"], self._seconds["data"] = kept["train"], kept["data"]

    def facts(self) -> dict[str, float]:
        """For a manifest."""
        return {**self._seconds, "first_start": self._first}

    def columns(self) -> dict[str, float]:
        """Of metrics.jsonl."""
        wall = max(1e-9, time.time() - self._first)
        train = self._seconds["train"]
        known = sum(self._seconds.values()) - self._seconds["data"]
        return {
            "goodput": train / wall,
            "data_share": self._seconds["data"] / train if train else 0.0,
            **{f"{kind}_s": self._seconds[kind] for kind in ("start", "validation", "save")},
            "lost_s": max(0.0, wall - known),
        }

    def _follow(self, kept: dict[str, Any]) -> None:
        self._seconds.update({kind: float(kept.get(kind, 0.0)) for kind in self.KINDS})


def _process_start() -> float:
    """Seconds since 1970 when this process started; now, where /proc does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        up = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - up + int(fields[19]) / 100  # in ticks, of which Linux has 100 a second
    except (OSError, ValueError, IndexError):
        return time.time()
