"""On two ranks: a run of our engine, its checkpoint in Megatron-core's hands, and back, going on each time."""

import argparse
import contextlib
import shutil
from pathlib import Path

import torch
from small import COLA, FULL, SWIGLU, small
from small import KINDS as ALL_KINDS
from support.parity_run import SMALL, _step, saver_of, tokens

from elas.checkpoint.resume import first_intact

FIRST, SECOND, LEFT = 4, 6, 2  # steps before each of the two checkpoints (2:4 begins with the fourth), and after it
KINDS = {
    "low rank": {"parallel.tensor": 2},
    "low rank, tied, pipeline": {"parallel.pipeline": 2, "model.tie_embeddings": True, "model.num_query_groups": 2},
    "low rank, distributed optimizer": {"parallel.tensor": 2, "parallel.sequence": True},
    "low rank, bf16": {"parallel.zero": 2, "train.dtype": "bfloat16"},
    "full rank, swiglu": {"parallel.tensor": 2, **FULL, **SWIGLU},
    "cola, 2:4 between the factors": {**COLA, "low_rank.activation": "relu2", "model.activation": "swiglu"},
}
MOMENTS = ("exp_avg", "exp_avg_sq")


def _settings(kind: str, folder: str) -> dict:
    settings = {
        **SMALL,
        "optimizer.weight_decay": 0.1,
        "train.steps": 100,
        "train.eval_batches": 0,
        **KINDS[kind],
        "train.run_dir": folder,
    }
    if settings.get("sparsity.kind") == "none" and not kind.startswith("cola"):
        settings["sparsity.dense_steps"] = 0
    else:
        settings["sparsity.kind"] = "2:4"
    return settings


def _engine(kind: str, folder: str):
    from elas import parallel
    from elas.config import load_config
    from elas.engine.engine import Engine

    config = load_config(None, _settings(kind, folder))
    return config, Engine(config, parallel.initialize(config.parallel, seed=config.train.seed))


def _steps(engine, first: int, number: int) -> list[float]:
    from elas.model.activation import set_step

    sparse = lambda chunks, _active: set_step(chunks, step + 1)  # noqa: E731
    losses = []
    for step in range(first, first + number):
        losses.append(_step(engine, step, sparse, None)[0])
    return losses


def _command(*argv: str) -> None:
    """`elas checkpoint …` on rank 0, while the others wait."""
    from elas.checkpoint.cli import main

    failed = [main(list(argv)) if torch.distributed.get_rank() == 0 else 0]
    torch.distributed.broadcast_object_list(failed, src=0)
    assert failed == [0]


def shapes() -> dict[str, list]:
    """By kind of layer: weights whose shape is another than `weight_shapes` says."""
    from elas import parallel
    from elas.config import ParallelConfig
    from elas.model.provider import make_model_provider
    from elas.model.shards import global_names
    from elas.plan.shapes import weight_shapes

    parallel.initialize(ParallelConfig(), seed=1)
    found = {}
    for kind, overrides in {**ALL_KINDS, "tied": {"model.tie_embeddings": True}}.items():
        config = small(overrides)
        built = {name: tuple(p.shape) for name, p in global_names(make_model_provider(config)()).items()}
        found[kind] = sorted(set(built.items()) ^ set(weight_shapes(config).items()))
    return found


def leave(kind: str, folder: str) -> list[float]:
    """Train by our engine, save, export; losses of the steps after the checkpoint."""
    config, engine = _engine(kind, f"{folder}/ours")
    _steps(engine, 0, FIRST)
    saver_of(config, engine).save(FIRST, tokens=0, facts={"consumed_samples": FIRST * config.train.global_batch_size})
    losses = _steps(engine, FIRST, LEFT)
    _command("export", f"{folder}/ours", f"{folder}/exported", "--adam", "torch")
    return losses


def abroad(kind: str, folder: str) -> dict:
    """Load it with Megatron-core on two data-parallel ranks, go on, save there, import.

    Returns:
        `loaded`, `imported`: tensors that are not equal to the last bit; `before`, `after`: losses until Megatron's
        checkpoint, and after it; `sparse`: whether 2:4 is on when it is loaded.
    """
    from elas import parallel
    from elas.config import ParallelConfig, load_config
    from elas.model.activation import SparseSwitch

    parallel.initialize(ParallelConfig(), seed=9)
    config = load_config(
        None, {**_settings(kind, folder), "parallel.tensor": 1, "parallel.pipeline": 1, "train.seed": 9}
    )
    config.parallel.sequence = False
    distributed = kind.endswith("distributed optimizer")
    with _torch_adam_loads() if distributed else contextlib.nullcontext():
        wrapped, optimizer = _of_megatron(config, distributed)
        iteration = _load(wrapped, optimizer, distributed, f"{folder}/exported/iter_{FIRST:07d}")
        assert iteration == FIRST
        loaded = _different(wrapped.module, optimizer, f"{folder}/ours/checkpoints/step_{FIRST:08d}", distributed)
        switches = [m.sparse for m in wrapped.modules() if isinstance(m, SparseSwitch) and m.can_be_sparse]
        before = [_train(wrapped, optimizer, config, step) for step in range(FIRST, SECOND)]
        _save(wrapped, optimizer, distributed, f"{folder}/theirs/iter_{SECOND:07d}", config)
        given = {**_settings(kind, f"{folder}/back"), "data.train": f"{folder}/corpus"}
        _command("import", f"{folder}/theirs/iter_{SECOND:07d}", *_words(given))
        imported = _different(wrapped.module, optimizer, f"{folder}/back/checkpoints/step_{SECOND:08d}", distributed)
    after = [_train(wrapped, optimizer, config, step) for step in range(SECOND, SECOND + LEFT)]
    return {"loaded": loaded, "imported": imported, "before": before, "after": after, "sparse": switches}


def back(kind: str, folder: str) -> list[float]:
    """Go on with our engine from what was imported; losses."""
    from elas.checkpoint.choose import find_checkpoint
    from elas.checkpoint.resume import restore

    config, engine = _engine(kind, f"{folder}/back")
    config.data.train = f"{folder}/corpus"
    found = find_checkpoint(config)
    assert found.step == SECOND and found.manifest["consumed_samples"] == SECOND * config.train.global_batch_size
    restore(engine, first_intact(found, config))
    return _steps(engine, SECOND, LEFT)


def refused(folder: str) -> tuple[list[str], list[str]]:
    """What commands say, on one rank, of what they cannot do; and of weights alone, to resuming and to beginning."""
    from elas.checkpoint.choose import find_checkpoint
    from elas.checkpoint.cli import main
    from elas.checkpoint.initial import find_initial
    from elas.config import load_config
    from elas.errors import UserError

    ours, theirs = Path(folder, "ours"), Path(folder, "theirs", f"iter_{SECOND:07d}")
    given = {**_settings("low rank", f"{folder}/other"), "data.train": f"{folder}/corpus"}
    damaged, hostile = (_with_common(theirs, Path(folder, name)) for name in ("damaged", "hostile"))
    (damaged / "common.pt").write_bytes(b"PK" + bytes(100))
    torch.save({"iteration": 1, "args": _Hostile()}, hostile / "common.pt")
    imports = [
        ({}, ours),
        ({}, damaged),
        ({}, hostile),
        ({"low_rank.rank": 8}, theirs),
        ({"model.vocab_size": 384}, theirs),
        ({"model.norm_eps": 1e-3}, theirs),
        ({"model.num_layers": 8}, theirs),
        ({"model.tie_embeddings": True}, theirs),
        ({"model.ffn_hidden_size": 256}, theirs),
        ({"sparsity.kind": "none"}, theirs),
        ({"model.activation": "swiglu", "sparsity.kind": "none"}, theirs),
        ({"optimizer.kind": "loro"}, theirs),
        ({"train.run_dir": str(ours)}, theirs),
        ({"data.train": None}, theirs),
    ]
    commands = [["import", str(path), *_words(given | changes)] for changes, path in imports]
    commands += [["export", str(ours), str(ours)], ["export", f"{folder}/nothing", f"{folder}/new"]]
    said = [_message(UserError, main, words) for words in commands]
    given |= {"data.train": None, "optimizer.kind": "loro"}
    assert main(["import", str(theirs), "--weights-only", *_words(given)]) == 0
    config = load_config(None, given)
    alone = [_message(UserError, find_checkpoint, config)]
    config.checkpoint.init_from, config.train.run_dir = config.train.run_dir, f"{folder}/third"
    alone += find_initial(config, None).says()
    return said, alone


class _Hostile:
    """Runs a command where it is unpickled as pickle does."""

    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def _with_common(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint's folder."""
    shutil.copytree(source, folder)
    return folder


def _words(settings: dict) -> list[str]:
    return [f"--{key}={'null' if value is None else value}" for key, value in settings.items()]


def _message(kind: type, function, *args) -> str:
    try:
        function(*args)
    except kind as refusal:
        return str(refusal)
    return ""


@contextlib.contextmanager
def _torch_adam_loads():
    """Without Apex or Transformer Engine, Megatron-core's distributed optimizer cannot load, of any model."""
    import without_cuda
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    names = ("state_dict", "_set_main_param_and_optimizer_states")
    kept = {name: getattr(DistributedOptimizer, name) for name in names}
    without_cuda.let_torch_adam_load()
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(DistributedOptimizer, name, method)


def _of_megatron(config, distributed: bool):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from elas.model.counting import count_steps
    from elas.model.provider import make_model_provider

    model = make_model_provider(config)()
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
    wrapped = DistributedDataParallel(model.config, ddp, model)
    bf16 = config.train.dtype == "bfloat16"
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.optimizer.lr,
        adam_beta2=config.optimizer.beta2,
        clip_grad=config.optimizer.clip_grad,
        weight_decay=0.0,  # the checkpoint's groups say another
        use_distributed_optimizer=distributed,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    optimizer = get_megatron_optimizer(settings, [wrapped], use_gloo_process_groups=False)
    if config.sparsity.dense_steps:
        count_steps(wrapped, optimizer)
    return wrapped, optimizer


def _state(wrapped, optimizer, metadata: dict, loading: bool) -> dict:
    """As `generate_state_dict` of Megatron-LM."""
    from megatron.core import parallel_state as mpu

    metadata = {**metadata, "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    state = {"checkpoint_version": 3.0, "model": wrapped.module.sharded_state_dict(metadata=metadata)}
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=loading, metadata=metadata)
    return state


def _load(wrapped, optimizer, distributed: bool, folder: str) -> int:
    from megatron.core import dist_checkpointing

    metadata = dist_checkpointing.load_content_metadata(folder)
    if not distributed:
        del metadata["distrib_optim_sharding_type"]
    loaded = dist_checkpointing.load(_state(wrapped, optimizer, metadata, loading=True), folder)
    wrapped.module.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    return loaded["iteration"]


def _save(wrapped, optimizer, distributed: bool, folder: str, config) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if distributed:
        metadata["distrib_optim_sharding_type"] = "fully_reshardable"
    if torch.distributed.get_rank() == 0:
        Path(folder).mkdir(parents=True)
    torch.distributed.barrier()
    state = _state(wrapped, optimizer, metadata, loading=False)
    state["iteration"] = SECOND
    state["args"] = _arguments(config)
    one_thread = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(state, folder, sharded_strategy=one_thread, content_metadata=metadata)


def _arguments(config) -> argparse.Namespace:
    """What Megatron-LM saves of its arguments, as far as its checkpoints are compared by them."""
    model, low_rank = config.model, config.low_rank
    return argparse.Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        layernorm_epsilon=model.norm_eps,
        layernorm_zero_centered_gamma=False,
        rotary_percent=1.0,
        swiglu=model.activation == "swiglu",
        squared_relu=model.activation == "relu2",
        bf16=config.train.dtype == "bfloat16",
        untie_embeddings_and_output_weights=not model.tie_embeddings,
        low_rank_kind=low_rank.kind,
        low_rank_rank=low_rank.rank,
        low_rank_activation=low_rank.activation,
        sparsity_24=config.sparsity.kind == "2:4",
        dense_steps=config.sparsity.dense_steps,
        sparsity_method="magnitude",
        sparsity_gradient="masked",
        sparsity_backward="dense",
        sparsity_ffn_memory="fused",
        sparsity_scale=1.0,
        sparsity_implementation="auto",
        consumed_train_samples=SECOND * config.train.global_batch_size,
        tensor_model_parallel_size=1,
        world_size=2,
    )


def _train(wrapped, optimizer, config, step: int) -> float:
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import finalize_model_grads
    from small import loss_of

    wrapped.zero_grad_buffer()
    optimizer.zero_grad()
    sample = tokens(step)[mpu.get_data_parallel_rank() :: 2]
    loss = loss_of(wrapped, sample[:, :-1], sample[:, 1:])
    loss.backward()
    finalize_model_grads([wrapped])
    optimizer.step()
    mean = loss.detach().clone()
    torch.distributed.all_reduce(mean)
    return float(mean) / 2


def _different(model, optimizer, folder: str, distributed: bool) -> list[str]:
    """Tensors of our checkpoint that are not, to the last bit, what Megatron's model and optimizer hold."""
    from elas.checkpoint import storage

    wrong, steps = [], set()
    inner = optimizer.chained_optimizers[0]
    for name, parameter in model.named_parameters():
        kinds = ("weight",) if distributed else ("weight", *MOMENTS)  # the distributed optimizer holds flat parts
        read = {f"{kind}.{name}": torch.zeros(parameter.shape) for kind in kinds}
        storage.read(Path(folder), read)
        main = getattr(parameter, "main_param", parameter)  # fp32, in bf16 training
        if distributed or main is None:
            main = parameter
        held = {"weight": main.data.float()}
        if not distributed:
            state = inner.optimizer.state[main]
            held |= {moment: state[moment] for moment in MOMENTS}
            steps.add(int(state["step"]))
        wrong += [key for key, value in read.items() if not torch.equal(value, held[key.partition(".")[0]])]
    return wrong + [f"{number} steps" for number in steps if len(steps) > 1]
