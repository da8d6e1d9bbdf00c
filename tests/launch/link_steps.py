"""What each of two ranks on two hosts runs for link_study.py: training steps, bytes that cross the link, seconds."""

import json
import sys
import time

import torch


def bytes_sent(interface: str) -> int:
    """Bytes that a network card of this host has sent, as the kernel counts them."""
    with open("/proc/net/dev") as lines:
        line = next(line for line in lines if line.strip().startswith(f"{interface}:"))
    return int(line.split(":")[1].split()[8])


def formula_bytes(config) -> float:
    """Bytes that one of t tensor-parallel ranks sends in a training step with AdamW, by the collectives of the model.

    The layers', from `elas.bench.comm`; besides them, for each token: the embedding's sum (h values, forward), that of
    the output layer's input gradient (h, backward), and three of the cross-entropy over split vocabularies.
    """
    from elas.bench.comm import formula
    from elas.bench.comm_layers import ring_share

    h, t = config.model.hidden_size, config.parallel.tensor
    name = "full" if config.low_rank.kind == "none" else "bottleneck"
    layer = sum(ring_share(kind, t) * n for values in formula(name, False, config) for kind, n in values.items())
    values = config.model.num_layers * layer + ring_share("all_reduce", t) * (2 * h + 3)
    return values * config.train.global_batch_size * config.model.seq_length * 4  # fp32


def main(presets: str, overrides: str, steps: int, interface: str, target: str) -> None:
    """Measure each preset; rank 0 writes the rows."""
    from elas import parallel
    from elas.config import load_config

    rows = []
    for preset in presets.split(","):
        config = load_config(preset, json.loads(overrides))
        layout = parallel.initialize(config.parallel, seed=1)
        rows.append({"preset": preset, "formula_bytes": formula_bytes(config),
                     **measure(config, layout, steps, interface)})  # fmt: skip
        parallel.shut_down()
    if layout.rank == 0:
        with open(target, "w") as file:
            json.dump(rows, file)
    torch.distributed.barrier()


def measure(config, layout, steps: int, interface: str) -> dict:
    """Bytes a step and seconds of each."""
    from elas.engine.engine import Engine

    engine = Engine(config, layout)
    engine.set_learning_rate(1e-4)
    generator = torch.Generator().manual_seed(1)
    size = (config.train.micro_batch_size, config.model.seq_length + 1)

    def batches():
        while True:
            tokens = torch.randint(config.model.vocab_size, size, generator=generator)
            yield tokens[:, :-1], tokens[:, 1:]

    samples = batches()
    engine.step(samples)  # what happens once
    torch.distributed.barrier()
    before, seconds = bytes_sent(interface), []
    for _ in range(steps):
        start = time.perf_counter()
        engine.step(samples)
        seconds.append(time.perf_counter() - start)
    torch.distributed.barrier()
    return {"bytes": (bytes_sent(interface) - before) / steps, "seconds": seconds}


if __name__ == "__main__":
    main(*sys.argv[1:3], int(sys.argv[3]), *sys.argv[4:6])
    from elas.command import end_process

    end_process(0)
