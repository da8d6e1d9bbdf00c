"""`elas bench checkpoint`: how long synchronous and asynchronous saves block training, and their memory."""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from elas.bench.arguments import at_least
from elas.checkpoint.resume import first_intact
from elas.command import Parser
from elas.console import table
from elas.files import write_json

EXAMPLE = "elas bench checkpoint --preset 60m --repeats 5"


def main(argv: list[str]) -> int:
    """`elas bench checkpoint ARGV…`."""
    parser = Parser("elas bench checkpoint", "Time saving and loading a preset's checkpoint on one rank.", EXAMPLE)
    parser.add_argument("--preset", default="60m", metavar="NAME", help="configuration; default: 60m")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="saves of each kind; default: 5")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="default: the system's temporary folder")
    args = parser.parse_args(argv)
    at_least("--repeats", args.repeats, 1)
    with tempfile.TemporaryDirectory(prefix="elas-bench-checkpoint-", dir=args.folder) as folder:
        facts = _measure(args.preset, args.repeats, folder)
    write_json(args.json, facts)
    rows = [[row["kind"], f"{row['blocked_s']:.3f}", f"{row['written_s']:.3f}"] for row in facts["rows"]]
    print(table(["save", "training waits, s", "complete after, s"], rows, left=1))
    print(f"\nasynchronous ÷ synchronous: {facts['ratio']:.3f} (medians of {args.repeats})")
    print(f"this rank's part: {facts['shard_bytes'] / 1e6:,.0f} MB; copies kept by an asynchronous save: "
          f"{facts['copy_bytes'] / 1e6:,.0f} MB; loading: {facts['load_s']:.2f} s")  # fmt: skip
    return 0


def _measure(preset: str, repeats: int, folder: str) -> dict:
    from elas import parallel
    from elas.checkpoint import state
    from elas.checkpoint.choose import find_checkpoint
    from elas.checkpoint.identity import manifest_facts
    from elas.checkpoint.resume import restore
    from elas.checkpoint.saver import Saver
    from elas.config import load_config
    from elas.engine.engine import Engine
    from elas.run_dir import checkpoints_dir

    small = {"train.micro_batch_size": 1, "train.global_batch_size": 1, "train.run_dir": folder, "checkpoint.keep": 1}
    config = load_config(preset, small)
    config.parallel.zero = 1
    layout = parallel.initialize(config.parallel, seed=config.train.seed)
    engine = Engine(config, layout)
    ids = torch.randint(config.model.vocab_size, (1, config.model.seq_length + 1))
    batch = ids[:, :-1], ids[:, 1:]
    engine.step(iter([batch] * engine.micro_batches))
    saver = Saver(config.checkpoint, checkpoints_dir(config), engine, manifest_facts(config))
    times = {False: [], True: []}
    for number in range(2 * repeats + 2):  # the first of each kind plans and allocates, and is not counted
        beside = config.checkpoint.async_save = bool(number % 2)
        start = time.perf_counter()
        saver.save(number + 1, tokens=0, facts={"consumed_samples": 0})
        while saver.under_way and not saver.ready:
            time.sleep(0.001)
        saver.finish()
        if number >= 2:
            times[beside].append((saver.blocked_s, time.perf_counter() - start))
    config.checkpoint.resume = "auto"
    start = time.perf_counter()
    found = find_checkpoint(config)
    assert found is not None, "the saves above are in its folder"
    restore(engine, first_intact(found, config))
    load = time.perf_counter() - start
    rows = [
        {"kind": kind, "blocked_s": statistics.median(t[0] for t in times[beside]),
         "written_s": statistics.median(t[1] for t in times[beside])}
        for kind, beside in (("synchronous", False), ("asynchronous", True))
    ]  # fmt: skip
    shard = sum(part.nbytes for tensor in state.capture(engine).values() for part in tensor.parts.values())
    parallel.leave()
    return {"preset": preset, "repeats": repeats, "rows": rows, "ratio": rows[1]["blocked_s"] / rows[0]["blocked_s"],
            "shard_bytes": shard, "copy_bytes": saver.copy_bytes, "load_s": load}  # fmt: skip
