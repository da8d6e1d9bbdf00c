"""`elas bench comm`: bytes that one transformer layer sends within a tensor-parallel group, counted on real ranks.

Legend: h hidden, f d_ff, r rank, g width of the key/value heads, t tensor-parallel ranks.

Three ways to split a layer: `full` (full-rank SwiGLU, Megatron's linears), `lowrank_gathered` (factor pairs split in
the naive way, see comm_layers.py) and `bottleneck` (ours), each with and without sequence parallelism. Columns of a
row:

- `fwd_bytes_per_token_layer` and `bwd_…`: bytes that one rank sends for each token of the whole sequence. They are the
  tensors passed to collectives times the share that a ring sends: (t − 1)/t of an all-gather or reduce-scatter, twice
  that of an all-reduce.
- `formula_bytes`: both passes together, by formula.
- `step_ms`: forward and backward of the layer, median of rounds in turns.

Values per token in collectives, by formula:

    full               forward AR 2h                        backward AR 2h
      sequence         AG 2h, RS 2h                         AG 4h, RS 2h    Megatron gathers a linear's input again
    lowrank_gathered   AR 3h + 2g + f                       AR 3h + f
      sequence         AG 2h, AR h + 2g + f, RS 2h          AG 2h, AR h + f, RS 2h
    bottleneck         AR 2r                                AR 4r
      sequence         AG 4r, RS 2r                         AG 2r, RS 4r

AR all-reduce, AG all-gather, RS reduce-scatter. If a count differs from its formula, or the naive layer from ours, the
row has no time and the exit status is 1.
"""

import json
import os
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from elas import accelerator
from elas.bench import arguments, measure, show
from elas.bench.ffn_variants import SWIGLU, gated_width
from elas.command import Parser
from elas.config import Config, ffn_width, load_config, presets
from elas.console import LiveLine, table
from elas.errors import UserError
from elas.files import write_json
from elas.model.transformer_config import DTYPES

NAMES = ["full", "lowrank_gathered", "bottleneck"]
BOUNDS = {"float32": 1e-5, "bfloat16": 5e-2}
"""Largest error of the naive layer against ours: the same sums in another order, in bf16 of rounded partial sums."""
TIMEOUT_S = 300.0


def main(argv: list[str]) -> int:
    """Run `elas bench comm`.

    Args:
        argv: arguments after the command.

    Returns:
        Exit status: 0, or 1 if a count differs from its formula or the naive layer from ours.
    """
    parser = Parser(
        "elas bench comm",
        "Bytes that a transformer layer sends within a tensor-parallel group; starts its own ranks.",
        "elas bench comm --tp 2 --preset 60m",
    )
    parser.add_argument("--tp", type=int, default=2, metavar="T", help="tensor-parallel ranks (default: %(default)s)")
    parser.add_argument("--preset", default="60m", help="shape: " + ", ".join(presets()) + " (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="samples (default: %(default)s)")
    parser.add_argument("--seq", type=int, default=256, metavar="N", help="tokens a sample (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="counted rounds (default: %(default)s)")
    options = parser.parse_args(argv)
    arguments.choices("--preset", options.preset, presets())
    arguments.at_least("--tp", options.tp, 2)
    for name in ("batch", "seq", "repeats"):
        arguments.at_least(f"--{name}", getattr(options, name), 1)
    cases = [(name, sequence) for name in NAMES for sequence in (False, True)]
    configs = {case: case_config(*case, options) for case in cases}
    rank = configs["bottleneck", False].low_rank.rank
    if rank % options.tp:
        raise UserError(f"--tp {options.tp}: lowrank_gathered splits the rank {rank}; give a divisor of it")
    if accelerator.has_cuda() and torch.cuda.device_count() < options.tp:
        raise UserError(f"--tp {options.tp}: there are {torch.cuda.device_count()} GPUs; give fewer ranks")
    rows = _on_ranks(options.tp, configs, options.repeats)
    facts = {**arguments.environment(), "tp": options.tp, "preset": options.preset, "dtype": options.dtype}
    facts |= {"batch": options.batch, "seq": options.seq, "repeats": options.repeats, "rows": rows}
    write_json(options.json, facts)
    _print(facts)
    return 1 if any(row["step_ms"] is None for row in rows) else 0


def case_config(name: str, sequence: bool, options) -> Config:
    """The validated configuration of one row.

    Raises:
        ConfigError: the preset does not split over the ranks.
    """
    from elas.config.rules import validate

    values: dict[str, object] = {
        "parallel.tensor": options.tp,
        "parallel.sequence": sequence,
        "train.dtype": options.dtype,
        "train.micro_batch_size": options.batch,
        "train.global_batch_size": options.batch,
        "model.seq_length": options.seq,
        "model.max_position_embeddings": None,
        "sparsity.dense_steps": 0,
    }
    preset = load_config(options.preset, {})
    padded = -(-preset.model.vocab_size // options.tp) * options.tp  # the benchmark has no embedding
    values["model.vocab_size"] = padded
    if name == "full":
        width = gated_width(preset) // options.tp * options.tp
        values |= {"low_rank.kind": "none", **SWIGLU, "model.ffn_hidden_size": width}
    config = load_config(options.preset, values)
    validate(config, options.tp)
    return config


def formula(name: str, sequence: bool, config: Config) -> tuple[dict[str, int], dict[str, int]]:
    """Values per token in collectives of the forward and the backward pass, by kind; see the module's docstring."""
    model, r = config.model, config.low_rank.rank
    h, f = model.hidden_size, ffn_width(config)
    g = h // model.num_attention_heads * (model.num_query_groups or model.num_attention_heads)
    if not sequence:
        reduced = {
            "full": (2 * h, 2 * h),
            "lowrank_gathered": (3 * h + 2 * g + f, 3 * h + f),
            "bottleneck": (2 * r, 4 * r),
        }
        forward, backward = reduced[name]
        return {"all_reduce": forward}, {"all_reduce": backward}
    return {
        "full": ({"all_gather": 2 * h, "reduce_scatter": 2 * h}, {"all_gather": 4 * h, "reduce_scatter": 2 * h}),
        "lowrank_gathered": (
            {"all_gather": 2 * h, "all_reduce": h + 2 * g + f, "reduce_scatter": 2 * h},
            {"all_gather": 2 * h, "all_reduce": h + f, "reduce_scatter": 2 * h},
        ),
        "bottleneck": ({"all_gather": 4 * r, "reduce_scatter": 2 * r}, {"all_gather": 2 * r, "reduce_scatter": 4 * r}),
    }[name]


def _on_ranks(t: int, configs: dict[tuple[str, bool], Config], repeats: int) -> list[dict]:
    """Start t processes; returns the rows of the first."""
    from torch.multiprocessing.spawn import spawn

    progress = LiveLine(every_s=measure.SILENCE_S)
    progress(f"starting {t} ranks")
    with tempfile.TemporaryDirectory(prefix="elas-bench-") as folder:
        spawn(_rank, (t, folder, configs, repeats), nprocs=t)  # ends all ranks if one fails
        progress.clear()
        return json.loads((Path(folder) / "rows.json").read_text())


def _rank(rank: int, t: int, folder: str, configs: dict[tuple[str, bool], Config], repeats: int) -> None:
    """The entry point of one rank."""
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(t))
    accelerator.prepare()
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS.*")  # a library should not set it
    from elas import parallel
    from elas.config import ParallelConfig

    if accelerator.has_cuda():
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // t))
    dist.init_process_group(
        accelerator.backend(),
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=t,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    parallel.initialize(ParallelConfig(tensor=t), seed=0)
    rows = measure_cases(
        t, rank, configs, repeats, LiveLine(every_s=measure.SILENCE_S) if rank == 0 else lambda text: None
    )
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    parallel.leave()


def measure_cases(t: int, rank: int, configs: dict[tuple[str, bool], Config], repeats: int, progress) -> list[dict]:
    """Rows on this rank; Megatron's groups of t tensor-parallel ranks must exist."""
    from elas.bench import comm_layers

    device = accelerator.device()
    rows, jobs, outputs = {}, {}, {}
    for case, config in configs.items():
        name, sequence = case
        layer, x, angles = _layer(name, config, t, rank, device)
        forward, backward = comm_layers.CountCollectives(), comm_layers.CountCollectives()
        outputs[case] = comm_layers.forward_backward(layer, x, angles, forward, backward)
        tokens = config.train.micro_batch_size * config.model.seq_length
        value = tokens * x.element_size()
        said = formula(name, sequence, config)
        counted = tuple({kind: size / value for kind, size in c.sizes.items()} for c in (forward, backward))
        sent = sum(comm_layers.ring_share(kind, t) * n for values in said for kind, n in values.items())
        rows[case] = {
            "variant": name,
            "sequence_parallel": sequence,
            "fwd_bytes_per_token_layer": forward.sent(t) / tokens,
            "bwd_bytes_per_token_layer": backward.sent(t) / tokens,
            "formula_bytes": sent * x.element_size(),
            "step_ms": None,
            "fwd_values": counted[0],
            "bwd_values": counted[1],
            "matches": counted == said,
        }
        jobs[case] = (layer, x, angles)
    for sequence in (False, True):
        ours, naive = outputs["bottleneck", sequence], outputs["lowrank_gathered", sequence]
        error = max(measure.rms_error(a, b) for a, b in zip(naive, ours))
        rows["lowrank_gathered", sequence]["rel_err"] = error
        worst = torch.tensor(error, device=device)
        torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)  # so that all ranks time the same layers
        rows["lowrank_gathered", sequence]["matches"] &= float(worst) < BOUNDS[configs["full", False].train.dtype]
    times = measure.in_turns(
        {str(case): lambda job=job: (measure.seconds(lambda: comm_layers.forward_backward(*job), device)[0],)
         for case, job in jobs.items() if rows[case]["matches"]},
        repeats=repeats,
        progress=progress,
    )  # fmt: skip
    progress("")
    for case, row in rows.items():
        if str(case) in times:
            row["step_ms"] = 1e3 * times[str(case)][0]
    return list(rows.values())


def _layer(name: str, config: Config, t: int, rank: int, device: torch.device):
    """A layer with weights that are the same for every split, its input on this rank, and rotary angles.

    2:4 is off: it does not change the communication, and near ties would be pruned differently.
    """
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.transformer.spec_utils import build_module

    from elas.bench.comm_layers import NaiveLowRankLayer
    from elas.model.activation import set_sparse
    from elas.model.shards import full_shape, shard
    from elas.model.spec import ElasSpecProvider, layer_spec
    from elas.model.transformer_config import transformer_config

    megatron = transformer_config(config)
    layer: Any = build_module(layer_spec(ElasSpecProvider(name != "full")), config=megatron, layer_number=1)
    generator = torch.Generator().manual_seed(6)
    whole = {}
    for key, parameter in layer.named_parameters():
        shape = full_shape(parameter, t)
        value = torch.randn(shape, generator=generator) / shape[-1] ** 0.5 if len(shape) > 1 else torch.ones(shape)
        whole[key] = value.to(device, parameter.dtype)
        parameter.data.copy_(shard(whole[key], parameter, t, rank))
    if name == "lowrank_gathered":
        layer = NaiveLowRankLayer(megatron, whole, t, rank)
    set_sparse([layer], False)
    shape = (config.model.seq_length, config.train.micro_batch_size, config.model.hidden_size)
    x = torch.randn(shape, generator=generator).to(device, megatron.params_dtype)
    head = config.model.hidden_size // config.model.num_attention_heads
    angles = RotaryEmbedding(head, 1.0, rotary_base=config.model.rotary_base)(config.model.seq_length)
    return layer, x.chunk(t)[rank].contiguous() if config.parallel.sequence else x, angles


def _print(facts: dict) -> None:
    print(f"{facts['device']}, torch {facts['torch']}; {facts['tp']} ranks; {facts['preset']} layer, {facts['dtype']}, "
          f"{facts['batch']} × {facts['seq']} tokens, medians of {facts['repeats']}")  # fmt: skip
    headers = ["variant", "sequence parallel", "forward B", "backward B", "both B", "formula B", "step ms"]
    cells = []
    for row in facts["rows"]:
        forward, backward = row["fwd_bytes_per_token_layer"], row["bwd_bytes_per_token_layer"]
        numbers = [f"{n:,.0f}" for n in (forward, backward, forward + backward, row["formula_bytes"])]
        step = show.milliseconds(row["step_ms"]) if row["matches"] else "WRONG"
        cells.append([row["variant"], "yes" if row["sequence_parallel"] else "no", *numbers, step])
    print(table(headers, cells, left=2))
    print("bytes that a rank sends in rings per token and layer; step: forward and backward of the layer")
    by_case = {(r["variant"], r["sequence_parallel"]): r["formula_bytes"] for r in facts["rows"]}
    for sequence in (False, True):
        ours = by_case["bottleneck", sequence]
        parts = [f"{name} {by_case[name, sequence] / ours:.2f} ×" for name in ("full", "lowrank_gathered")]
        print(f"{'with' if sequence else 'without'} sequence parallelism: {' and '.join(parts)} what bottleneck sends")
