"""DeepSpeed's configuration: the user's JSON for DeepSpeed's own knobs, plus what follows from ours.

A `ds_configs/zeroN.json` says how ZeRO works (stage, buckets, overlap, offload). Batch sizes, dtype, clipping,
optimizer and schedule are ours to say, once; a JSON that says them too is refused, so that two sources can never
disagree. Of DeepSpeed's own knobs `elas.train.deepspeed_knobs` lists those that are served.
"""

import json
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

from elas.config import Config
from elas.errors import ConfigError
from elas.train.deepspeed_knobs import KEY, OURS, TOP_LEVEL, served_knobs


def read_deepspeed_json(config: Config) -> dict:
    """The user's DeepSpeed JSON, or the shipped one for `parallel.zero`.

    Raises:
        ConfigError: unreadable, or it says what our configuration says.
    """
    source = config.parallel.deepspeed_config
    if source is None:
        stage = 1 if config.parallel.zero is None else config.parallel.zero
        return json.loads((resources.files("elas.ds_configs") / f"zero{stage}.json").read_text())
    try:
        values = json.loads(Path(source).read_text(encoding="utf-8"), object_pairs_hook=_once)
    except OSError as error:
        raise ConfigError(KEY, source, error.strerror or "cannot be read", "give a DeepSpeed JSON") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(KEY, source, f"is not JSON ({error})", "fix the file") from None
    if not isinstance(values, dict):
        raise ConfigError(KEY, source, "does not hold an object", "give a DeepSpeed JSON")
    zero = values.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(KEY, source, "zero_optimization is no object", 'write {"zero_optimization": {"stage": 1}}')
    if type(zero.get("stage", 0)) is not int:
        raise ConfigError(KEY, source, f"zero_optimization.stage is {zero['stage']!r}", "give 0, 1, 2 or 3")
    if zero.get("stage", 0) not in range(4):
        raise ConfigError(KEY, source, f"ZeRO stage {zero['stage']}", "use 0 to 3")
    for name in values:
        if name in OURS:
            raise ConfigError(KEY, source, f"sets {name}", f"remove it there and set {OURS[name]}")
        if name not in TOP_LEVEL:
            near = get_close_matches(name, TOP_LEVEL, n=1)
            fix = f"did you mean {near[0]}?" if near else "remove it"
            raise ConfigError(KEY, source, f"sets {name}, which is no knob of DeepSpeed's that works here", fix)
    return served_knobs(source, values)


def _once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object whose names are all different."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is given twice")
    return values


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

    values = read_deepspeed_json(config)
    try:
        DeepSpeedZeroConfig(**values.get("zero_optimization", {}))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(["zero_optimization", *map(str, first["loc"])])
        why = f"DeepSpeed refuses {name}: {first['msg']}"
        raise ConfigError(KEY, config.parallel.deepspeed_config, why, "fix or remove it") from None


def deepspeed_config(config: Config, *, micro_batches: int, dp: int) -> dict:
    """The whole configuration for `deepspeed.initialize`.

    Args:
        config: ours, validated.
        micro_batches: micro-batches that DeepSpeed itself accumulates over: 1 where Megatron's schedule does it.
        dp: data-parallel ranks.

    Returns:
        A dict. At ZeRO 0 clipping is left to `elas.train.engine`: DeepSpeed does not clip by the model's norm there.
    """
    values = read_deepspeed_json(config)
    stage = zero_stage(values)
    if config.parallel.pipeline > 1 or stage <= 1:
        # Gradients are reduced once, after Megatron's schedule; hooks that reduce earlier would reduce too often.
        values.setdefault("zero_optimization", {})["overlap_comm"] = False
    if dp == 1:
        # Nobody to send gradients to: casting them to the type of communication and back would only cost time.
        values.pop("communication_data_type", None)
    bf16 = config.train.dtype == "bfloat16"
    if bf16 and stage >= 2:
        # ZeRO's partitions sum up micro-batches; in bf16 they would lose what is 256 times smaller than the sum.
        # (ZeRO 0 and 1 sum outside of DeepSpeed, in `elas.train.grads.Fp32Accumulation`.)
        values["data_types"] = {"grad_accum_dtype": "fp32"}
    return {
        **values,
        "steps_per_print": 2**31 - 1,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": config.train.micro_batch_size * micro_batches * dp,
        "gradient_clipping": 0.0 if stage == 0 else config.optimizer.clip_grad,
        # No pass over all gradients to look for infinities: the loop ends a run whose norm is not finite.
        "bf16": {"enabled": bf16, "check_grad_overflow": False},
    }
