"""What the tests of `elas.evaluate` run on each rank, and the same figures by plain loops over transformers' model."""

import math
from pathlib import Path

import numpy as np


def evaluate_all(cases: list[dict]) -> list[dict | str]:
    """Facts of each evaluation, or its error; `parallel` of a case is a layout by name."""
    import os

    from elas import parallel, prepare
    from elas.config import ParallelConfig
    from elas.console import Console
    from elas.errors import UserError
    from elas.evaluate.run import evaluate
    from elas.evaluate.subject import Request

    prepare()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results: list[dict | str] = []
    for case in cases:
        request = Request(**{**case, "parallel": ParallelConfig(**case.get("parallel", {}))})
        try:
            results.append(evaluate(request, Console(), rank, world))
        except UserError as error:
            results.append(str(error))
        parallel.shut_down()
    return results


def documents_of(prefix: str) -> list[np.ndarray]:
    """Documents of a corpus, read by Megatron-core's own class."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    return [np.asarray(dataset[i], np.int64) for i in range(len(dataset))]


def packed_rows(documents: list[np.ndarray], length: int) -> list[tuple[list[int], list[int]]]:
    """Tokens of each row, and the document of each."""
    ids = [(int(token), number) for number, document in enumerate(documents) for token in document]
    cut = [ids[i : i + length + 1] for i in range(0, len(ids) - 1, length)]
    return [([token for token, _ in row], [number for _, number in row]) for row in cut]


def truncated_rows(documents: list[np.ndarray], length: int) -> list[tuple[list[int], list[int]]]:
    """Tokens of each row, and the document of each."""
    rows = [document[: length + 1].tolist() for document in documents]
    return [(row, [number] * len(row)) for number, row in enumerate(rows) if len(row) > 1]


def by_hand(model, rows: list[tuple[list[int], list[int]]], batch: int) -> dict:
    """The figures, one row and one token at a time."""
    import torch

    nats: dict[int, list[float]] = {}
    means = []
    for begin in range(0, len(rows), batch):
        of_batch = []
        for ids, owners in rows[begin : begin + batch]:
            with torch.no_grad():
                logits = model(torch.tensor([ids[:-1]])).logits[0].double()
            for place, (label, owner) in enumerate(zip(ids[1:], owners[1:])):
                loss = float(torch.logsumexp(logits[place], 0) - logits[place, label])
                nats.setdefault(owner, []).append(loss)
                of_batch.append(loss)
        means.append(sum(of_batch) / len(of_batch))
    every = [loss for losses in nats.values() for loss in losses]
    mean, count = sum(every) / len(every), len(nats)
    residuals = [sum(losses) - mean * len(losses) for losses in nats.values()]
    return {
        "loss": mean,
        "loss_stderr": math.sqrt(count / (count - 1) * sum(one * one for one in residuals)) / len(every),
        "ppl": math.exp(mean),
        "ppl_n_plus_1": math.exp(sum(means) / (len(means) + 1)),
        "tokens": len(every),
        "documents": count,
        "batches": len(means),
    }


def state_of(folder: str) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file and folder below."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in [Path(folder), *Path(folder).rglob("*")]}


def save(settings: dict, run_dir: str) -> None:
    """Train some steps, the last of them sparse, and save the last two."""
    import sys

    sys.path.append(str(Path(__file__).parents[1] / "parity"))
    from reshard_run import STEPS, _engine
    from support.parity_run import saver_of

    config, engine, step = _engine(settings, run_dir)
    saver = saver_of(config, engine)
    for number in range(STEPS):
        step(number)
        if number >= STEPS - 2:
            saver.save(number + 1, tokens=0, facts={"consumed_samples": 0})


def tasks_of(requests: list[dict]) -> list[dict]:
    """Facts of each run of tasks; empty but on rank 0."""
    import os

    from elas import prepare
    from elas.console import Console
    from elas.evaluate.tasks import TaskRequest, run_tasks

    prepare()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return [run_tasks(TaskRequest(**request), Console(), rank, world) for request in requests]
