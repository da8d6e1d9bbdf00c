"""What the resharding tests run on each rank: train and save on one layout, load on another and go on."""

from pathlib import Path

import torch
from support.parity_run import SMALL, _step, saver_of

from elas.checkpoint.resume import first_intact

STEPS = 5  # before the checkpoint: past the first steps without 2:4, and LORO's exact step at 4


def _engine(overrides: dict, run_dir: str):
    from elas import parallel
    from elas.config import load_config
    from elas.engine.cycles import cycle_of
    from elas.engine.engine import Engine
    from elas.model.activation import set_sparse

    config = load_config(None, {**SMALL, **overrides, "train.run_dir": run_dir})
    layout = parallel.initialize(config.parallel, seed=config.train.seed)
    engine = Engine(config, layout)
    cycle = cycle_of(engine)
    return config, engine, lambda step: _step(engine, step, set_sparse, cycle)


def save(overrides: dict, run_dir: str) -> float:
    """Train `STEPS` steps, save, and take one more; its loss."""
    config, engine, step = _engine(overrides, run_dir)
    for number in range(STEPS):
        step(number)
    saver = saver_of(config, engine)
    saver.save(STEPS, tokens=0, facts={"consumed_samples": 0})
    if not config.checkpoint.async_save:
        return step(STEPS)[0]
    loss = step(STEPS)[0]  # changes everything in place while it is being written
    saver.finish()
    return loss


def scrambled_save(overrides: dict, run_dir: str) -> tuple[str, list[str], tuple]:
    """Save, misread where weights lie, save again; the error, the checkpoints that are there, and read-back's words."""
    from elas.checkpoint import selfcheck
    from elas.errors import Failure

    config, engine, step = _engine(overrides, run_dir)
    step(0)
    saver = saver_of(config, engine)
    saver.save(1, tokens=0, facts={"consumed_samples": 0})
    samples = [selfcheck.Sample(engine, 1)]
    step(1)
    samples.append(selfcheck.Sample(engine, 1))
    read_back = tuple(sample.difference(saver.last) for sample in samples)
    optimizer = engine.deepspeed.optimizer
    if engine.stage == 3:
        positions = optimizer.grad_position
        one, two = (optimizer.get_param_id(p) for p in _two_alike(list(engine.chunks[0].parameters()), "ds_shape"))
        positions[one], positions[two] = positions[two], positions[one]
    elif engine.stage:
        optimizer.round_robin_bit16_groups[0].reverse()
    else:
        masters = optimizer.fp32_groups[0]
        one, two = (next(i for i, m in enumerate(masters) if m is p) for p in _two_alike(masters, "shape"))
        masters[one], masters[two] = masters[two], masters[one]
    try:
        saver.save(2, tokens=0, facts={"consumed_samples": 0})
    except Failure as error:
        return str(error), sorted(path.name for path in saver.last.parent.iterdir()), read_back
    return "", [], read_back


def _two_alike(tensors: list, shape: str) -> list:
    """Two matrices of one shape."""
    matrices = [t for t in tensors if len(getattr(t, shape)) > 1]
    return [t for t in matrices if getattr(t, shape) == getattr(matrices[-1], shape)][:2]


def load(overrides: dict, source: str, run_dir: str) -> float:
    """Load what `save` left in `source`, save it again from this layout, and take the next step; its loss."""
    from elas.checkpoint.choose import find_checkpoint
    from elas.checkpoint.resume import restore

    config, engine, step = _engine({**overrides, "train.seed": 77}, run_dir)  # other weights before it is loaded
    config.train.seed = SMALL["train.seed"]
    config.checkpoint.resume = str(Path(source) / "checkpoints" / f"step_{STEPS:08d}")
    restore(engine, first_intact(find_checkpoint(config), config))
    saver_of(config, engine).save(STEPS, tokens=0, facts={"consumed_samples": 0})
    return step(STEPS)[0]


def tensors(run_dir: str) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint in a run's folder, whole, but for the random streams."""
    from elas.checkpoint import storage

    folder = Path(run_dir) / "checkpoints" / f"step_{STEPS:08d}"
    index = storage.read_index(folder).state_dict_metadata
    whole = {name: torch.zeros(entry.size) for name, entry in index.items() if not name.startswith("random.")}
    storage.read(folder, whole)
    return whole
