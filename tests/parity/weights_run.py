"""What the tests of `elas.checkpoint.weights` run on each rank: save a trained model, load it without an engine."""

import torch
from reshard_run import STEPS, _engine
from support.parity_run import SMALL, saver_of, tokens


def save(overrides: dict, run_dir: str) -> tuple[dict[str, torch.Tensor], float]:
    """Train a step and save; this rank's fp32 parameters with their names, and the validation loss after it."""
    from elas.checkpoint.weights import parameters_by_name

    config, engine, step = _engine(overrides, run_dir)
    step(STEPS)
    saver_of(config, engine).save(STEPS, tokens=0, facts={"consumed_samples": 0})
    size, layout = config.train.micro_batch_size, engine.layout
    samples = tokens(0)
    starts = [(m * layout.dp + layout.dp_rank) * size for m in range(engine.micro_batches)]
    nats, labels = engine.evaluate([(samples[s : s + size, :-1], samples[s : s + size, 1:]) for s in starts])
    whole = {} if engine.stage == 3 else parameters_by_name(engine.chunks)
    return {name: p.detach().float().cpu().clone() for name, p in whole.items()}, nats / labels


def load(cases: list[tuple[str, dict]]) -> list[tuple[list[str], float | None, str]]:
    """For each run's folder and settings: weights that are not this rank's part of the file's, the loss, and the error.

    The loss is that of `save`, from the chunks alone; None on a pipeline.
    """
    from elas import parallel
    from elas.checkpoint.choose import find
    from elas.checkpoint.weights import load_weights, parameters_by_name, read_weights
    from elas.config import load_config
    from elas.errors import UserError
    from elas.model.activation import set_sparse
    from elas.model.provider import build_chunks
    from elas.model.shards import shard

    results = []
    for run_dir, overrides in cases:
        config = load_config(None, {**SMALL, **overrides, "train.seed": 77})  # other weights before it is loaded
        layout = parallel.initialize(config.parallel, seed=config.train.seed)
        chunks, found = build_chunks(config), find(run_dir)
        try:
            load_weights(chunks, layout, found)
        except UserError as error:
            results.append(([], None, str(error)))
            parallel.shut_down()
            continue
        whole, wrong = dict(read_weights(found)), []
        for name, parameter in parameters_by_name(chunks).items():
            expected = shard(whole[name], parameter, layout.tp, layout.tp_rank).to(parameter.dtype)
            if not torch.equal(parameter.detach().cpu(), expected):
                wrong.append(name)
        loss = None
        if layout.pp == 1:
            set_sparse(chunks, True)
            samples = tokens(0)
            positions = torch.arange(samples.shape[1] - 1).expand(len(samples), -1)
            with torch.no_grad():
                loss = float(chunks[0](samples[:, :-1], positions, None, labels=samples[:, 1:]).double().mean())
        results.append((wrong, loss, ""))
        parallel.shut_down()
    return results
