"""`elas plan --measure`: measures this machine once and writes its hardware file."""

import os
import time
from pathlib import Path
from typing import Any

import torch

from elas import accelerator
from elas.command import Parser
from elas.console import Heartbeat, table
from elas.errors import UserError
from elas.files import write_json
from elas.launch.job import whole_number
from elas.plan.rates import KINDS, Measured, Rates, default_file, measured_from, read_measured
from elas.plan_check.ranks import SHAPES, on_ranks, usable


def main(argv: list[str]) -> int:
    """Run `elas plan --measure`; returns 0, raises `UserError` for mistakes."""
    what = "Measure rates of products, memory, links, optimizer and Python on this machine, with all ranks busy."
    parser = Parser(
        "elas plan --measure", what, "elas plan --measure && elas plan --config 60m --hardware this-machine"
    )
    parser.add_argument("--measure", action="store_true", required=True, help="about a minute on two cores")
    parser.add_argument("--ranks", type=int, metavar="N", help="all busy at once (default: GPUs, or usable cores)")
    where = f"to write (default: {default_file()})"
    parser.add_argument("--hardware-file", type=Path, metavar="FILE", help=where)
    options = parser.parse_args(argv)
    whole_number("--ranks", options.ranks)
    ranks, path = options.ranks or usable(), options.hardware_file or default_file()
    if ranks > usable():
        raise UserError(
            f"--ranks {ranks}: rates are those of busy GPUs or cores, of which {usable()} are here; give fewer"
        )
    _check_writable(path)
    measured = measure(ranks)
    write_json(path, measured.to_dict())
    read_measured(path)
    write_json(options.json, {**measured.to_dict(), "file": str(path)})
    show(measured)
    print(f"written: {path}; elas plan --hardware this-machine reads it")
    return 0


def measure(ranks: int) -> Measured:
    """Measure on so many ranks of this machine."""
    accelerator.prepare()
    from elas.bench.step_models import free_memory
    from elas.config import Config
    from elas.engine.prebuild import prebuild

    load, begun = os.getloadavg()[0], time.perf_counter()
    device = "cuda" if accelerator.has_cuda() else "cpu"
    with Heartbeat(f"measuring on {ranks} ranks"):
        prebuild(Config())  # here, lest every rank does
        found = on_ranks("rates", {**SHAPES[device], "dtypes": ["float32", "bfloat16"]}, ranks)[0]
    about: dict[str, Any] = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "load_before": load}
    about |= {"seconds": round(time.perf_counter() - begun, 1), "cores": len(os.sched_getaffinity(0))}
    name = torch.cuda.get_device_name() if device == "cuda" else accelerator.processor()
    total = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else (free_memory() or 0) / ranks
    facts = {"name": name, "device": device, "ranks": ranks, "memory": total, "about": about}
    return measured_from({**facts, "busy": found["busy"], "links": found["links"]})


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--hardware-file {path}: cannot be written ({error.strerror}); give another path") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--hardware-file {path}: is a folder or cannot be written; give a file's path")


def show(measured: Measured) -> None:
    """Print the figures, a column for each number of busy ranks and dtype."""
    about = measured.about
    print(f"{measured.name}, {measured.ranks} ranks, torch {about['torch']}; {about['seconds']:.0f} s, load before "
          f"{about['load_before']:.1f}")  # fmt: skip
    columns = [(count, dtype) for count in measured.busy for dtype in measured.busy[count]]
    headers = ["rate of a rank", *(f"{dtype}, {count} busy" for count, dtype in columns)]
    found = [_shown(measured.busy[count][dtype]) for count, dtype in columns]
    print(table(headers, [[name, *(one[name] for one in found)] for name in found[0]]))
    for kind in KINDS if measured.links else ():
        link = measured.links[kind]
        print(f"{kind.replace('_', '-')}: {link.bytes_per_s / 1e9:.2f} GB/s, {1e6 * link.latency_s:.0f} µs each")


def _shown(rates: Rates) -> dict[str, str]:
    giga = {"full-rank products, GFLOP/s": rates.full_rank}
    giga |= {f"factor products, rank {rank}": rate for rank, rate in rates.factor.items()}
    giga |= {f"2:4 FFN core, rank {rank}": rate for rank, rate in rates.core.items()}
    giga |= {"attention": rates.scores, "head and loss": rates.head, "memory, GB/s": rates.bandwidth}
    giga |= {"memory just obtained": rates.fresh}
    nano = {"norms and residuals, ns a token and feature": rates.norm_s, "rotary embedding and layout": rates.heads_s}
    nano |= {"silu(gate) · up": rates.gate_s, "AdamW, ns a parameter": rates.adam_s}
    micro = {"Python, µs a layer and micro-batch": rates.host_layer_s, "a micro-batch": rates.host_batch_s}
    micro |= {"a step": rates.host_step_s}
    shown = {name: f"{rate / 1e9:.1f}" for name, rate in giga.items()}
    shown |= {name: f"{1e9 * value:.2f}" for name, value in nano.items()}
    return shown | {name: f"{1e6 * value:,.0f}" for name, value in micro.items()}
