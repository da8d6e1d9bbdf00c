"""What the reference tests run on each rank: a whole `elas train`, as launch/pretrain.py runs it in its process."""

from pathlib import Path

import torch


def train(overrides: dict) -> dict:
    """Train, validate and save.

    Args:
        overrides: configuration by dotted key.

    Returns:
        `result`: last loss and validation loss, on every rank. On rank 0 also `settings` as plain dictionaries;
        `batches`, tokens and labels int64 `[steps, global batch, s]`, and `valid`, `[samples, s]`; `rows` and
        `validation` of the two files; and `state`, the last checkpoint's tensors by name.
    """
    from elas import parallel
    from elas.checkpoint import storage
    from elas.checkpoint.choose import find_checkpoint
    from elas.config import load_config
    from elas.config.deepspeed import choose_zero_stage
    from elas.config.rules import validate
    from elas.data.batches import build_datasets
    from elas.data.corpus import check_corpus
    from elas.files import read_jsonl
    from elas.parallel import world_size
    from elas.train.loop import run

    config = load_config(None, overrides)
    choose_zero_stage(config, world_size())
    validate(config, world_size())
    check_corpus(config)
    resume = find_checkpoint(config)
    layout = parallel.initialize(config.parallel, seed=config.train.seed)
    result = run(config, layout, resume)
    facts = {"result": (result.loss, result.valid_loss)}
    datasets, size = build_datasets(config), config.train.global_batch_size  # every rank: they wait for each other
    if layout.rank > 0:
        return facts
    folder = Path(result.checkpoint)
    index = storage.read_index(folder).state_dict_metadata
    state = {name: torch.zeros(entry.size) for name, entry in index.items() if not name.startswith("random.")}
    storage.read(folder, state)
    return facts | {
        "settings": config.to_dict(),
        "batches": _stacked(datasets.train, (config.train.steps, size)),
        "valid": _stacked(datasets.valid, (len(datasets.valid),)),
        "rows": read_jsonl(Path(config.train.run_dir) / "metrics.jsonl"),
        "validation": read_jsonl(Path(config.train.run_dir) / "validation.jsonl"),
        "state": state,
    }


def _stacked(dataset: torch.utils.data.Dataset, shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Tokens and labels of all samples, `[*shape, s]`."""
    samples = [dataset[index] for index in range(len(dataset))]
    parts = (torch.stack([sample[key] for sample in samples]).to(torch.int64) for key in ("tokens", "labels"))
    return tuple(part.view(*shape, -1) for part in parts)


def rotary_angles(overrides: dict, positions: int) -> torch.Tensor:
    """Angles that a training engine's model turns positions by, `[positions, d / 2]`."""
    from elas import parallel
    from elas.config import load_config
    from elas.engine.engine import Engine

    config = load_config(None, overrides)
    engine = Engine(config, parallel.initialize(config.parallel, seed=config.train.seed))
    return engine.chunks[0].rotary_pos_emb.get_freqs_non_repeated(positions)
