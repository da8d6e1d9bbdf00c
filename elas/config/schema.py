"""All settings: one dataclass per section; each key has a range, a default that a researcher would pick, and a
description in the string below it. `elas config`, `--show-config` and the range checks are derived from them.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from elas.config import pruning
from elas.config.kinds import (
    AboveZero,
    BelowOne,
    Count,
    CountOrZero,
    File,
    Folder,
    Fraction,
    Rate,
    Says,
    StepsOrShare,
    StepsOrShareNotZero,
    UpToTwenty,
    ZeroOrMore,
)  # fmt: skip

TrackerName = Literal["tensorboard", "wandb", "trackio"]
Corpus = Annotated[str, Says("a prefix, or prefixes with or without weights")] | list[str]


@dataclass(kw_only=True)
class ModelConfig:
    """Shape of the transformer (Llama-style: RMSNorm, rotary positions, causal attention, no biases)."""

    hidden_size: Count = 512
    """Width h of the residual stream, in features."""
    num_layers: Count = 8
    """Transformer layers."""
    num_attention_heads: Count = 8
    """Query heads; h / heads is the head dimension."""
    num_query_groups: Count | None = None
    """Key/value heads (grouped-query attention); null means one for each query head."""
    ffn_hidden_size: Count | None = None
    """Width d_ff of the FFN; null means 8/3·h for swiglu and 4·h for relu2, rounded up to a multiple of 64."""
    activation: Literal["swiglu", "relu2"] = "relu2"
    """FFN non-linearity: gated SiLU, or squared ReLU without a gate."""
    vocab_size: Count = 32000
    """Rows of the embedding and of the output layer."""
    seq_length: Count = 256
    """Tokens in a sample."""
    max_position_embeddings: Count | None = None
    """Longest sequence the model supports; null means seq_length."""
    tie_embeddings: bool = False
    """Share the embedding with the output layer."""
    norm_eps: AboveZero = 1e-6
    """Epsilon of RMSNorm."""
    rotary_base: Count = 10000
    """Base of the rotary frequencies."""
    init_std: AboveZero = 0.02
    """Standard deviation of embedding, output layer and full-rank linears."""


@dataclass(kw_only=True)
class LowRankConfig:
    """How linear layers are factored; the embedding and the output layer stay full rank."""

    kind: Literal["none", "lowrank", "cola"] = "lowrank"
    """none: full rank; lowrank: W = factor_out · factor_in; cola: a non-linearity between the factors."""
    rank: Count = 128
    """Inner width r of every factor pair."""
    activation: Literal["silu", "relu2"] = "silu"
    """Non-linearity between the factors (cola only)."""


@dataclass(kw_only=True)
class SparsityConfig:
    """2:4 sparsity of the squared-ReLU activation (of the activation between the factors for cola with relu2)."""

    kind: Literal["none", "2:4"] = "2:4"
    """2:4 keeps the two largest of every four consecutive features of a token."""
    method: pruning.Method = "magnitude"
    """soft_threshold also shrinks the kept two by the third largest."""
    gradient: pruning.Gradient = "masked"
    """masked: exact gradient of the pruned function; ste: straight through the mask."""
    backward: pruning.Backward = "dense"
    """split: weight gradients use an activation also pruned along tokens, except in its densest 5 % of features."""
    dense_steps: StepsOrShare = 1000
    """Initial steps without pruning, or their share of train.steps: 0.2 is the first fifth."""
    ffn_memory: pruning.FfnMemory = "fused"
    """What the FFN saves for backward: nothing of width d_ff, 9/16 of a bf16 activation, or everything."""
    scale: AboveZero = 1.0
    """β, the factor on soft-thresholded values."""
    implementation: Annotated[str, Says("auto, or a name: docs/kernels.md")] = "auto"
    """Kernel implementation by name; auto picks the fastest available one and logs its choice."""


@dataclass(kw_only=True)
class ParallelConfig:
    """How the model is divided over ranks; the rest of the world size is data parallel."""

    tensor: Count = 1
    """Tensor-parallel ranks."""
    pipeline: Count = 1
    """Pipeline stages."""
    virtual_pipeline: Count = 1
    """Model chunks on each stage (interleaved schedule when above 1)."""
    sequence: bool = False
    """Sequence parallelism; requires tensor parallelism."""
    zero: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage; null uses that of deepspeed_config, or without one 1, or 0 with a single data-parallel rank."""
    deepspeed_config: File | None = None
    """JSON with DeepSpeed's own knobs; null uses the shipped ds_configs/zeroN.json."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer and gradient clipping."""

    kind: Literal["adamw", "loro", "muon"] = "adamw"
    """adamw; loro: Riemannian steps on the factors; muon: orthogonalized momentum of matrices, AdamW for all else."""
    lr: Rate = 1e-3
    """Peak learning rate; with muon, of matrices, whose steps are scaled by √(256 / hidden size)."""
    beta1: BelowOne = 0.9
    """Decay of the first moment; with muon, of what is no matrix of a layer."""
    beta2: BelowOne = 0.95
    """Decay of the second moment; with muon, of what is no matrix of a layer."""
    eps: AboveZero = 1e-8
    """Added to the square root of the second moment; with muon, of what is no matrix of a layer."""
    weight_decay: ZeroOrMore = 0.1
    """Decoupled weight decay; not applied to norms."""
    clip_grad: ZeroOrMore = 1.0
    """Global gradient-norm limit; 0 turns clipping off."""
    lr_other: Rate | None = None
    """Peak learning rate of what is no matrix of a layer: embedding, output layer, norms (muon only); null: lr."""
    momentum: BelowOne = 0.95
    """Decay of a matrix's momentum, which is Nesterov's (muon only)."""
    muon_steps: UpToTwenty = 5
    """Newton–Schulz steps that orthogonalize a matrix's momentum (muon only)."""
    normalize: Literal["none", "spectron"] = "none"
    """spectron: divide a pair's step by the spectral norms of its factors plus 1; its rates are larger (muon only)."""
    exact_every: Count | None = 500
    """Steps between exact steps on the low-rank manifold (loro only); null means no exact steps."""
    refresh: Literal["with_exact", "only", "none"] = "with_exact"
    """Zero all moments after each exact step (loro only); only: zero them without the exact step; none: never."""


OWN_SETTINGS = {
    "adamw": (),
    "loro": ("exact_every", "refresh"),
    "muon": ("lr_other", "momentum", "muon_steps", "normalize"),
}
"""Settings of `optimizer` that one kind alone has."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """Learning-rate schedule."""

    kind: Literal["cosine", "cosine_restart", "wsd", "constant"] = "cosine"
    """cosine decay, with a 5-step ramp after each LORO refresh; warm-up, stable, decay (linear); or constant."""
    warmup_steps: StepsOrShare = 100
    """Steps of the linear ramp from 0 to lr, or their share of train.steps."""
    decay_steps: StepsOrShareNotZero | None = None
    """Final steps of wsd in which the rate decays, or their share of train.steps; null means a tenth."""
    min_lr_ratio: Fraction = 0.1
    """Final rate as a fraction of lr."""


@dataclass(kw_only=True)
class DataConfig:
    """Tokens: Megatron `.bin/.idx` pairs, named by their common prefix."""

    train: Corpus | None = None
    """Prefix, or a blend `[0.7, A, 0.3, B]` (weights are optional)."""
    valid: Corpus | None = None
    """Like train, for validation; null uses the validation share of split."""
    split: Annotated[str, Says("up to three shares, such as 99,1,0")] = "99,1,0"
    """Shares of each corpus's documents for training, validation and test, spread over it; used when valid is null."""
    tokenizer: Annotated[str, Says("a path")] | None = None
    """Tokenizer folder or file, to check the vocabulary; null trusts the corpus's manifest."""
    packing: Literal["packed", "document"] = "packed"
    """packed: concatenated documents in a sample; document: a single one, truncated or padded (as in the papers)."""
    cache: Folder | None = None
    """Folder for sample indices; null means RUN_DIR/index-cache."""


@dataclass(kw_only=True)
class TrainConfig:
    """Length, batch, precision and supervision of the run."""

    steps: Count = 10000
    """Total optimizer steps."""
    micro_batch_size: Count = 8
    """Samples per forward pass of one data-parallel rank."""
    global_batch_size: Count = 512
    """Samples per optimizer step over all ranks."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of weights and activations; with bfloat16, ZeRO keeps fp32 master weights and moments."""
    recompute: Literal["none", "bottleneck", "layer"] | None = None
    """What the backward pass computes again: none; bottleneck: norm outputs, q, k, v, gate and up, from what is narrow;
    layer: each whole layer from its input. null: bottleneck with low rank, else none."""
    seed: CountOrZero = 1234
    """Seed of the initialisation and the data order."""
    run_dir: Folder = "runs/elas"
    """Folder for metrics, curves and checkpoints."""
    max_bad_steps: Count = 10
    """Steps whose loss or gradient is not finite are skipped; this many consecutive ones end the run."""
    on_spike: Literal["stop", "rollback", "ignore"] = "ignore"
    """When the loss spikes: end the run, roll back to the last checkpoint and use other samples, or nothing."""
    spike_nats: AboveZero = 1.0
    """Nats above the median of the last 50 losses that count as a spike."""
    max_rollbacks: CountOrZero = 3
    """Maximum rollbacks since the run was last started; a further spike ends it."""
    timeout_seconds: AboveZero | None = 600.0
    """Seconds without a heartbeat from a rank, or without progress, that end the run, naming the rank; null: never."""
    stop_after_minutes: AboveZero | None = None
    """Finish the step, save and end after this many minutes, as on SIGTERM; null for no limit."""
    eval_every: CountOrZero = 500
    """Steps between validations; 0 validates only at the start and at the end."""
    eval_batches: CountOrZero = 16
    """Global batches per validation, at most the whole set once; 0 turns validation off."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    every_steps: CountOrZero = 1000
    """Steps between saves; the last step always saves; 0 saves only then."""
    keep: CountOrZero = 2
    """Number of newest checkpoints to keep; 0 keeps all."""
    keep_every: CountOrZero = 0
    """Checkpoints at multiples of this many steps are never removed; 0: no exceptions."""
    async_save: bool = False
    """Save in the background while training continues; requires a copy of each rank's part in host memory."""
    resume: Annotated[str, Says("auto, none, or a checkpoint's path")] = "auto"
    """auto: the newest intact checkpoint of run_dir, if any; none: start a new run; or a checkpoint's path."""
    init_from: Annotated[str, Says("a run's folder, or a checkpoint's")] | None = None
    """Initialise a new run with the weights of this run or checkpoint only; null initialises randomly."""


@dataclass(kw_only=True)
class LogConfig:
    """Metrics written during training."""

    every_steps: Count = 10
    """Steps between lines in metrics.jsonl, on the console and in the trackers; the first step after a start or resume
    and the last step are always logged."""
    trackers: list[TrackerName] = field(default_factory=lambda: ["tensorboard"])
    """Where the values of metrics.jsonl and validation.jsonl also go (docs/metrics.md); [] for nowhere. tensorboard
    writes event files into RUN_DIR/tensorboard."""
    project: Annotated[str, Says("a text")] = "elas"
    """Project of the run in wandb and trackio; there the run has the name of its folder."""
    sparsity_tokens: CountOrZero = 1024
    """Tokens per layer and logged step on which zeros and dropped values are counted; 0 turns this off."""
    pairs_every_steps: CountOrZero = 500
    """Steps between measurements of all factor pairs (norms, condition numbers, effective rank), and one at the last
    step; 0 turns this off."""


@dataclass(kw_only=True)
class ExportConfig:
    """Hugging Face folders of the trained model (`elas export hf`)."""

    at_end: Literal["none", "elas", "dense"] = "none"
    """Form of the folder that is written to RUN_DIR/exports when training completes: none for no folder; elas keeps
    factors and 2:4; dense multiplies them out."""


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
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self):
        # Shares of train.steps as given, by key (`elas.config.shares`); the fields themselves hold steps.
        self.shares: Mapping[str, float] = {}

    def to_dict(self) -> dict[str, Any]:
        """The configuration as nested plain dicts."""
        return dataclasses.asdict(self)


def ffn_width(config: Config) -> int:
    """d_ff: the configured width, or 8/3·h (swiglu) or 4·h (relu2), rounded up to a multiple of 64."""
    if config.model.ffn_hidden_size is not None:
        return config.model.ffn_hidden_size
    wanted = config.model.hidden_size * (8 / 3 if config.model.activation == "swiglu" else 4)
    return int(-(-wanted // 64) * 64)


def recompute_of(config: Config) -> str:
    """`train.recompute`, chosen if it is null."""
    chosen = config.train.recompute
    return chosen or ("none" if config.low_rank.kind == "none" else "bottleneck")


SECTIONS: dict[str, type[Any]] = {f.name: type(getattr(Config(), f.name)) for f in dataclasses.fields(Config)}
KEYS = [f"{name}.{f.name}" for name, cls in SECTIONS.items() for f in dataclasses.fields(cls)]
SPARSITY_KEYS = {f.name: f"sparsity.{f.name}" for f in dataclasses.fields(SparsityConfig)}
"""Keys of the `sparsity` section by field; its options of the kernel have the fields' names there."""


def field_type(key: str) -> Any:
    """The annotated type of the field `section.name` (`elas.config.kinds`)."""
    section, name = key.split(".")
    return SECTIONS[section].__dataclass_fields__[name].type
