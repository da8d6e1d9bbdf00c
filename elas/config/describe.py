"""Short descriptions of a configuration for messages and tables."""

from elas.config.schema import Config


def describe(config: Config) -> str:
    """The model in short: `rank-64 relu² 2:4, 4 × 256` (layers × hidden size)."""
    rank = config.low_rank.rank
    kind = {"none": "full-rank", "lowrank": f"rank-{rank}", "cola": f"CoLA rank-{rank}"}[config.low_rank.kind]
    activation = {"relu2": "relu²", "swiglu": "SwiGLU"}[config.model.activation]
    sparsity = "" if config.sparsity.kind == "none" else f" {config.sparsity.kind}"
    return f"{kind} {activation}{sparsity}, {config.model.num_layers} × {config.model.hidden_size}"


def describe_optimizer(config: Config) -> str:
    """The optimizer in short: `Muon 0.006, all else AdamW 0.003, weight decay 0.01`, with peak learning rates."""
    one = config.optimizer
    name = {"adamw": "AdamW", "loro": "LORO", "muon": "Muon"}[one.kind]
    if one.normalize == "spectron" and config.low_rank.kind != "none":
        name += " with Spectron's steps"
    parts = [f"{name} {one.lr:g}"]
    if one.kind == "muon":
        parts.append(f"all else AdamW {one.lr if one.lr_other is None else one.lr_other:g}")
    return ", ".join([*parts, f"weight decay {one.weight_decay:g}"])


def describe_layout(*, tensor: int, pipeline: int, data: int, zero: int, sequence: bool, virtual: int = 1) -> str:
    """The parallel layout in short: `TP 2 × PP 1 × DP 4, ZeRO 1, sequence parallel`."""
    interleaved = f", {virtual} chunks per stage" if virtual > 1 else ""
    parallel = ", sequence parallel" if sequence else ""
    return f"TP {tensor} × PP {pipeline} × DP {data}, ZeRO {zero}{parallel}{interleaved}"
