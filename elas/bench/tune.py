"""`elas tune`: measures tiles of the fused Triton kernels on this GPU and keeps the fastest correct ones.

For every kernel, width and dtype some dozens of tiles are compiled, several processes side by side, each compared with
fp64; those that are right are timed one after the other (Triton's `do_bench`: CUDA events, the L2 cache flushed before
each run, medians). The result is JSON in the user's cache, which the kernels read from then on
(kernels/relu2_24/triton/tuned.py). `--write-shipped` writes the file that ships instead.
"""

import argparse
import collections
import itertools
import json
import multiprocessing
import os
import queue
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from elas.bench import arguments, kernel_check, measure
from elas.bench.arguments import DTYPES
from elas.command import Parser
from elas.console import LiveLine, table
from elas.errors import UserError
from elas.files import write_json
from elas.kernels.relu2_24 import Relu24Options
from elas.kernels.relu2_24.passes import Operands
from elas.kernels.relu2_24.triton import fused, tiles, tuned
from elas.kernels.relu2_24.triton.tiles import Kernel, Tile

KERNELS: tuple[Kernel, ...] = ("forward", "du", "weights")
PRODUCTS = {"forward": 2, "du": 3, "weights": 4}
CHECKED_TOKENS = 512
TOKENS, FEATURES, STAGES = (32, 64, 128, 256), (16, 32, 64, 128), (1, 2, 3, 4)
MOST_REGISTERS = 224
"""32-bit registers of a thread for sums and products; more would spill."""


@dataclass(frozen=True)
class Case:
    """What a tile is measured for."""

    kernel: Kernel
    dtype: str
    method: str
    r: int
    features: int
    tokens: int


def main(argv: list[str]) -> int:
    """Run `elas tune`; returns the exit status, 1 if no tile of some case is right."""
    what = "Measure tiles of the fused Triton kernels on this GPU, and keep the fastest that are right."
    parser = Parser("elas tune", what, "elas tune --ranks 128,256")
    parser.add_argument("--ranks", default="128,256,512", help="widths of u and v (default: %(default)s)")
    parser.add_argument("--dtypes", default="bfloat16", help="default: %(default)s")
    parser.add_argument("--methods", default="magnitude", help="magnitude, soft_threshold (default: %(default)s)")
    parser.add_argument("--features", type=int, default=4096, metavar="F", help="d_ff (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16384, metavar="T", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=600, metavar="S", help="stop trying after so long")
    parser.add_argument("--processes", type=int, default=None, metavar="N", help="that compile (default: cores - 2)")
    parser.add_argument("--write-shipped", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    ranks = arguments.counts("--ranks", options.ranks)
    dtypes = arguments.dtypes(options.dtypes)
    methods = arguments.choices("--methods", options.methods, ["magnitude", "soft_threshold"])
    if max(ranks) > 512:
        raise UserError(f"--ranks {options.ranks}: the fused kernels serve widths up to 512")
    for option in ("features", "tokens", "processes"):
        arguments.at_least(f"--{option}", getattr(options, option), 1)
    if not options.seconds > 0:
        raise UserError(f"--seconds {options.seconds:g}: must be above 0")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    if device is None:
        raise UserError("elas tune: torch sees no CUDA device; tiles are measured on the GPU that they are for")
    torch.set_float32_matmul_precision("high")
    for dtype in dtypes:
        if (reason := fused.obstacle(device, DTYPES[dtype])) is not None:
            raise UserError(f"elas tune: the Triton kernels do not run here in {dtype}: {reason}")
    cases = [
        Case(kernel, dtype, method, r, options.features, options.tokens)
        for dtype, method, r, kernel in itertools.product(dtypes, methods, ranks, KERNELS)
    ]
    gpu = torch.cuda.get_device_name(device)
    path = (tuned.SHIPPED if options.write_shipped else tuned.user_folder()) / tuned.file_name(gpu)
    check_can_keep(path)
    rows, notes = _measure(cases, device, options.processes, options.seconds)
    facts = {**arguments.environment(), "file": str(path), "rows": rows, "notes": notes}
    write_json(options.json, facts)
    keep(path, gpu, [row for row in rows if row["tile"] is not None])
    fused.forget_tiles()
    _print(facts)
    return 1 if any(row["tile"] is None for row in rows) else 0


def candidates(case: Case, chip: str) -> Iterator[Tile]:
    """Tiles whose sums fit in the registers and whose operands fit in shared memory, the table's first."""
    default = tiles.choose(chip, case.kernel, DTYPES[case.dtype], case.r, case.method == "soft_threshold")
    assert default is not None, "widths are checked"
    yield default
    wide, size = default.columns(case.r), 2 if case.dtype == "bfloat16" else 4
    for tokens, features, warps, stages in itertools.product(TOKENS, FEATURES, (4, 8), STAGES):
        if (wide < 256 and (features == 16 or stages == 1)) or (
            wide < 512 and tokens == 32 and case.kernel != "weights"
        ):
            continue  # wgmma multiplies 64 rows at once; narrow tiles are for sums that fill the registers
        tile = Tile(tokens, features, default.gap, warps, stages)
        inner, both = tokens * features, 2 * wide * size
        if case.kernel == "weights":
            values, memory = 2 * wide * features + 2 * inner, features * both + stages * tokens * both
        else:
            values = wide * tokens + (1 if case.kernel == "forward" else 2) * inner
            memory = tokens * both // (2 if case.kernel == "forward" else 1) + stages * features * both
        registers = values / (32 * warps)
        if tile != default and 32 <= registers <= MOST_REGISTERS and memory <= 1.1 * tiles.SHARED_BYTES[chip]:
            yield tile


class Job:
    """Operands of a case on the device, its kernel with a tile, and the result in fp64."""

    def __init__(self, case: Case, tokens: int, device: torch.device):
        made = kernel_check.operands(tokens, case.r, case.features, case.r, DTYPES[case.dtype], device, seed=7)
        u, m, n, self.dv = (x.detach() for x in made)
        self.inputs, self.operands, self.case = made, Operands(u, m, n), case
        self.options = Relu24Options(method="magnitude" if case.method == "magnitude" else "soft_threshold")

    def run(self, tile: Tile) -> tuple[torch.Tensor, ...]:
        """One call of the kernel, with the copies and sums that belong to it."""
        passes = fused.TritonFused(tile)
        if self.case.kernel == "forward":
            return (passes.forward(self.operands, self.options, True)[0],)
        needs = (True, False, False) if self.case.kernel == "du" else (False, True, True)
        return tuple(x for x in passes.backward(self.operands, (), self.dv, self.options, needs) if x is not None)

    def truth(self) -> tuple[torch.Tensor, ...]:
        """The same in fp64."""
        want = kernel_check.truth(self.inputs, self.options)
        names = {"forward": ("v",), "du": ("du",), "weights": ("dm_up", "dn_down")}
        return tuple(want[name] for name in names[self.case.kernel])

    def error(self, tile: Tile, truth: tuple[torch.Tensor, ...]) -> float:
        """The largest RMS error of its results."""
        return max(measure.rms_error(got, want) for got, want in zip(self.run(tile), truth, strict=True))


def _compile_and_check(work: Any, results: Any, device_index: int) -> None:
    """A process: compile tiles from `work` and say whether each is right."""
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda", device_index)
    torch.cuda.set_device(device)
    jobs: dict[Case, tuple[Job, tuple[torch.Tensor, ...]]] = {}
    while True:
        try:
            case, tile = work.get(timeout=0.5)
        except queue.Empty:
            return
        try:
            if case not in jobs:
                job = Job(case, CHECKED_TOKENS, device)
                jobs[case] = job, job.truth()
            error = jobs[case][0].error(tile, jobs[case][1])
            results.put((case, tile, error, None))
        except Exception as error:  # of Triton's: out of registers or shared memory, an internal failure
            results.put((case, tile, None, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"))


def _measure(cases: list[Case], device: torch.device, processes: int | None, seconds: float):
    """Rows with the fastest tile of every case, and notes on wrong ones."""
    import triton

    end, say = time.monotonic() + seconds, LiveLine(every_s=measure.SILENCE_S)
    chip = fused.chip_of(device)
    tried = [(case, tile) for case in cases for tile in candidates(case, chip)]
    defaults = {case: next(candidates(case, chip)) for case in cases}
    tried.sort(key=lambda one: one[1] != defaults[one[0]])  # the tables' first, lest time end before them
    context = multiprocessing.get_context("spawn")
    work, results = context.Queue(), context.Queue()
    for one in tried:
        work.put(one)
    count = processes or max(1, min(len(tried), (os.cpu_count() or 2) - 2))
    index = device.index or 0
    workers = [context.Process(target=_compile_and_check, args=(work, results, index)) for _ in range(count)]
    for worker in workers:
        worker.start()
    right: dict[Case, list[Tile]] = {case: [] for case in cases}
    notes: list[str] = []
    done, refused = 0, collections.Counter()
    while done < len(tried) and time.monotonic() < end:
        say(f"compiling and checking tiles: {done} of {len(tried)}, {count} processes")
        try:
            case, tile, error, reason = results.get(timeout=1.0)
        except queue.Empty:
            if not any(worker.is_alive() for worker in workers):
                break
            continue
        done += 1
        if reason is not None:
            refused[reason] += 1
        elif error > kernel_check.BOUNDS[case.dtype]:
            notes.append(f"{case.kernel} {case.dtype} r={case.r} {tile}: WRONG, error {error:.1e}")
        else:
            right[case].append(tile)
    for worker in workers:
        worker.terminate()
    if done < len(tried):
        notes.append(f"{len(tried) - done} of {len(tried)} tiles were not tried: time was over")
    for reason, count in refused.most_common(4):
        notes.append(f"{count} tiles did not compile or run: {reason}")
    rows = []
    for case, fitting in right.items():
        job, times = Job(case, case.tokens, device), {}
        for tile in fitting:
            say(f"timing {case.kernel} {case.dtype} r={case.r}: {len(times) + 1} of {len(fitting)}")
            job.run(tile)
            times[tile] = triton.testing.do_bench(
                lambda t=tile, j=job: j.run(t), warmup=5, rep=20, return_mode="median"
            )
        rows.append(_row(case, times, defaults[case]))
    say.clear()
    return rows, notes


def _row(case: Case, times: dict[Tile, float], default: Tile) -> dict[str, Any]:
    row: dict[str, Any] = {"kernel": case.kernel, "dtype": case.dtype, "method": case.method}
    row |= {"r_in": case.r, "r_out": case.r, "features": case.features, "tokens": case.tokens, "tried": len(times)}
    if not times:
        return row | {"tile": None, "us": None, "default_us": None, "tflops": None}
    best = min(times, key=lambda tile: times[tile])
    flops = 2 * PRODUCTS[case.kernel] * case.tokens * case.features * case.r
    known = times.get(default)
    return row | {
        "tile": asdict(best),
        "us": 1e3 * times[best],
        "default_us": None if known is None else 1e3 * known,
        "tflops": flops / times[best] / 1e9,
    }


def check_can_keep(path: Path) -> None:
    """Before anything is measured: make the folder, and read what is in the file.

    Raises:
        UserError: the file is damaged, or cannot be written.
    """
    tuned.read(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").touch()
        path.with_suffix(".tmp").unlink()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); set XDG_CACHE_HOME to another folder"
        ) from error


def keep(path: Path, gpu: str, rows: list[dict[str, Any]]) -> None:
    """Write rows to a GPU's file, in place of those for the same kernel, dtype, method and widths."""
    import triton

    keys = ("kernel", "dtype", "method", "r_in", "r_out")
    before = json.loads(path.read_text())["tiles"] if tuned.read(path) else []
    merged = {tuple(row[key] for key in keys): row for row in [*before, *rows]}
    content = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "date": time.strftime("%Y-%m-%d")}
    lines = ",\n".join("  " + json.dumps(merged[key]) for key in sorted(merged))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content)[:-1] + ', "tiles": [\n' + lines + "\n]}\n")
    temporary.replace(path)


def _print(facts: dict[str, Any]) -> None:
    print(f"{facts['device']}, torch {facts['torch']}")
    cells = [
        [row["kernel"], row["dtype"], row["method"], str(row["r_in"]), str(row["tried"]), *_measured(row)]
        for row in facts["rows"]
    ]
    headers = ["kernel", "dtype", "method", "r", "right", "tokens × features, warps, stages", "µs", "before", "TFLOP/s"]
    print(table(headers, cells, left=6))
    print(f"written to {facts['file']}")
    for note in facts["notes"]:
        print(f"note: {note}")


def _measured(row: dict[str, Any]) -> list[str]:
    if row["tile"] is None:
        return ["none is right", "–", "–", "–"]
    tile, before = row["tile"], row["default_us"]
    text = f"{tile['tokens']} × {tile['features']}, {tile['warps']}, {tile['stages']}"
    return [text, f"{row['us']:.0f}", "–" if before is None else f"{before:.0f}", f"{row['tflops']:.0f}"]
