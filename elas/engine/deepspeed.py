"""DeepSpeed's configuration as `deepspeed.initialize` takes it: the user's knobs, and what follows from ours."""

from elas.config import Config
from elas.config.deepspeed import read_deepspeed_json, zero_stage
from elas.config.deepspeed_knobs import KEY
from elas.errors import ConfigError


def check_deepspeed_json(config: Config) -> None:
    """Let DeepSpeed check its own knobs, before any process group exists (imports DeepSpeed).

    Raises:
        ConfigError: a knob that DeepSpeed does not have, or a value that it does not take.
    """
    if config.parallel.deepspeed_config is None:
        return
    from elas import accelerator

    accelerator.prepare()
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
        A dict. At ZeRO 0 clipping is left to `elas.engine.engine`: DeepSpeed does not clip by the model's norm there.
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
        # (ZeRO 0 and 1 sum outside of DeepSpeed, in `elas.engine.grads.Fp32Accumulation`.)
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
