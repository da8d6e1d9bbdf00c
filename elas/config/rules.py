"""Validate combinations of settings before any process group exists.

Every rule raises a `ConfigError` with key, value and fix. Rules are small functions, called in the order in which a
user would fix things: schedule and optimizer, shape, low rank, sparsity, parallelism, ZeRO, batches, run folder.
"""

import math
import os
from pathlib import Path

from elas.config import KEYS, Config, ffn_width
from elas.config.deepspeed import offloads_optimizer, read_deepspeed_json, zero_stage
from elas.config.kinds import LARGEST, Range, range_of
from elas.config.pruning import check_split
from elas.config.schema import OWN_SETTINGS, SPARSITY_KEYS, OptimizerConfig, field_type
from elas.errors import ConfigError

MOST_SAMPLES = 10**10  # the order of a run's samples is an array in memory


def validate(config: Config, world_size: int | None) -> None:
    """Check a configuration for consistency, also with the number of ranks.

    `elas.data.corpus.check_corpus` checks the data files.

    Args:
        config: typed configuration.
        world_size: number of ranks; None checks only what holds for any number.

    Raises:
        ConfigError: the first rule violated.
    """
    check_ranges(config)
    if world_size is not None:
        _layout(config, world_size)  # first, because other sizes may be valid with another number of ranks
    for rule in (
        _schedule,
        _optimizer,
        _shape,
        _low_rank,
        _sparsity,
        _parallel,
        _zero,
        _batches,
        _export,
        _log,
        _run_dir,
    ):
        rule(config)
    if world_size is not None:
        _global_batch(config, world_size)


def validate_layout(config: Config, world_size: int) -> None:
    """Check only whether the model splits over the ranks of a layout, for work on its checkpoints outside of training.

    Raises:
        ConfigError: the first rule violated.
    """
    check_ranges(config)
    _layout(config, world_size)
    for rule in (_shape, _sparsity, _parallel):
        rule(config)


def check_ranges(config: Config) -> None:
    """Raise `ConfigError` for a number outside the range annotated on its field."""
    for key in KEYS:  # in the order of the schema
        section, name = key.split(".")
        value, allowed = getattr(getattr(config, section), name), range_of(field_type(key))
        if not isinstance(allowed, Range) or value is None or allowed.holds(value):
            continue
        if not math.isfinite(value):
            raise ConfigError(key, value, "is not finite", "give a finite number")
        if value > LARGEST and allowed.most is None and allowed.below is None:
            raise ConfigError(key, value, "too large", f"give at most {LARGEST}")
        raise ConfigError(key, value, "out of range", f"give {allowed}")


def _schedule(config: Config) -> None:
    schedule, steps = config.schedule, config.train.steps
    samples = steps * config.train.global_batch_size
    if samples > MOST_SAMPLES:
        why = f"makes {samples:.1e} samples with train.global_batch_size={config.train.global_batch_size}"
        fix = f"give {MOST_SAMPLES // config.train.global_batch_size} or fewer"
        raise ConfigError("train.steps", steps, why, fix)
    optimizer = config.optimizer
    if schedule.kind == "cosine_restart":
        if optimizer.kind != "loro" or optimizer.refresh == "none" or optimizer.exact_every is None:
            why = "restarts after refreshes, and there are none"
            fix = "set optimizer.kind to loro, with exact_every and a refresh, or schedule.kind to cosine"
            raise ConfigError("schedule.kind", "cosine_restart", why, fix)
        if optimizer.exact_every >= steps:
            why = f"the restart cycle is longer than the run (train.steps={steps})"
            raise ConfigError("optimizer.exact_every", optimizer.exact_every, why, f"give less than {steps}")
    if schedule.decay_steps is not None and schedule.decay_steps > steps:
        fix = f"give {steps} or fewer, or null"
        raise ConfigError("schedule.decay_steps", schedule.decay_steps, f"longer than train.steps={steps}", fix)


def _optimizer(config: Config) -> None:
    optimizer, kind = config.optimizer, config.low_rank.kind
    for of, names in OWN_SETTINGS.items():
        for name in names:
            value, default = getattr(optimizer, name), getattr(OptimizerConfig, name)
            if optimizer.kind != of and value != default:
                why = f"is of {of} alone, and optimizer.kind is {optimizer.kind}"
                fix = f"leave it out, or set it to {'null' if default is None else default}"
                raise ConfigError(f"optimizer.{name}", value, why, fix)
    rate = max(optimizer.lr, optimizer.lr_other or 0)
    if optimizer.weight_decay * rate >= 1:  # a step multiplies weights by 1 - rate * decay
        why = f"times a learning rate of {rate:g} is not below 1, so a step would take whole weights away"
        raise ConfigError("optimizer.weight_decay", optimizer.weight_decay, why, f"give less than {1 / rate:g}")
    if optimizer.kind != "adamw" and offloads_optimizer(read_deepspeed_json(config)):
        fix = "remove offload_optimizer from the DeepSpeed JSON, or set optimizer.kind to adamw, with a rate of its own"
        raise ConfigError("optimizer.kind", optimizer.kind, "its state cannot be offloaded", fix)
    if optimizer.kind != "loro":
        return
    if kind != "lowrank":
        why = "steps on the manifold of low-rank matrices, " + (
            "but the model is full rank" if kind == "none" else "but CoLA has a non-linearity between its factors"
        )
        raise ConfigError("optimizer.kind", "loro", why, "set low_rank.kind to lowrank, or optimizer.kind to adamw")
    if optimizer.exact_every is None and optimizer.refresh != "none":
        fix = "give optimizer.exact_every, or set optimizer.refresh to none"
        raise ConfigError("optimizer.refresh", optimizer.refresh, "requires optimizer.exact_every", fix)


def _shape(config: Config) -> None:
    model, tp = config.model, config.parallel.tensor
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    if model.hidden_size % heads or (model.hidden_size // heads) % 2:
        why = f"does not split into {heads} heads of an even width (model.num_attention_heads)"
        raise ConfigError("model.hidden_size", model.hidden_size, why, f"give a multiple of {2 * heads}")
    if groups < 1 or heads % groups:
        fix = f"give a divisor of model.num_attention_heads={heads}"
        raise ConfigError("model.num_query_groups", groups, "does not divide the heads", fix)
    if heads % tp:
        why = f"does not split over parallel.tensor={tp} ranks"
        raise ConfigError("model.num_attention_heads", heads, why, f"give a multiple of {tp}, or fewer ranks")
    if groups % tp:
        why = f"does not split over parallel.tensor={tp} ranks"
        raise ConfigError("model.num_query_groups", groups, why, f"give a multiple of {tp}, or fewer ranks")
    if model.vocab_size % tp:
        why = f"does not split over parallel.tensor={tp} ranks"
        raise ConfigError(
            "model.vocab_size", model.vocab_size, why, f"round it up to {-(-model.vocab_size // tp) * tp}"
        )
    longest = model.max_position_embeddings
    if longest is not None and longest < model.seq_length:
        why = f"shorter than model.seq_length={model.seq_length}"
        raise ConfigError("model.max_position_embeddings", longest, why, f"give {model.seq_length} or more, or null")


def _low_rank(config: Config) -> None:
    if config.low_rank.kind == "none":
        if config.train.recompute == "bottleneck":
            why = "full rank has no bottleneck to compute from"
            raise ConfigError("train.recompute", "bottleneck", why, "use layer or none, or a low rank")
        return
    model, rank = config.model, config.low_rank.rank
    groups = model.num_query_groups or model.num_attention_heads
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size": ffn_width(config),
        "the key/value width": model.hidden_size // model.num_attention_heads * groups,
    }
    name, smallest = min(sizes.items(), key=lambda item: item[1])
    if rank > smallest:
        why = f"larger than the smallest dimension it factors ({name}, {smallest})"
        raise ConfigError("low_rank.rank", rank, why, f"give {smallest} or less")


def _sparsity(config: Config) -> None:
    width, tp = ffn_width(config), config.parallel.tensor
    key = "model.ffn_hidden_size"
    if width < 1 or width % tp:
        raise ConfigError(key, width, f"does not split over parallel.tensor={tp} ranks", f"give a multiple of {tp}")
    if config.sparsity.kind == "none":
        return
    between = config.low_rank.kind == "cola" and config.low_rank.activation == "relu2"
    if config.model.activation != "relu2" and not between:
        why = "2:4 sparsity requires a squared ReLU"
        raise ConfigError("model.activation", config.model.activation, why, "set it to relu2, or sparsity.kind to none")
    if config.model.activation == "relu2" and width % (4 * tp):
        why = (
            f"2:4 groups would straddle the {tp} tensor-parallel shards"
            if tp > 1
            else "does not split into groups of 4"
        )
        below, above = width // (4 * tp) * 4 * tp, -(-width // (4 * tp)) * 4 * tp
        raise ConfigError(key, width, why, f"give a multiple of {4 * tp}, such as {below or above} or {above}")
    sparsity = config.sparsity
    if sparsity.backward == "split":
        try:
            check_split(sparsity)
        except ConfigError as error:
            raise error.renamed(SPARSITY_KEYS) from None
        if between:
            why = "not supported between CoLA's factors"
            raise ConfigError("sparsity.backward", "split", why, "set it to dense, or low_rank.kind to lowrank")
    if between and config.low_rank.rank % 4:
        raise ConfigError(
            "low_rank.rank", config.low_rank.rank, "does not split into groups of 4", "give a multiple of 4"
        )


def _export(config: Config) -> None:
    if config.export.at_end == "dense" and config.low_rank.kind == "cola":
        why = "low_rank.kind=cola has a non-linearity between the factors, so there is no product"
        raise ConfigError("export.at_end", "dense", why, "set it to elas or none")


def _log(config: Config) -> None:
    trackers, project = config.log.trackers, config.log.project
    if len(set(trackers)) < len(trackers):
        raise ConfigError("log.trackers", trackers, "names a tracker twice", f"give {sorted(set(trackers))}")
    if "wandb" in trackers and (len(project) > 128 or set(project) & set("/\\#?%:")):
        fix = "give at most 128 characters, without / \\ # ? % :"
        raise ConfigError("log.project", project, "is not a project's name for wandb", fix)


def _parallel(config: Config) -> None:
    parallel, layers = config.parallel, config.model.num_layers
    if parallel.sequence and parallel.tensor == 1:
        fix = "set parallel.tensor above 1, or parallel.sequence to false"
        raise ConfigError("parallel.sequence", True, "requires tensor parallelism", fix)
    if parallel.sequence and config.model.seq_length % parallel.tensor:
        why = f"does not split over parallel.tensor={parallel.tensor} ranks of parallel.sequence"
        raise ConfigError("model.seq_length", config.model.seq_length, why, f"give a multiple of {parallel.tensor}")
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        fix = "set parallel.pipeline above 1, or parallel.virtual_pipeline to 1"
        raise ConfigError("parallel.virtual_pipeline", parallel.virtual_pipeline, "requires a pipeline", fix)
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if layers % chunks:
        stages = f"parallel.pipeline={parallel.pipeline}"
        if parallel.virtual_pipeline > 1:
            stages += f" × parallel.virtual_pipeline={parallel.virtual_pipeline}"
        raise ConfigError("model.num_layers", layers, f"does not split over {stages}", f"give a multiple of {chunks}")


def _zero(config: Config) -> None:
    stage = zero_stage(read_deepspeed_json(config))
    parallel = config.parallel
    if parallel.deepspeed_config is not None and parallel.zero not in (None, stage):
        why = f"{parallel.deepspeed_config} sets ZeRO {stage}"
        raise ConfigError("parallel.zero", parallel.zero, why, "remove one of the two")
    if stage >= 2 and parallel.pipeline > 1:
        why = f"not supported with parallel.pipeline={parallel.pipeline}: ZeRO {stage} moves gradients during backward"
        raise ConfigError("parallel.zero", stage, why, "use ZeRO 0 or 1, or no pipeline")
    if stage == 3 and config.model.tie_embeddings:
        fix = "use ZeRO 0 to 2, or untied embeddings"
        raise ConfigError("model.tie_embeddings", True, "not supported with ZeRO 3", fix)


def _batches(config: Config) -> None:
    parallel, train = config.parallel, config.train
    if train.global_batch_size % train.micro_batch_size:
        why = f"not divisible by train.micro_batch_size={train.micro_batch_size}"
        fix = f"give a multiple of {train.micro_batch_size}"
        raise ConfigError("train.global_batch_size", train.global_batch_size, why, fix)
    if parallel.virtual_pipeline > 1 and train.global_batch_size % (train.micro_batch_size * parallel.pipeline):
        why = f"an interleaved pipeline requires micro-batches in multiples of parallel.pipeline={parallel.pipeline}"
        fix = f"give a multiple of {train.micro_batch_size * parallel.pipeline}"
        raise ConfigError("train.global_batch_size", train.global_batch_size, why, fix)


def _layout(config: Config, world_size: int) -> None:
    parallel = config.parallel
    ranks = parallel.tensor * parallel.pipeline
    if world_size % ranks:
        key = "parallel.pipeline" if parallel.tensor == 1 else "parallel.tensor"
        value = parallel.pipeline if parallel.tensor == 1 else parallel.tensor
        why = f"tensor × pipeline = {parallel.tensor} × {parallel.pipeline} does not divide the world size {world_size}"
        raise ConfigError(
            key,
            value,
            why,
            f"start a multiple of {ranks} ranks (elas launch local --ranks {ranks}), or change the layout",
        )


def _global_batch(config: Config, world_size: int) -> None:
    parallel, train = config.parallel, config.train
    dp = world_size // (parallel.tensor * parallel.pipeline)
    each = train.micro_batch_size * dp * (parallel.pipeline if parallel.virtual_pipeline > 1 else 1)
    if train.global_batch_size % each:
        why = f"not divisible by train.micro_batch_size={train.micro_batch_size} × {dp} data-parallel ranks"
        if parallel.virtual_pipeline > 1:
            why += f" × parallel.pipeline={parallel.pipeline} (interleaved)"
        fix = f"give a multiple of {each}"
        raise ConfigError("train.global_batch_size", train.global_batch_size, why, fix)


def _run_dir(config: Config) -> None:
    run_dir = Path(config.train.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError("train.run_dir", config.train.run_dir, "is a file", "give a folder")
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError("train.run_dir", config.train.run_dir, f"{existing} is not writable", "give another folder")
