"""DeepSpeed's configuration: the user's JSON for DeepSpeed's own knobs, plus what follows from ours.

A `ds_configs/zeroN.json` says how ZeRO works (stage, buckets, overlap, offload). Batch sizes, dtype, clipping,
optimizer and schedule are ours to say, once; a JSON that says them too is refused, so that two sources can never
disagree.
"""

import json
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

from elas.config import Config
from elas.errors import ConfigError

OURS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "optimizer.clip_grad",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
    "bf16": "train.dtype",
    "fp16": "train.dtype",
    "data_types": "train.dtype (gradients are summed in fp32 already)",
    "tensor_parallel": "parallel.tensor",
    "sequence_parallel_size": "parallel.sequence",
    "pipeline": "parallel.pipeline",
}
PASSED_ON = {
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "aio",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "prescale_gradients",
    "gradient_predivide_factor", "sparse_gradients", "communication_data_type", "disable_allgather", "comms_logger",
    "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet", "activation_checkpointing", "timers",
}  # fmt: skip


def read_deepspeed_json(config: Config) -> dict:
    """The user's DeepSpeed JSON, or the shipped one for `parallel.zero`.

    Raises:
        ConfigError: unreadable, or it says what our configuration says.
    """
    source = config.parallel.deepspeed_config
    if source is None:
        stage = 1 if config.parallel.zero is None else config.parallel.zero
        return json.loads((resources.files("elas.ds_configs") / f"zero{stage}.json").read_text())
    key = "parallel.deepspeed_config"
    try:
        values = json.loads(Path(source).read_text(encoding="utf-8"), object_pairs_hook=_once)
    except OSError as error:
        raise ConfigError(key, source, error.strerror or "cannot be read", "give a DeepSpeed JSON") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(key, source, f"is not JSON ({error})", "mend the file") from None
    if not isinstance(values, dict):
        raise ConfigError(key, source, "does not hold an object", "give a DeepSpeed JSON")
    zero = values.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(key, source, "zero_optimization is no object", 'write {"zero_optimization": {"stage": 1}}')
    if type(zero.get("stage", 0)) is not int:
        raise ConfigError(key, source, f"zero_optimization.stage is {zero['stage']!r}", "give 0, 1, 2 or 3")
    for name in values:
        if name in OURS:
            raise ConfigError(key, source, f"sets {name}", f"remove it there and set {OURS[name]}")
        if name not in PASSED_ON:
            near = get_close_matches(name, PASSED_ON, n=1)
            fix = f"did you mean {near[0]}?" if near else "remove it"
            raise ConfigError(key, source, f"sets {name}, which is no knob of DeepSpeed's that works here", fix)
    communication = values.get("communication_data_type")
    if communication not in (None, "fp16", "bf16", "fp32"):
        raise ConfigError(key, source, f"communication_data_type is {communication!r}", "give fp32, bf16 or fp16")
    for name in ("wall_clock_breakdown", "memory_breakdown", "dump_state", "prescale_gradients", "sparse_gradients"):
        if not isinstance(values.get(name, False), bool):
            raise ConfigError(key, source, f"{name} is {values[name]!r}", "give true or false")
    _check_offload(source, zero)
    return values


def _once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object whose names are all different."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is given twice")
    return values


def _check_offload(source: str, zero: dict) -> None:
    for what in ("offload_optimizer", "offload_param"):
        offload = zero.get(what)
        if not isinstance(offload, dict):
            continue
        device = offload.get("device", "none")
        name = f"zero_optimization.{what}"
        if device not in ("none", "cpu", "nvme"):
            raise ConfigError("parallel.deepspeed_config", source, f"{name}.device is {device!r}", "give cpu or nvme")
        if device == "nvme" and not offload.get("nvme_path"):
            raise ConfigError("parallel.deepspeed_config", source, f"{name} has no nvme_path", "give a folder")


def choose_zero_stage(config: Config, world_size: int) -> None:
    """Settle `parallel.zero` where neither it nor a DeepSpeed JSON says it: 1, or 0 with one data-parallel rank.

    There is nothing to partition over one rank, and ZeRO 1's flat copies would cost a third of a step's time.
    """
    parallel = config.parallel
    if parallel.zero is None and parallel.deepspeed_config is None:
        parallel.zero = 0 if world_size <= parallel.tensor * parallel.pipeline else 1


def zero_stage(values: dict) -> int:
    """ZeRO stage that a DeepSpeed JSON asks for."""
    return values.get("zero_optimization", {}).get("stage", 0)


def offloads_optimizer(values: dict) -> bool:
    """Whether optimizer state goes to the CPU."""
    offload = values.get("zero_optimization", {}).get("offload_optimizer") or {}
    return isinstance(offload, dict) and offload.get("device", "none") != "none"


def check_deepspeed_json(config: Config) -> None:
    """Let DeepSpeed check its own knobs, before any process group exists (imports DeepSpeed).

    Raises:
        ConfigError: a knob that DeepSpeed does not have, or a value that it does not take.
    """
    if config.parallel.deepspeed_config is None:
        return
    from elas import host

    host.prepare()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    values, key = read_deepspeed_json(config), "parallel.deepspeed_config"
    try:
        DeepSpeedZeroConfig(**values.get("zero_optimization", {}))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(["zero_optimization", *map(str, first["loc"])])
        why = f"DeepSpeed refuses {name}: {first['msg']}"
        raise ConfigError(key, config.parallel.deepspeed_config, why, "mend or remove it") from None


def deepspeed_config(config: Config, *, micro_batches: int, dp: int) -> dict:
    """The whole configuration for `deepspeed.initialize`.

    Args:
        config: ours, validated.
        micro_batches: micro-batches that DeepSpeed itself accumulates over: 1 where Megatron's schedule does it.
        dp: data-parallel ranks.

    Returns:
        A dict. At ZeRO 0 in fp32 clipping is left to `elas.train.engine`: DeepSpeed would not tell the norm.
    """
    values = read_deepspeed_json(config)
    stage = zero_stage(values)
    if config.parallel.pipeline > 1 or stage <= 1:
        # Gradients are reduced once, after Megatron's schedule; hooks that reduce earlier would reduce too often.
        values.setdefault("zero_optimization", {})["overlap_comm"] = False
    if dp == 1:
        # Nobody to send gradients to: casting them to the type of communication and back would only cost time.
        values.pop("communication_data_type", None)
    return {
        "steps_per_print": 2**31 - 1,
        "zero_allow_untested_optimizer": True,
        **values,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": config.train.micro_batch_size * micro_batches * dp,
        "gradient_clipping": 0.0 if stage == 0 and config.train.dtype == "float32" else config.optimizer.clip_grad,
        # No pass over all gradients to look for infinities: the loop ends a run whose norm is not finite.
        "bf16": {"enabled": config.train.dtype == "bfloat16", "check_grad_overflow": False},
    }
