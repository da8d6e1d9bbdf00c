"""What must stay the same when a run resumes from a checkpoint: the model, the optimizer, the order of samples.

`data.valid`, the initialisation and the layout may change. Settings are compared by their effective values (an omitted
width is its default, a blend's weights are normalised), and quoted in messages as the user typed them.
"""

from typing import Any

from elas.checkpoint.folder import Checkpoint
from elas.config import KEYS, Config, ffn_width
from elas.config.replaced import successor
from elas.data.corpus import corpus_identity, held_out_identity
from elas.data.split import EVERYTHING, parse_split
from elas.errors import ConfigError

SHAPE = ("model.hidden_size", "model.num_layers", "model.num_attention_heads", "model.num_query_groups",
         "model.activation", "model.ffn_hidden_size", "model.vocab_size", "model.tie_embeddings", "low_rank.kind",
         "low_rank.rank")  # fmt: skip
"""Settings that determine the names and shapes of the weights."""
_FUNCTION = ("model.norm_eps", "model.rotary_base", "sparsity.kind")
_RUN = ("model.seq_length", "train.dtype", "train.seed", "train.global_batch_size", "optimizer.kind", "data.packing")


def identity(config: Config) -> dict[str, Any]:
    """What a checkpoint stores for this comparison: settings by key, and the contents of the corpora."""
    return effective(config) | corpus_identity(config)


def manifest_facts(config: Config) -> dict[str, Any]:
    """The entries of a checkpoint's manifest that describe its run; they are the same at every save."""
    facts = {"identity": identity(config), "versions": versions()}
    return {**facts, "config": config.to_dict(), "shares": dict(config.shares)}


def effective(config: Config) -> dict[str, Any]:
    """Effective values, by key, of the settings that must not change; those without effect are left out."""
    found = {key: typed(config, key) for key in (*SHAPE, *_FUNCTION, *_RUN)}
    found["model.ffn_hidden_size"] = ffn_width(config)
    found["model.num_query_groups"] = config.model.num_query_groups or config.model.num_attention_heads
    if config.low_rank.kind == "none":
        del found["low_rank.rank"]
    if config.low_rank.kind == "cola":
        found["low_rank.activation"] = config.low_rank.activation
    if config.sparsity.kind == "2:4":
        found["sparsity.method"] = config.sparsity.method
        if config.sparsity.method == "soft_threshold":
            found["sparsity.scale"] = config.sparsity.scale
    return found


def of_model(config: Config) -> dict[str, Any]:
    """The part of `effective` that weights from elsewhere fix: shapes, norms and positions, but not sparsity."""
    keys = (*SHAPE, "low_rank.activation", "model.norm_eps", "model.rotary_base")
    return {key: value for key, value in effective(config).items() if key in keys}


def typed(config: Config, key: str) -> Any:
    """A setting's value as the user gave it."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def written_config(checkpoint: Checkpoint) -> Config:
    """The configuration that wrote a checkpoint; keys unknown to its version have their defaults.

    Keys that were replaced since then are translated.
    """
    config = Config()
    for section, values in checkpoint.manifest.get("config", {}).items():
        for name, value in values.items():
            key, value = successor(f"{section}.{name}", value)
            if key in KEYS:
                now, name = key.split(".")
                setattr(getattr(config, now), name, value)
    return config


def check_same_run(config: Config, now: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Check that a run may resume from a checkpoint.

    Args:
        config: the run's configuration.
        now: its `identity`.
        checkpoint: a checkpoint written by any version.

    Raises:
        ConfigError: a setting or a corpus that must stay the same differs; names both values as typed.
    """
    then, written = checkpoint.manifest["identity"], written_config(checkpoint)
    known = bool(checkpoint.manifest.get("config"))
    if "data.held_out" not in then and not checkpoint.is_start:
        then = _of_older_version(then, written)
    way_out = "start in another train.run_dir" if config.checkpoint.resume == "auto" else "do not use this checkpoint"
    fix = f"resume with the same setting, or {way_out}"
    for key in effective(config):
        if key in then and then[key] != now[key]:
            old = typed(written, key) if known else then[key]
            why = f"the checkpoint {checkpoint.path} was written with {key}={old!r}"
            if key.startswith("optimizer."):
                fix += f"; or, in another train.run_dir, start from its weights: checkpoint.init_from={checkpoint.path}"
            raise ConfigError(key, typed(config, key), why, fix)
    if checkpoint.is_start:  # no sample was drawn, so any corpus may follow
        return
    _check_corpus(config, now, then, written, checkpoint, fix)
    _check_held_out(config, now["data.held_out"], then["data.held_out"], written, checkpoint, fix)


def _check_corpus(config: Config, now: dict, then: dict, written: Config, checkpoint: Checkpoint, fix: str) -> None:
    key, sources, old = "data.train", now.get("data.train"), then.get("data.train")
    if sources is None or old is None or _normalised(sources) == _normalised(old):
        return
    why = f"the checkpoint {checkpoint.path} was written with data.train={written.data.train!r}"
    if [source[1:] for source in sources] != [source[1:] for source in old]:
        counts = [
            f"{sum(source[1] for source in part):,} documents of {sum(source[2] for source in part):,} tokens"
            for part in (old, sources)
        ]
        what = f"{counts[0]}, now {counts[1]}" if counts[0] != counts[1] else f"other tokens in {counts[0]}"
        why += f", which held {what}"
        fix = fix.replace("the same setting", "the same corpus")
    raise ConfigError(key, config.data.train, why, fix)


def _check_held_out(config: Config, now: Any, then: Any, written: Config, checkpoint: Checkpoint, fix: str) -> None:
    if now == then:
        return
    now, then = now or [None], then or [None]
    path, split = checkpoint.path, written.data.split
    if (config.data.valid is None) != (written.data.valid is None):
        did = "did not apply" if config.data.valid is None else "held out documents of data.train"
        why = f"the checkpoint {path} was written with data.valid={written.data.valid!r}, so data.split={split!r} {did}"
        raise ConfigError("data.valid", config.data.valid, why, fix)
    if now[1:] != then[1:]:
        why = f"the checkpoint {path} was written with data.split={split!r}"
        raise ConfigError("data.split", config.data.split, why, fix)
    why = f"the version that wrote {path} held out the last documents, this one spreads them over the corpus"
    fix = f"start in another train.run_dir, with checkpoint.init_from={path} to keep its weights"
    raise ConfigError("data.split", config.data.split, why, fix)


def _normalised(sources: list[list]) -> list[list]:
    """Sources with weights normalised to 1; a single source's weight has no effect and is None."""
    if len(sources) == 1:
        return [[None, *sources[0][1:]]]
    if any(weight is None for weight, *_ in sources):
        return [list(source) for source in sources]
    total = sum(weight for weight, *_ in sources)
    return [[round(weight / total, 12), *facts] for weight, *facts in sources]


def _of_older_version(then: dict, written: Config) -> dict:
    """Convert the identity of a checkpoint written before held-out documents were spread, without `data.held_out`."""
    found = effective(written) | {"data.held_out": None}
    if "data.train" in then:
        found["data.train"] = then["data.train"]
        shares = EVERYTHING if "data.valid" in then else parse_split(then["data.split"])
        found["data.held_out"] = held_out_identity("last", [source[1] for source in then["data.train"]], shares)
    return found


def versions() -> dict[str, str]:
    """Versions of the installed packages, stored in a checkpoint's manifest."""
    import importlib.metadata

    import torch

    from elas import __version__

    others = ("deepspeed", "megatron-core")
    return {"elas": __version__, "torch": torch.__version__} | {n: importlib.metadata.version(n) for n in others}
