"""The largest micro-batch that trains in a given memory: `python docs/experiments/micro_batch.py --gib 4`.

Bisects, in steps of 5 %, over training steps of a preset in processes of a memory cgroup (root is needed), and writes
docs/experiments/results/micro_batch.json after each variant, which docs/memory.md shows; variants that it has already
are not measured again. A process takes one step of one sample, so that the optimizer's state exists, then one of the
micro-batch.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from elas.bench import arguments
from elas.bench.step_models import OVERRIDES
from elas.checkpoint.identity import versions
from elas.command import end_process, exit_status
from elas.config import presets
from elas.errors import UserError

RESULT = Path(__file__).resolve().parent / "results" / "micro_batch.json"
RETURNING = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""So that glibc returns the memory of a tensor when it is freed, as it does not by itself below 32 MiB."""
VARIANTS = ["full_swiglu_logits", "full_swiglu", "lowrank_relu2", "elas", "elas_layer"]
V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


def main(argv: list[str]) -> int:
    """Bisect for every variant, or (`--try`) take the steps of one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=4.0, help="memory of the process (default: %(default)s)")
    parser.add_argument("--preset", default="60m")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--first", type=int, default=8, help="samples to try first (default: %(default)s)")
    parser.add_argument("--most", type=int, help="try no more samples than these (default: until memory ends)")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--json", type=Path, default=RESULT, help="default: %(default)s")
    parser.add_argument("--try", dest="attempt", type=int, metavar="N", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    arguments.choices("--preset", options.preset, presets())
    ours = [name for name in OVERRIDES if not name.startswith("hf_llama")]
    names = arguments.choices("--variants", options.variants, ours)
    arguments.at_least("--seq", options.seq, 1)
    if options.attempt:
        steps(names[0], options)
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that processes end and the cgroup goes
        signal.signal(number, lambda *_: sys.exit(1))
    facts = {key: getattr(options, key) for key in ("gib", "preset", "dtype", "seq")} | {"versions": versions()}
    rows = _rows_so_far(options.json, facts)
    for variant in names:
        if any(row["variant"] == variant for row in rows):
            print(f"{variant}: measured before, in {options.json}", flush=True)
            continue
        with cgroup(int(options.gib * 2**30)) as group:
            rows.append({"variant": variant, **largest(variant, options, group)})
        print(json.dumps(rows[-1]), flush=True)
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return 0


def _rows_so_far(path: Path, facts: dict) -> list[dict]:
    """Rows of an earlier run of the same study; none if it was another."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found["rows"] if all(found.get(key) == value for key, value in facts.items()) else []


def largest(variant: str, options: argparse.Namespace, group: Path) -> dict:
    """`samples`: the largest number that fits, to 5 %, 0 if not even one does; `more_may_fit`: it is `--most`."""
    fits, too_many = 0, 0
    wanted = options.first
    while not too_many or too_many - fits > max(1, 0.05 * fits):
        begun = time.perf_counter()
        ok = trains(variant, wanted, options, group)
        result = "trains" if ok else "out of memory"
        print(f"{variant} {wanted} samples: {result} ({time.perf_counter() - begun:.0f} s)", flush=True)
        fits, too_many = (wanted, too_many) if ok else (fits, wanted)
        if fits == options.most:
            return {"samples": fits, "more_may_fit": True}
        wanted = 2 * fits if not too_many else (fits + too_many) // 2
        wanted = min(wanted, options.most or wanted)
    return {"samples": fits}


def trains(variant: str, samples: int, options: argparse.Namespace, group: Path) -> bool:
    """Whether a process of the cgroup takes the two steps; an error other than a lack of memory ends the study."""
    command = [sys.executable, __file__, "--preset", options.preset, "--dtype", options.dtype]
    command += ["--seq", str(options.seq), "--variants", variant, "--try", str(samples)]
    joined = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), **RETURNING}
    process = subprocess.Popen(joined, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        _, errors = process.communicate()
    finally:
        process.kill()
        process.wait()
    if process.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL) or "not enough memory" in errors:
        return False
    if process.returncode:
        raise UserError(f"{variant}, {samples} samples: status {process.returncode}\n{errors[-2000:]}")
    return True


def steps(variant: str, options: argparse.Namespace) -> None:
    """One step of one sample, then one of `options.attempt` samples."""
    import torch

    from elas.bench.one_process import one_process
    from elas.bench.step_models import Ours, Shape, variant_config
    from elas.engine.engine import Engine

    config = variant_config(variant, Shape(options.preset, None, 1, options.seq, 0), options.dtype)
    with one_process() as layout:
        model = Ours(Engine(config, layout), with_logits=variant.endswith("_logits"))
        for samples in (1, options.attempt):
            ids = torch.randint(config.model.vocab_size, (samples, options.seq + 1))
            config.train.micro_batch_size = config.train.global_batch_size = samples
            model.step((ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))


@contextlib.contextmanager
def cgroup(limit: int) -> Iterator[Path]:
    """A memory cgroup without swap, of version 1 or 2, removed at the end.

    Raises:
        UserError: none can be made.
    """
    version_1 = (V1 / "memory.limit_in_bytes").exists()
    group = (V1 if version_1 else V2) / f"elas-micro-batch-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(limit))
    except OSError as error:
        raise UserError(f"{group}: no memory cgroup can be made ({error.strerror}); run as root") from error
    try:
        yield group
    finally:
        with contextlib.suppress(OSError):  # a process that is just ending still counts
            time.sleep(0.2)
            group.rmdir()


if __name__ == "__main__":
    end_process(exit_status(main, sys.argv[1:]))
