"""Builds the configuration for `deepspeed.initialize` from the user's DeepSpeed JSON and our own settings."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from elas.config import Config
from elas.config.deepspeed import read_deepspeed_json, zero_stage
from elas.config.deepspeed_knobs import KEY, SUB_GROUP
from elas.errors import ConfigError

if TYPE_CHECKING:
    import torch


def check_deepspeed_json(config: Config) -> None:
    """Validate the user's DeepSpeed JSON with DeepSpeed's own model, before any process group exists.

    Imports DeepSpeed.

    Raises:
        ConfigError: DeepSpeed has no such option, or rejects its value.
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
        why = f"DeepSpeed rejects {name}: {first['msg']}"
        raise ConfigError(KEY, config.parallel.deepspeed_config, why, "fix or remove it") from None


def deepspeed_config(config: Config, *, micro_batches: int, dp: int) -> dict:
    """The whole configuration for `deepspeed.initialize`.

    Args:
        config: our configuration, validated.
        micro_batches: micro-batches over which DeepSpeed itself accumulates; 1 if Megatron's schedule does that.
        dp: number of data-parallel ranks.

    Returns:
        A dict. At ZeRO 0 it disables clipping, which `elas.engine.engine` does instead: DeepSpeed would not use the
        whole model's norm there.
    """
    values = read_deepspeed_json(config)
    stage = zero_stage(values)
    if config.parallel.pipeline > 1 or stage <= 1:
        # Gradients are reduced once, after Megatron's schedule; overlapping hooks would reduce every micro-batch.
        values.setdefault("zero_optimization", {})["overlap_comm"] = False
    if dp == 1:
        # No communication happens: casting gradients to its type and back would only cost time.
        values.pop("communication_data_type", None)
    bf16 = config.train.dtype == "bfloat16"
    if bf16 and stage >= 2:
        # ZeRO's partitions accumulate micro-batches; a bf16 sum drops addends 256 times smaller than itself.
        # (For ZeRO 0 and 1, `elas.engine.grads.Fp32Accumulation` accumulates outside of DeepSpeed.)
        values["data_types"] = {"grad_accum_dtype": "fp32"}
    return {
        **values,
        "steps_per_print": 2**31 - 1,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": config.train.micro_batch_size * micro_batches * dp,
        "gradient_clipping": 0.0 if stage == 0 else config.optimizer.clip_grad,
        # Skips a pass over all gradients that looks for infinities: the loop checks the norm instead.
        "bf16": {"enabled": bf16, "check_grad_overflow": False},
    }


def fit_buckets(settings: dict, chunks: "Sequence[torch.nn.Module]") -> None:
    """Limit the reduction bucket to the model's size, since DeepSpeed allocates it in full."""
    zero = settings.get("zero_optimization", {})
    parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    if type(zero.get("reduce_bucket_size")) is int:
        zero["reduce_bucket_size"] = max(1, min(zero["reduce_bucket_size"], parameters))


def fit_sub_groups(settings: dict, chunks: "Sequence[torch.nn.Module]", config: Config, dp: int) -> None:
    """With Spectron's steps, make a rank's weights one sub-group of ZeRO 3, unless the JSON says how large one is.

    They need both factors of a pair at once, and DeepSpeed takes one sub-group after the other.
    """
    zero = settings.get("zero_optimization", {})
    if config.optimizer.normalize == "spectron" and zero.get("stage") == 3 and "sub_group_size" not in zero:
        share = sum(-(-p.numel() // dp) for chunk in chunks for p in chunk.parameters())
        zero["sub_group_size"] = max(SUB_GROUP, share)


def _is_news(record: logging.LogRecord) -> bool:
    """Filter out DeepSpeed's warning about untested optimizers: ours are tested at every ZeRO stage."""
    return "untested optimizer" not in record.getMessage()


def quiet_deepspeed() -> None:
    """Reduce DeepSpeed's log to warnings; at INFO it logs its whole configuration on every start."""
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_news)
    for handler in logger.handlers:
        handler.setLevel(logging.WARNING)
