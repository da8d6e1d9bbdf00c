"""The configuration: typed dataclasses, read from YAML, overridden by `--section.key value`.

The idea: one small dataclass a section; a key's description is its docstring line; every key has a default that a
researcher would pick. Parsing is jsonargparse's; what is ours is that each mistake becomes one line that names the
key, the value and the fix (`elas.errors.ConfigError`). What combinations can work is checked in `elas.validate`,
before any process group exists.

Precedence, low to high: dataclass default, YAML file, command line.
"""

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from elas.errors import ConfigError, UserError


@dataclass(kw_only=True)
class ModelConfig:
    """Shape of the transformer (Llama-style: RMSNorm, rotary positions, causal attention, no biases)."""

    hidden_size: int = 512
    """Width h of the residual stream."""
    num_layers: int = 8
    """Transformer layers."""
    num_attention_heads: int = 8
    """Query heads; h / heads is the head dimension."""
    num_query_groups: int | None = None
    """Key/value heads (grouped-query attention); none means one for each query head."""
    ffn_hidden_size: int | None = None
    """Width d_ff of the FFN; none means 8/3·h for swiglu and 4·h for relu2, rounded up to a multiple of 64."""
    activation: Literal["swiglu", "relu2"] = "relu2"
    """FFN non-linearity: gated SiLU, or squared ReLU without a gate."""
    vocab_size: int = 32000
    """Rows of the embedding and of the output layer."""
    seq_length: int = 256
    """Tokens in a sample."""
    max_position_embeddings: int | None = None
    """Longest sequence the model is meant for; none means seq_length."""
    tie_embeddings: bool = False
    """Share the embedding with the output layer."""
    norm_eps: float = 1e-6
    """Epsilon of RMSNorm."""
    rotary_base: int = 10000
    """Base of the rotary frequencies."""
    init_std: float = 0.02
    """Standard deviation of embedding, output layer and full-rank linears."""


@dataclass(kw_only=True)
class LowRankConfig:
    """How linear layers are factored; the embedding and the output layer stay full rank."""

    kind: Literal["none", "lowrank", "cola"] = "lowrank"
    """none: full rank; lowrank: W = factor_out · factor_in; cola: a non-linearity between the factors."""
    rank: int = 128
    """Inner width r of every factor pair."""
    activation: Literal["silu", "relu2"] = "silu"
    """Non-linearity between the factors (cola only)."""


@dataclass(kw_only=True)
class SparsityConfig:
    """2:4 sparsity of the squared-ReLU activation (of the activation between the factors for cola with relu2)."""

    kind: Literal["none", "2:4"] = "2:4"
    """2:4 keeps the two largest of every four consecutive features of a token."""
    method: Literal["magnitude", "soft_threshold"] = "magnitude"
    """soft_threshold also shrinks the kept two by the third largest."""
    gradient: Literal["masked", "ste"] = "masked"
    """masked: exact gradient of the pruned function; ste: straight through the mask."""
    dense_steps: int = 1000
    """First steps without pruning."""
    ffn_memory: Literal["fused", "compressed", "eager"] = "fused"
    """What the FFN keeps for its backward pass: nothing d_ff wide, 9/16 of a bf16 activation, or everything."""
    scale: float = 1.0
    """β, the factor on soft-thresholded values."""
    implementation: str = "auto"
    """Kernel implementation by name; auto picks the fastest there is and says so."""


@dataclass(kw_only=True)
class ParallelConfig:
    """How the model is cut over ranks; data parallelism takes what is left of the world size."""

    tensor: int = 1
    """Tensor-parallel ranks."""
    pipeline: int = 1
    """Pipeline stages."""
    virtual_pipeline: int = 1
    """Model chunks on each stage (interleaved schedule when above 1)."""
    sequence: bool = False
    """Sequence parallelism beside tensor parallelism."""
    zero: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage; none takes the deepspeed_config's, or 1 without one."""
    deepspeed_config: str | None = None
    """DeepSpeed JSON with DeepSpeed's own knobs; none takes the shipped ds_configs/zeroN.json."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer and gradient clipping."""

    kind: Literal["adamw", "loro"] = "adamw"
    """adamw, or LORO's Riemannian steps on the factors."""
    lr: float = 1e-3
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay; not applied to norms."""
    clip_grad: float = 1.0
    """Global gradient-norm limit; 0 turns clipping off."""
    exact_every: int = 500
    """Steps between exact LORO steps."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """Learning rate over steps."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine decay; warm-up, stable, decay (linear); or constant after the warm-up."""
    warmup_steps: int = 100
    """Linear ramp from 0 to lr."""
    decay_steps: int | None = None
    """Last steps of wsd in which the rate falls; none means a tenth of train.steps."""
    min_lr_ratio: float = 0.1
    """Final rate as a fraction of lr."""


@dataclass(kw_only=True)
class DataConfig:
    """Tokens: Megatron `.bin/.idx` pairs, named by their common prefix."""

    train: str | list[str] | None = None
    """Prefix, or a blend `[0.7, A, 0.3, B]` (weights may be left out)."""
    valid: str | list[str] | None = None
    """Like train, for validation; none takes the part that split gives."""
    split: str = "99,1,0"
    """Shares of train cut for train, validation, test when valid is none."""
    tokenizer: str | None = None
    """Tokenizer folder or file, to check the vocabulary; none trusts the corpus's manifest."""
    cache: str | None = None
    """Folder for sample indices; none means RUN_DIR/index-cache."""


@dataclass(kw_only=True)
class TrainConfig:
    """The run."""

    steps: int = 10000
    """Optimizer steps in all."""
    micro_batch_size: int = 8
    """Samples in one forward pass of one data-parallel rank."""
    global_batch_size: int = 512
    """Samples in one optimizer step over all ranks."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Weights and activations; bfloat16 keeps fp32 master weights and moments in ZeRO."""
    seed: int = 1234
    """Seed of the initialisation and the data order."""
    run_dir: str = "runs/elas"
    """Folder for metrics, curves and checkpoints."""
    eval_every: int = 500
    """Steps between validations; 0 validates only at the start and at the end."""
    eval_batches: int = 16
    """Global batches in one validation; 0 turns validation off."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    every_steps: int = 1000
    """Steps between saves; the last step always saves; 0 saves only then."""
    keep: int = 2
    """Newest checkpoints kept; 0 keeps all."""
    async_save: bool = False
    """Save in the background (not in this version)."""
    resume: str = "auto"
    """auto: the newest whole checkpoint of run_dir if there is one; none: start afresh; or a checkpoint's path."""


@dataclass(kw_only=True)
class LogConfig:
    """What is written while training."""

    every_steps: int = 10
    """Steps between lines in metrics.jsonl, on the console and in TensorBoard."""
    tensorboard: bool = True
    """Also write TensorBoard event files under RUN_DIR/tensorboard."""
    sparsity_tokens: int = 1024
    """Tokens a layer and logged step on which zeros and dropped values are counted; 0 turns it off."""


@dataclass(kw_only=True)
class Config:
    """A whole run; see each section."""

    model: ModelConfig = field(default_factory=ModelConfig)
    low_rank: LowRankConfig = field(default_factory=LowRankConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as nested plain dicts."""
        return dataclasses.asdict(self)


def ffn_width(config: Config) -> int:
    """d_ff: the configured width, or 8/3·h (swiglu) or 4·h (relu2), rounded up to a multiple of 64."""
    if config.model.ffn_hidden_size is not None:
        return config.model.ffn_hidden_size
    wanted = config.model.hidden_size * (8 / 3 if config.model.activation == "swiglu" else 4)
    return int(-(-wanted // 64) * 64)


SECTIONS = {f.name: f.default_factory for f in dataclasses.fields(Config)}
KEYS = {f"{name}.{f.name}" for name, cls in SECTIONS.items() for f in dataclasses.fields(cls)}


class _Loader(yaml.SafeLoader):
    """YAML with the number rules of YAML 1.2: `2:4` is text (1.1 reads base 60) and `1e-3` is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in rules if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def presets() -> list[str]:
    """Names of the shipped presets."""
    folder = resources.files("elas.presets")
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def read_yaml(source: str) -> dict[str, Any]:
    """Read a YAML file, or a shipped preset by its name (`60m`), into nested dicts.

    Raises:
        UserError: no such file, not YAML, or not a mapping.
    """
    path = Path(source)
    if not path.is_file() and source in presets():
        path = resources.files("elas.presets") / f"{source}.yaml"
    try:
        text = path.read_text()
    except OSError as error:
        near = difflib.get_close_matches(source, presets(), n=1)
        fix = (
            f"did you mean the preset {near[0]!r}?" if near else f"give a YAML file or a preset: {', '.join(presets())}"
        )
        raise ConfigError("config", source, error.strerror or "cannot be read", fix) from None
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError("config", source, f"is not YAML ({error})", "mend the file") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            "config", source, "does not hold sections", "write `section:` and indented `key: value` lines"
        )
    return values


def _unknown(key: str, value: object) -> ConfigError:
    # First a right name under another section, then the nearest spelling.
    near = sorted(k for k in KEYS if "." in key and k.split(".")[-1] == key.split(".")[-1])
    near = near or difflib.get_close_matches(key, KEYS if "." in key else set(SECTIONS), n=1, cutoff=0.5)
    return ConfigError(
        key, value, "unknown key", f"did you mean {near[0]}?" if near else f"sections are {', '.join(SECTIONS)}"
    )


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Nested sections to dotted keys, refusing keys that do not exist.

    Raises:
        ConfigError: an unknown key, with the nearest valid one.
    """
    flat = {}
    for section, entries in values.items():
        if section in KEYS:
            flat[section] = entries
        elif section not in SECTIONS:
            raise _unknown(str(section), entries)
        elif entries is None:
            continue
        elif not isinstance(entries, dict):
            raise ConfigError(section, entries, "is a section, not a value", f"write {section}.KEY")
        else:
            for key, value in entries.items():
                if f"{section}.{key}" not in KEYS:
                    raise _unknown(f"{section}.{key}", value)
                flat[f"{section}.{key}"] = value
    return flat


def split_overrides(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Take `--section.key value` and `--section.key=value` out of an argument list.

    Args:
        argv: command-line arguments.

    Returns:
        Overrides by dotted key (values parsed as YAML, so `null` and `[a, b]` work), and the arguments left.

    Raises:
        ConfigError: an unknown key, or one without a value.
    """
    overrides, rest, i = {}, [], 0
    while i < len(argv):
        name, sep, value = argv[i].partition("=")
        if not (name.startswith("--") and "." in name):
            rest.append(argv[i])
            i += 1
            continue
        key = name[2:]
        if key not in KEYS:
            raise _unknown(key, value if sep else (argv[i + 1] if i + 1 < len(argv) else ""))
        if not sep:
            i += 1
            if i >= len(argv):
                raise ConfigError(key, None, "has no value", f"write --{key} VALUE")
            value = argv[i]
        overrides[key] = value if _is_text(key) else _parse_scalar(key, value)
        i += 1
    return overrides, rest


def _field_type(key: str) -> Any:
    section, name = key.split(".")
    return {f.name: f.type for f in dataclasses.fields(SECTIONS[section])}[name]


def _is_text(key: str) -> bool:
    return _field_type(key) is str


def _parse_scalar(key: str, value: str) -> Any:
    try:
        parsed = yaml.load(value, _Loader)
    except yaml.YAMLError:
        raise ConfigError(key, value, "cannot be read", f"give a {_field_type(key)}") from None
    return value if isinstance(parsed, dict) else parsed


def from_flat(flat: dict[str, Any]) -> Config:
    """Build a `Config` from dotted keys, with types checked by jsonargparse.

    Raises:
        ConfigError: a value of the wrong type, or not one of the choices.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    built = {}
    for section, cls in SECTIONS.items():
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, section)
        values = {k.split(".")[1]: _blend(v) for k, v in flat.items() if k.startswith(f"{section}.")}
        try:
            built[section] = parser.instantiate_classes(parser.parse_object({section: values}))[section]
        except ArgumentError as error:
            raise _type_error(section, values, str(error)) from None
    return Config(**built)


def _blend(value: Any) -> Any:
    """A blend `[0.7, A, 0.3, B]` mixes numbers and text; the field holds text."""
    return [str(v) for v in value] if isinstance(value, list) else value


def _type_error(section: str, values: dict[str, Any], message: str) -> UserError:
    named = re.search(rf"{section}\.(\w+)", message)
    name = (
        named.group(1) if named and named.group(1) in values else next((k for k in values if f'"{k}"' in message), None)
    )
    if name is None:
        return UserError(f"{section}: {message}")
    kind = _field_type(f"{section}.{name}")
    choices = re.findall(r"Literal\[(.*?)\]", str(kind))
    wanted = f"one of {choices[0]}" if choices else (kind.__name__ if isinstance(kind, type) else str(kind))
    return ConfigError(f"{section}.{name}", values[name], "wrong type or choice", f"give {wanted}")


def load_config(source: str | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """Read a configuration.

    Args:
        source: YAML file or preset name; None for the defaults.
        overrides: values by dotted key, which win over the file.

    Returns:
        The typed configuration (not yet validated against a world size; see `elas.validate`).

    Raises:
        ConfigError: one line naming key, value and fix.
    """
    flat = flatten(read_yaml(source)) if source else {}
    return from_flat({**flat, **flatten(overrides or {})})
