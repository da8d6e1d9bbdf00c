"""On four ranks: weights through Megatron-core's distributed checkpoints, from one layout into another."""

import torch
from small import KINDS, small

LAYOUTS = {  # tensor, pipeline; what is left of four ranks is data parallel
    "tp2": (2, 1),
    "tp1": (1, 1),
    "tp2 pp2": (2, 2),
}
BIASES = ", biases"
SAVED = {  # what keeps for the backward pass has no part in weights, so of those kinds one is enough
    "low rank": KINDS["low rank, fused"],
    "low rank, swiglu": KINDS["low rank, swiglu"],
    "cola, 2:4 between the factors": {**KINDS["cola, 2:4 between the factors"], "sparsity.dense_steps": 5},
    "full rank": KINDS["full rank"],
    "full rank, swiglu": KINDS["full rank, swiglu"],
    f"low rank{BIASES}": {},
    f"full rank, swiglu{BIASES}": KINDS["full rank, swiglu"],
}


def cross_over(written: str, read: str, folder: str) -> dict[str, str]:
    """What went wrong, by kind of layer: nothing, if every weight read equals the one written."""
    from elas import parallel

    _initialize(written)
    _save({kind: _build(SAVED[kind], written, kind, seed=1) for kind in SAVED}, folder)
    parallel.shut_down()
    _initialize(read)
    expected = {kind: dict(_build(SAVED[kind], read, kind, seed=1).named_parameters()) for kind in SAVED}
    models = {kind: _build(SAVED[kind], read, kind, seed=2) for kind in SAVED}
    _load(models, folder)
    problems = {}
    for kind, model in models.items():
        wrong = [name for name, p in model.named_parameters() if not torch.equal(p, expected[kind][name])]
        if wrong:
            problems[kind] = f"other values: {wrong}"
    return problems


def _initialize(name: str) -> None:
    from elas import parallel
    from elas.config import ParallelConfig

    tensor, pipeline = LAYOUTS[name]
    parallel.initialize(ParallelConfig(tensor=tensor, pipeline=pipeline), seed=1)


def _build(overrides: dict, layout: str, kind: str, seed: int) -> torch.nn.Module:
    import dataclasses

    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt import GPTModel

    from elas.model.init import initialise
    from elas.model.shards import full_shape, global_names, shard
    from elas.model.spec import block_spec
    from elas.model.transformer_config import transformer_config

    tensor, pipeline = LAYOUTS[layout]
    config = small({**overrides, "parallel.tensor": tensor, "parallel.pipeline": pipeline, "train.seed": seed})
    fields = dataclasses.replace(transformer_config(config), add_bias_linear=kind.endswith(BIASES))
    model = GPTModel(
        fields,
        block_spec(fields),
        vocab_size=config.model.vocab_size,
        max_sequence_length=config.model.seq_length,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        position_embedding_type="rope",
    )
    initialise(model, seed=seed, std=0.02)
    rank = mpu.get_tensor_model_parallel_rank()
    for name, parameter in global_names(model).items():
        if parameter.dim() == 1:  # norms and biases: something that tells names and shards apart
            values = torch.arange(full_shape(parameter, tensor)[0]) + 1000 * seed + len(name)
            parameter.data.copy_(shard(values, parameter, tensor, rank))
    return model


def _described(models: dict[str, torch.nn.Module]) -> dict:
    """Megatron's description of all models, in one checkpoint."""
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    state = {}
    for kind, model in models.items():
        state |= model.sharded_state_dict(prefix=f"{kind}.", metadata=ensure_metadata_has_dp_cp_group(None))
    return state


def _save(models: dict[str, torch.nn.Module], folder: str) -> None:
    from pathlib import Path

    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    if torch.distributed.get_rank() == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    one_thread = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)  # more are processes, forked for each
    dist_checkpointing.save(_described(models), folder, sharded_strategy=one_thread)


def _load(models: dict[str, torch.nn.Module], folder: str) -> None:
    """Into every model, strictly: no key may be missing."""
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load(_described(models), folder)
    for kind, model in models.items():
        prefix = f"{kind}."
        own = {key.removeprefix(prefix): value for key, value in loaded.items() if key.startswith(prefix)}
        model.load_state_dict(own)


def dense_steps_travel(folder: str) -> tuple[list[bool], list[bool]]:
    """Whether loaded layers are sparse in evaluation: of a model past its dense steps, and of one before their end."""
    from elas.model.activation import SparseSwitch, set_step

    _initialize("tp2")
    results = []
    for step in (6, 5):
        model, fresh = (_build({"sparsity.dense_steps": 5}, "tp2", "", seed=seed) for seed in (1, 2))
        set_step([model], step)
        _save({"x": model}, f"{folder}/{step}")
        _load({"x": fresh}, f"{folder}/{step}")
        results.append([m.sparse for m in fresh.eval().modules() if isinstance(m, SparseSwitch)])
    return results[0], results[1]
