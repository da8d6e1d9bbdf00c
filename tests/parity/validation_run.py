"""What the tests of validation run on each rank: the real loop's step-0 validation, and the same mean by hand."""

import json
from pathlib import Path


def _start(settings: dict):
    from elas import parallel
    from elas.config import load_config

    config = load_config(None, settings)
    return config, parallel.initialize(config.parallel, seed=config.train.seed)


def validate(settings: dict) -> list[dict]:
    """Train one step with the real loop; the lines of validation.jsonl and metrics.jsonl."""
    from elas.train.loop import run

    config, layout = _start(settings)
    run(config, layout, None)
    names = ("validation", "metrics")
    return [
        [json.loads(line) for line in (Path(config.train.run_dir) / f"{name}.jsonl").read_text().splitlines()]
        for name in names
    ]


def by_hand(settings: dict, samples: int) -> tuple[float, int]:
    """Mean loss over every label of the first samples of the validation set, one sample at a time, and their number."""
    import torch

    from elas.data.batches import build_datasets
    from elas.engine.engine import Engine
    from elas.engine.losses import token_losses
    from elas.model.activation import set_step

    config, layout = _start(settings)
    engine, valid = Engine(config, layout), build_datasets(config).valid
    set_step(engine.chunks, 0)
    losses = []
    with torch.no_grad():
        for index in range(samples):
            tokens, labels = (valid[index][key][None] for key in ("tokens", "labels"))
            losses.append(token_losses(engine.chunks[0], tokens, labels)[labels >= 0].double())
    whole = torch.cat(losses)
    return float(whole.mean()), len(whole)
