"""The part `training`: `elas train` on the GPU against the CPU, and resuming across them.

A small model trains on synthetic tokens. Runs that do not need each other are started together; each is a process.

- float32 on the GPU, and on the CPU: the same losses up to the order of sums, with Spectron's steps, as presets have
  them, and under AdamW. bfloat16: near those of float32.
- A checkpoint in the middle of one device's run continues on the other, with the losses of the run that was not
  interrupted.
- The run in float32 saves in the background (`checkpoint.async_save`); every byte of its checkpoints is verified.

On the CPU plain PyTorch computes the FFN, so that no compiler is needed, and the GPU's kernels are compared with it.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elas.data_prep.indexed_writer import write_index
from elas.files import read_jsonl, write_json
from elas.gpu_check import processes
from elas.gpu_check.parts import NO_CUDA
from elas.gpu_check.rows import NO_TIME, Row, compared
from elas.gpu_check.setting import Setting

STEPS, SAVED = 12, 6
BOUNDS = {"float32": 2e-5, "bfloat16": 2e-3}
"""Largest relative difference of losses. fp32: sums in another order give 7e-7 on an H100 after 20 steps. bf16: weights
and activations of 8 bits, against fp32."""
VOCABULARY = 512
SETTINGS: dict[str, object] = {
    "model.hidden_size": 64,
    "model.num_layers": 2,
    "model.num_attention_heads": 4,
    "model.ffn_hidden_size": 128,
    "model.vocab_size": VOCABULARY,
    "model.seq_length": 32,
    "low_rank.rank": 16,
    "sparsity.dense_steps": 2,
    "schedule.warmup_steps": 2,
    "train.micro_batch_size": 4,
    "train.global_batch_size": 8,
    "train.steps": STEPS,
    "train.eval_batches": 0,
    "checkpoint.every_steps": SAVED,
    "checkpoint.keep": 0,
    "log.every_steps": 1,
    "log.trackers": [],
}
OPTIMIZERS: dict[str, dict[str, object]] = {
    "spectron": {
        "optimizer.kind": "muon",
        "optimizer.normalize": "spectron",
        "optimizer.lr": 0.025,
        "optimizer.lr_other": 3e-3,
    },
    "adamw": {"optimizer.kind": "adamw", "optimizer.lr": 3e-3},
}


@dataclass(frozen=True)
class Run:
    """One `elas train`.

    Args:
        name: of its folder and log.
        device: `cuda` or `cpu`.
        dtype: of the weights.
        resume: name of the run whose checkpoint in the middle it continues; empty for a new run.
        optimizer: of `OPTIMIZERS`.
    """

    name: str
    device: str
    dtype: str = "float32"
    resume: str = ""
    optimizer: str = "spectron"


CPU = Run("cpu-float32", "cpu")
GPU, GPU_BF16 = Run("gpu-float32", "cuda"), Run("gpu-bfloat16", "cuda", "bfloat16")
CPU_ADAMW, GPU_ADAMW = (
    Run(f"{name}-adamw", device, optimizer="adamw") for name, device in (("cpu", "cpu"), ("gpu", "cuda"))
)
TO_CPU, TO_GPU = Run("gpu-to-cpu", "cpu", resume=GPU.name), Run("cpu-to-gpu", "cuda", resume=CPU.name)
ON_GPU = {
    "GPU float32 against CPU": (GPU, CPU),
    "GPU float32 against CPU, AdamW": (GPU_ADAMW, CPU_ADAMW),
    "GPU bfloat16 against float32": (GPU_BF16, GPU),
    "GPU checkpoint continued on CPU": (TO_CPU, GPU),
    "CPU checkpoint continued on GPU": (TO_GPU, CPU),
}
"""Comparisons: a run, and the one whose losses it must have."""
CPU_AGAIN = Run("cpu-to-cpu", "cpu", resume=CPU.name)


def run(setting: Setting) -> None:
    """Write the rows of this part."""
    write_tokens(setting.work / "tokens")
    if setting.dry_run:
        stages = [[CPU], [CPU_AGAIN]]
    else:
        stages = [[CPU, GPU, GPU_BF16, CPU_ADAMW, GPU_ADAMW], [TO_CPU, TO_GPU]]
    outcome: dict[str, str] = {}
    for stage in stages:
        outcome |= _train(setting, [one for one in stage if not outcome.get(one.resume)])
    results = Results(setting, outcome)
    if setting.dry_run:
        for group in ON_GPU:
            setting.add(Row(part="training", group=group, result="not run", reason=NO_CUDA))
        results.compare("CPU checkpoint continued on CPU", CPU_AGAIN, CPU, "float32")
        results.verify(CPU)
        return
    for group, (got, want) in ON_GPU.items():
        results.compare(group, got, want, got.dtype)
    results.verify(GPU)


def write_tokens(prefix: Path, documents: int = 40, length: int = 200) -> None:
    """Write documents that can be learned: sums of small steps, modulo the vocabulary."""
    random = np.random.default_rng(0)
    steps = random.integers(1, 4, (documents, length))
    ids = (random.integers(VOCABULARY, size=(documents, 1)) + steps.cumsum(1)) % VOCABULARY
    Path(f"{prefix}.bin").write_bytes(ids.astype(np.uint16).tobytes())
    write_index(Path(f"{prefix}.idx"), np.dtype(np.uint16), documents, lambda: [np.full(documents, length)])
    write_json(Path(f"{prefix}.manifest.json"), {"vocab_size": VOCABULARY})


def losses(folder: Path) -> dict[int, float]:
    """Losses of a run by step."""
    return {row["step"]: row["loss"] for row in read_jsonl(folder / "metrics.jsonl")}


def difference(got: dict[int, float], want: dict[int, float]) -> float:
    """Largest relative difference of losses; infinite if a step is missing, or NaN."""
    if not got or got.keys() - want.keys() or max(got) != STEPS:
        return float("inf")
    found = [abs(loss - want[step]) / abs(want[step]) for step, loss in got.items()]
    return max(found) if all(value == value for value in found) else float("inf")


def _train(setting: Setting, runs: list[Run]) -> dict[str, str]:
    """Start runs together and wait; why each failed, by name, or empty."""
    started: list[tuple[Run, subprocess.Popen, Path]] = []
    failed = {}
    try:
        for one in runs:
            log = setting.logs / f"training-{one.name}.log"
            hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if one.device == "cpu" else {}
            started.append((one, processes.start(_command(setting, one), log, hidden), log))
        for one, process, log in started:
            if not processes.wait(process, max(1.0, setting.left_s)):
                hang = f"not complete in time, killed; {log.name} ends: {processes.last_line(log)}"
                failed[one.name] = NO_TIME if setting.tight else hang
            elif process.returncode:
                failed[one.name] = processes.ended(process, log)
            else:
                failed[one.name] = ""
    finally:
        for _, process, _ in started:
            processes.end(process)
    return failed


def _command(setting: Setting, one: Run) -> list[str]:
    settings = {
        **SETTINGS,
        **OPTIMIZERS[one.optimizer],
        "data.train": setting.work / "tokens",
        "train.run_dir": setting.work / one.name,
        "train.dtype": one.dtype,
        "sparsity.implementation": "torch" if one.device == "cpu" else "auto",
        "checkpoint.async_save": json.dumps(one in (CPU, GPU) and not one.resume),
    }
    if one.resume:
        settings["checkpoint.resume"] = _checkpoint(setting, one.resume)
    return [sys.executable, "-m", "elas.cli", "train", *(f"--{key}={value}" for key, value in settings.items())]


def _checkpoint(setting: Setting, name: str) -> Path:
    return setting.work / name / "checkpoints" / f"step_{SAVED:08}"


class Results:
    """Rows from the folders of the runs.

    Args:
        setting: of the part.
        outcome: why each run failed, by name; empty if it did not.
    """

    def __init__(self, setting: Setting, outcome: dict[str, str]):
        self._setting, self._outcome = setting, outcome

    def compare(self, group: str, got: Run, want: Run, dtype: str) -> None:
        """Compare the losses of two runs, at the steps that the first one made."""
        if self._failed(group, got, want):
            return
        mine, other = (losses(self._setting.work / one.name) for one in (got, want))
        print(f"{group}: {mine} against {other}")
        error = difference(mine, other)
        what = f"losses of steps {min(mine)} to {max(mine)}" if mine else "no losses"
        self._setting.add(compared("training", group, error, BOUNDS[dtype], what))

    def verify(self, saved: Run) -> None:
        """Verify every byte of the checkpoints that a run saved in the background."""
        group = f"{saved.device.upper().replace('CUDA', 'GPU')} checkpoints saved in the background"
        if self._failed(group, saved):
            return
        log = self._setting.logs / "training-verify.log"
        folder = self._setting.work / saved.name
        process = processes.start([sys.executable, "-m", "elas.cli", "checkpoint", "verify", str(folder)], log)
        done = processes.wait(process, max(1.0, self._setting.left_s))
        processes.end(process)
        count = len(list((folder / "checkpoints").glob("step_*")))
        right = done and process.returncode == 0 and count == STEPS // SAVED
        reason = f"{count} intact" if right else f"{count} saved; {processes.ended(process, log)}"
        self._setting.add(Row(part="training", group=group, result="right" if right else "wrong", reason=reason))

    def _failed(self, group: str, *runs: Run) -> bool:
        """Whether one of the runs failed; if so, write the row."""
        for index, one in enumerate(runs):
            if one.name not in self._outcome:
                reason = f"{one.resume}, which it continues, failed"
                self._setting.add(Row(part="training", group=group, result="not run", reason=reason))
                return True
            if why := self._outcome[one.name]:
                reason = why if index == 0 else f"{one.name}: {why}"
                result = "not run" if why == NO_TIME else "wrong"
                self._setting.add(Row(part="training", group=group, result=result, reason=reason))
                return True
        return False
