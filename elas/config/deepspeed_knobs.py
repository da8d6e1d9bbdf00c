"""Every knob of DeepSpeed's JSON: at which ZeRO stages it is supported, or why it is not.

ZeRO's knobs change the memory layout of gradients, master weights and moments, which checkpoints, LORO and the gradient
norm read directly. A knob is therefore supported only at stages where tests compare losses, gradient norms and
checkpoints with those of one process; any other use is an error of one line before the start. DeepSpeed's default value
and "auto" have no effect and are always accepted. `tests/unit/test_deepspeed_knobs.py` fails when a DeepSpeed release
reads a knob that is missing from these tables, or changes a default.
"""

from dataclasses import dataclass

from elas.errors import ConfigError

KEY = "parallel.deepspeed_config"


@dataclass(frozen=True)
class Knob:
    """Support of one knob.

    Args:
        default: DeepSpeed's default, which is always accepted.
        stages: ZeRO stages at which other values are supported.
        elsewhere: the effective value at the other stages, also accepted there.
        why: why the knob is supported nowhere.
        fix: what to do instead.
    """

    default: object
    stages: tuple[int, ...] = ()
    elsewhere: object = None
    why: str = ""
    fix: str = "remove it"


NVME = "works only with device nvme, which is not supported: checkpoints and LORO read the state in memory"
OWN_CHECKPOINTS = "concerns checkpoints in DeepSpeed's own format, which are not written here"
QUANTIZED = "changes the numbers: every layout must train the same model"
NO_ZERO_INIT = "concerns models built under deepspeed.zero.Init, which is not used here"
OLD_NAME = "is a name that DeepSpeed no longer accepts"
OWN_MODEL = "is not supported: models here have no such modules"

SUB_GROUP = 1_000_000_000
"""Weights of a rank that ZeRO 3 steps at a time."""

ZERO = {
    "stage": Knob(0, (0, 1, 2, 3)),
    # How gradients are summed over the data-parallel ranks.
    "contiguous_gradients": Knob(True, (1, 2, 3)),
    "reduce_scatter": Knob(True, (1, 2, 3)),
    "reduce_bucket_size": Knob(500_000_000, (1, 2, 3)),
    "use_multi_rank_bucket_allreduce": Knob(True, (1, 2)),
    "allgather_partitions": Knob(True, why="is read by no stage of this DeepSpeed"),
    "allgather_bucket_size": Knob(500_000_000, (1, 2)),
    "overlap_comm": Knob(None, (2, 3), False),  # gradients of ZeRO 0 and 1 are reduced after Megatron's schedule
    "ignore_unused_parameters": Knob(True, (2,)),
    "compute_grad_norm": Knob(True, why="must be true: the gradient norm is logged, clips, and guards each step"),
    # Memory layout of fp32 master weights and moments, which `elas.engine.zero` reads.
    "round_robin_gradients": Knob(False, (1, 2)),
    "parameter_alignment": Knob(False, (1, 2)),
    "sub_group_size": Knob(SUB_GROUP, (3,)),
    "offload_optimizer": Knob(None, (1, 2, 3)),
    "offload_param": Knob(None, (3,)),
    "legacy_stage1": Knob(False, why="was removed from DeepSpeed"),
    "zenflow": Knob(None, why="updates parts of the weights late: every layout must train the same model"),
    # How ZeRO 3 gathers weights.
    "stage3_prefetch_bucket_size": Knob(50_000_000, (3,)),
    "stage3_param_persistence_threshold": Knob(100_000, (3,)),
    "stage3_model_persistence_threshold": Knob(9_223_372_036_854_775_807, (3,)),
    "stage3_max_live_parameters": Knob(1_000_000_000, (3,)),
    "stage3_max_reuse_distance": Knob(1_000_000_000, (3,)),
    "stage3_module_granularity_threshold": Knob(0, (3,)),
    "stage3_use_all_reduce_for_fetch_params": Knob(False, (3,)),
    "stage3_allgather_sequential": Knob(False, (3,)),
    "enable_sanity_checks": Knob(False, (3,)),
    "log_trace_cache_warnings": Knob(False, (3,)),
    "leaf_module": Knob({}, why=OWN_MODEL),
    "zero_hpz_partition_size": Knob(1, why="groups neighbouring ranks, which tensor parallelism already uses"),
    "zero_quantized_weights": Knob(False, why=QUANTIZED),
    "zero_quantized_nontrainable_weights": Knob(False, why=QUANTIZED),
    "zero_quantized_gradients": Knob(False, why=QUANTIZED),
    "memory_efficient_linear": Knob(True, why=NO_ZERO_INIT),
    "override_module_apply": Knob(True, why=NO_ZERO_INIT),
    "save_muon_momentum_buffer_in_memory": Knob(False, why="belongs to Muon", fix="remove it; see optimizer.kind"),
    # DeepSpeed's checkpoints.
    "load_from_fp32_weights": Knob(True, why=OWN_CHECKPOINTS),
    "elastic_checkpoint": Knob(False, why=OWN_CHECKPOINTS),
    "pipeline_loading_checkpoint": Knob(False, why=OWN_CHECKPOINTS),
    "stage3_gather_16bit_weights_on_model_save": Knob(False, why=OWN_CHECKPOINTS),
    # Old names.
    "cpu_offload": Knob(None, why=OLD_NAME, fix='write "offload_optimizer": {"device": "cpu"}'),
    "cpu_offload_param": Knob(None, why=OLD_NAME, fix='write "offload_param": {"device": "cpu"}'),
    "cpu_offload_use_pin_memory": Knob(None, why=OLD_NAME, fix="write pin_memory into offload_optimizer"),
    "stage3_gather_fp16_weights_on_model_save": Knob(False, why=OLD_NAME),
}

OFFLOAD_OPTIMIZER = {
    "device": Knob("none", (1, 2, 3)),
    "pin_memory": Knob(True, (1, 2, 3)),
    "ratio": Knob(1.0, why="requires DeepSpeed's own optimizer class; here it is a subclass with a guard"),
    "super_offload": Knob(False, why="is for Superchips, and untested here"),
    "cpuadam_cores_perc": Knob(0.8, why="works only with super_offload, which is not supported"),
    "nvme_path": Knob(None, why=NVME),
    "buffer_count": Knob(4, why=NVME),
    "pipeline_read": Knob(False, why=NVME),
    "pipeline_write": Knob(False, why=NVME),
    "fast_init": Knob(False, why=NVME),
}

OFFLOAD_PARAM = {
    "device": Knob("none", (3,)),
    "pin_memory": Knob(True, (3,)),
    "nvme_path": Knob(None, why=NVME),
    "buffer_count": Knob(5, why=NVME),
    "buffer_size": Knob(100_000_000, why=NVME),
    "max_in_cpu": Knob(1_000_000_000, why=NVME),
}

OURS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "optimizer.clip_grad",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
    "bf16": "train.dtype",
    "bfloat16": "train.dtype",
    "fp16": "train.dtype",
    "torch_autocast": "train.dtype",
    "data_types": "train.dtype (gradients are summed in fp32 already)",
    "tensor_parallel": "parallel.tensor",
    "sequence_parallel_size": "parallel.sequence",
    "pipeline": "parallel.pipeline",
    "steps_per_print": "log.every_steps",
    "checkpoint": "checkpoint.*",
}

SCALING = "is for fp16's narrow range; gradients here are summed in fp32 and divided after the sum"
LOGGING = "writes to DeepSpeed's log, which is not shown"
MONITOR = "would log beside metrics.jsonl and disagree with it"
REMOVED = "was removed from DeepSpeed"
DATA = "is not read: batches come from data.*"

TOP_LEVEL = {
    "zero_optimization": Knob(None, (0, 1, 2, 3)),
    "communication_data_type": Knob(None, (1, 2, 3), "fp32"),
    # These two concern DeepSpeed's own checks of optimizers; ELAS's optimizers are tested at every stage.
    "zero_allow_untested_optimizer": Knob(True, why="must be true: the optimizers are ours, and tested"),
    "zero_force_ds_cpu_optimizer": Knob(True, why="must be true: offloading uses DeepSpeed's CPU Adam"),
    "prescale_gradients": Knob(False, why=SCALING),
    "gradient_predivide_factor": Knob(1.0, why=SCALING),
    "gradient_allreduce_op": Knob("mean", why="must be mean: the loss is a mean over all ranks"),
    "managed_gradient_accumulation": Knob(True, why="must be true: the loop counts micro-batches that way"),
    "seq_parallel_communication_data_type": Knob("fp32", why="belongs to DeepSpeed's Ulysses", fix="remove it"),
    "disable_allgather": Knob(False, why="is read by no stage of this DeepSpeed"),
    "dump_state": Knob(False, why=LOGGING),
    "wall_clock_breakdown": Knob(False, why=LOGGING, fix="remove it; `elas bench step` times the parts of a step"),
    "memory_breakdown": Knob(False, why=LOGGING),
    "log_level": Knob(None, why="is set to warnings here"),
    "timers": Knob({}, why=LOGGING),
    "flops_profiler": Knob({}, why=LOGGING, fix="remove it; `elas bench step` measures"),
    "comms_logger": Knob({}, why=LOGGING, fix="remove it; `elas bench comm` measures"),
    "tensorboard": Knob({}, why=MONITOR),
    "wandb": Knob({}, why=MONITOR),
    "csv_monitor": Knob({}, why=MONITOR),
    "comet": Knob({}, why=MONITOR),
    "activation_checkpointing": Knob({}, why="reaches none of Megatron's layers"),
    "compile": Knob({}, why="is untested under Megatron's schedules"),
    "autotuning": Knob({}, why="starts jobs of its own", fix="remove it; see elas launch --sweep"),
    "aio": Knob({}, why=NVME),
    "expert_parallel": Knob({}, why=OWN_MODEL),
    "use_data_before_expert_parallelism": Knob(False, why=OWN_MODEL),
    "hybrid_engine": Knob({}, why="is for RLHF"),
    "weight_quantization": Knob(None, why=QUANTIZED),
    "data_efficiency": Knob({}, why=DATA),
    "dataloader_drop_last": Knob(False, why=DATA),
    "datastates_ckpt": Knob({}, why=OWN_CHECKPOINTS),
    "disable_python_gc": Knob(False, why="would stop Python's garbage collector for the whole run"),
    "vocabulary_size": Knob(None, why="is ignored", fix="remove it and set model.vocab_size"),
    "sparse_gradients": Knob(False, why=REMOVED),
}


def supported_knobs(source: str, values: dict) -> dict:
    """Reject unsupported knobs, and drop those that have no effect.

    Args:
        source: the JSON's path, for messages.
        values: its top level; `zero_optimization`, if present, must be an object with an integer stage.

    Returns:
        The values to pass to DeepSpeed.

    Raises:
        ConfigError: names the first knob that is not supported at this stage.
    """
    zero = values.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    values = _supported(source, "", TOP_LEVEL, values, stage)
    communication = values.get("communication_data_type", "fp32")
    if communication not in ("bf16", "fp32"):
        raise ConfigError(KEY, source, f"communication_data_type is {communication!r}", "give fp32 or bf16")
    zero = _supported(source, "zero_optimization.", ZERO, zero, stage)
    for name, table in (("offload_optimizer", OFFLOAD_OPTIMIZER), ("offload_param", OFFLOAD_PARAM)):
        if isinstance(zero.get(name), dict):
            prefix = f"zero_optimization.{name}."
            device = zero[name].get("device", "none")
            if device not in ("none", "cpu"):
                raise ConfigError(KEY, source, f"{prefix}device is {device!r}", "give cpu or none")
            zero[name] = _supported(source, prefix, table, zero[name], stage)
    return {**values, "zero_optimization": zero | {"stage": stage}}


def _supported(source: str, prefix: str, table: dict[str, Knob], values: dict, stage: int) -> dict:
    supported = {}
    for given, value in values.items():
        name = given if given in table else f"stage3_{given}"  # DeepSpeed accepts some without this prefix
        knob = table.get(name)
        if name in supported:
            raise ConfigError(KEY, source, f"sets {prefix}{name} under two names", "remove one")
        if knob is None:
            supported[given] = value  # unknown: DeepSpeed raises for it
        elif value is None or value == "auto":
            continue
        elif stage in knob.stages:
            supported[name] = value
        elif value in (knob.default, knob.elsewhere) or _is_off(value):
            continue
        elif knob.stages:
            stages = " and ".join(map(str, knob.stages))
            why = f"{prefix}{name} has no effect at ZeRO {stage}"
            raise ConfigError(KEY, source, why, f"remove it (it is for ZeRO {stages})")
        else:
            raise ConfigError(KEY, source, f"{prefix}{name}={value!r} {knob.why}", knob.fix)
    return supported


def _is_off(value: object) -> bool:
    """Whether a nested object is empty or switched off."""
    return isinstance(value, dict) and (not value or value.get("device") == "none" or value.get("enabled") is False)
