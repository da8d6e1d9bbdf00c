"""`elas bench step`: a whole training step, forward, backward and optimizer, in one process.

Columns of a row:

- `tokens_per_s`, `step_ms`: from the median of rounds in turns.
- `saved_bytes`: what the transformer layers keep for the backward pass (`elas.bench.account`).
- `resident_bytes`: weights and optimizer state; `step_bytes`: the peak of what a step allocates; `peak_bytes`: both;
  `above_bytes`: the peak of a step without gradients of weights.
- `head_bytes`: the peak of what head and loss allocate in the forward pass; `peak_parts`: what the step's peak consists
  of.
- `measured`, `predicted`: each part at its largest, and by `elas.plan.memory`.

Our variants run in `elas.engine.engine.Engine`, as in training: DeepSpeed, with fp32 master weights in bf16. All
variants get the same tokens, and AdamW whatever the preset's optimizer is. Loss and gradient norm of the first step
must equal those of a plain model with the same weights and eager 2:4 under autograd; for `hf_llama` those of Megatron's
full-rank model. If they differ, the row has no speed and the exit status is 1.
"""

import gc
import math
from collections.abc import Callable
from typing import Any

import torch

from elas import accelerator
from elas.bench import arguments, measure, roofline, step_report
from elas.bench.account import measure_step
from elas.bench.one_process import one_process
from elas.command import Parser
from elas.config import Config, presets
from elas.console import LiveLine
from elas.files import write_json
from elas.plan import memory
from elas.plan.flops import model_flops

TOLERANCE = {"float32": (2e-5, 1e-3), "bfloat16": (2e-3, 3e-2)}
"""Relative tolerances of loss and gradient norm. Where z is rounded differently, 2:4 decides near ties differently,
which limits that of the norm; a wrong gradient of one factor changes the norm by more."""
NAMES = ["hf_llama", "full_swiglu", "lowrank_swiglu", "lowrank_relu2", "elas"]
ON_GPU = ["hf_llama_compiled"]
"""The same Llama under torch.compile."""
ON_REQUEST = {
    "hf_llama_fused": "transformers' Llama with the fused AdamW that ours uses, instead of torch's default",
    "hf_llama_checkpointed": "the same Llama with gradient checkpointing",
    "full_swiglu_logits": "full_swiglu with Megatron's loss, which keeps tokens × vocabulary",
    "elas_kept": "elas with train.recompute none",
    "elas_layer": "elas with train.recompute layer",
}
FUSED = ["hf_llama_fused", "hf_llama_compiled"]
RATIOS = [
    ("tokens_per_s", "full_swiglu", "hf_llama"),
    ("tokens_per_s", "full_swiglu", "hf_llama_fused"),
    ("tokens_per_s", "elas", "full_swiglu"),
    ("tokens_per_s", "elas", "lowrank_relu2"),
    ("tokens_per_s", "elas", "hf_llama"),
    ("tokens_per_s", "elas", "hf_llama_compiled"),
    ("saved_bytes", "elas", "full_swiglu"),
    ("saved_bytes", "elas", "lowrank_relu2"),
    ("peak_bytes", "elas", "full_swiglu"),
    ("tokens_per_s", "elas", "elas_kept"),
    ("saved_bytes", "elas", "elas_kept"),
    ("tokens_per_s", "elas_layer", "elas_kept"),
    ("saved_bytes", "elas_layer", "elas_kept"),
    ("above_bytes", "elas", "full_swiglu_logits"),
    ("head_bytes", "full_swiglu", "full_swiglu_logits"),
    ("above_bytes", "elas", "hf_llama"),
    ("above_bytes", "elas", "hf_llama_checkpointed"),
    ("tokens_per_s", "elas", "hf_llama_checkpointed"),
]


def main(argv: list[str]) -> int:
    """Run `elas bench step`.

    Args:
        argv: arguments after the command.

    Returns:
        Exit status: 0, or 1 if the first step of a variant is wrong.
    """
    options = _parser().parse_args(argv)
    arguments.choices("--preset", options.preset, _presets())
    dtypes = arguments.dtypes(options.dtypes)
    arguments.use_device(options.device)
    on_gpu = accelerator.has_cuda()
    options.batch = (64 if on_gpu else 4) if options.batch is None else options.batch
    usual = ",".join(NAMES + ON_GPU * on_gpu)
    names = arguments.choices("--variants", options.variants or usual, [*NAMES, *ON_GPU, *ON_REQUEST])
    for name in ("layers", "batch", "seq", "threads"):
        arguments.at_least(f"--{name}", getattr(options, name), 1)
    arguments.at_least("--repeats", options.repeats, 0)
    from elas.bench.step_models import Shape, refuse_if_too_large, variant_config

    shape = Shape(options.preset, options.layers, options.batch, options.seq, options.zero)
    configs = {dtype: {name: variant_config(name, shape, dtype) for name in names} for dtype in dtypes}
    for of_dtype in configs.values():
        refuse_if_too_large(of_dtype)
    threads_before = torch.get_num_threads()
    if options.threads:
        torch.set_num_threads(options.threads)
    progress = LiveLine(every_s=measure.SILENCE_S)
    rows = []
    try:
        with one_process() as layout:
            for of_dtype in configs.values():
                rows += _rows(of_dtype, layout, options.repeats, progress)
        facts = {**arguments.environment(), **vars(shape), "repeats": options.repeats}
    finally:
        torch.set_num_threads(threads_before)
    progress.clear()
    facts |= {"rows": rows, "ratios": ratios(rows)}
    write_json(options.json, facts)
    step_report.show_facts(facts)
    return 1 if any(row["wrong"] for row in rows) else 0


def _presets() -> list[str]:
    """Those whose shape every variant can take: a variant of a preset has the preset's shape."""
    return [name for name in presets() if "-" not in name]


def _parser() -> Parser:
    parser = Parser(
        "elas bench step",
        "A whole training step of transformers' Llama and of our variants: full rank, low rank, 2:4.",
        "elas bench step --preset 350m --layers 8 --dtypes float32",
    )
    parser.add_argument("--preset", default="350m", help="shape: " + ", ".join(_presets()) + " (default: %(default)s)")
    parser.add_argument("--layers", type=int, metavar="N", help="transformer layers (default: the preset's)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="default: %(default)s")
    others = f"default: {', '.join(NAMES)}, on a GPU also {ON_GPU[0]} (the same Llama through torch.compile); besides: "
    others += "; ".join(f"{name}: {what}" for name, what in ON_REQUEST.items())
    parser.add_argument("--variants", help=others)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    parser.add_argument("--batch", type=int, metavar="N", help="samples a step (default: 4; on a GPU 64)")
    parser.add_argument("--seq", type=int, default=256, metavar="N", help="tokens a sample (default: %(default)s)")
    zero = "ZeRO stage of our variants (default: 0, as `elas train` chooses for one rank)"
    parser.add_argument("--zero", type=int, default=0, choices=(0, 1), help=zero)
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="counted rounds (default: %(default)s); 0: memory only"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    return parser


def _rows(configs: dict, layout, repeats: int, progress: Callable[[str], None]) -> list[dict]:
    """Build, check and measure every variant of one dtype."""
    config = next(iter(configs.values()))
    device, dtype = accelerator.device(), config.train.dtype
    tokens = config.train.micro_batch_size * config.model.seq_length
    batch = _batch(config, device)
    models, rows, expected = {}, {}, {}
    for name, config in configs.items():
        progress(f"{dtype} {name}: building and checking")
        models[name], rows[name] = _build(name, config, layout, batch, device, expected)
    for name, model in models.items():
        progress(f"{dtype} {name}: memory")
        rows[name] |= _bytes(model, batch, device, rows[name]["resident_bytes"], configs[name])
    correct = {name: model for name, model in models.items() if not rows[name]["wrong"]}
    times = measure.in_turns(
        {name: lambda model=model: (measure.seconds(lambda: model.step(batch), device)[0],)
         for name, model in correct.items()},
        repeats=repeats,
        warmup=1 if device.type == "cuda" else 0,  # each has taken two steps; a GPU's clock may have fallen since
        progress=lambda text: progress(f"{dtype} {text}"),
    ) if repeats else {}  # fmt: skip
    for name, (median,) in times.items():
        rows[name] |= {"tokens_per_s": tokens / median, "step_ms": 1e3 * median}
        work = model_flops(configs[name]).training * tokens
        least = 28.0 * rows[name]["params"]  # bytes of weights, gradients and AdamW's state
        rows[name] |= roofline.shares(work, least, median, dtype, device)
    models.clear()
    correct.clear()
    gc.collect()  # engines have reference cycles
    return list(rows.values())


def _batch(config, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (config.train.micro_batch_size, config.model.seq_length + 1)
    ids = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(5))
    return ids[:, :-1].contiguous().to(device), ids[:, 1:].contiguous().to(device)


def _build(name: str, config, layout, batch, device: torch.device, known: dict) -> tuple[object, dict]:
    """The model after its first step, and its row without speeds; `known`: expected results of models so far."""
    from elas.bench.step_models import Ours, first_step, plain_model
    from elas.bench.step_peer import HfLlama
    from elas.engine.engine import Engine

    dtype = config.train.dtype
    plain = plain_model(config)
    what = repr((config.model, config.low_rank, config.sparsity))
    if what not in known:
        known[what] = first_step(plain, batch)
    expected = known[what]
    with measure.Memory(device) as built:
        if name.startswith("hf_llama"):
            ways = {"fused": name in FUSED, "compiled": name in ON_GPU, "checkpointed": name.endswith("checkpointed")}
            model = HfLlama(config, plain, **ways)
        else:
            model = Ours(Engine(config, layout), with_logits=name.endswith("_logits"))
        got = model.step(batch)
    del plain
    ok = all(
        math.isfinite(a) and abs(a - b) <= tolerance * abs(b)
        for a, b, tolerance in zip(got, expected, TOLERANCE[dtype])
    )
    row = {"variant": name, "dtype": dtype, "tokens_per_s": None, "step_ms": None, "saved_bytes": None}
    row |= {"peak_bytes": None, "resident_bytes": built.kept, "params": sum(p.numel() for p in model.parameters())}
    row |= {"ffn_memory": config.sparsity.ffn_memory if name == "elas" else None, "wrong": not ok}
    row |= {"loss": got[0], "expected_loss": expected[0], "grad_norm": got[1], "expected_grad_norm": expected[1]}
    return model, row


def _bytes(model, batch, device: torch.device, resident: int, config: Config) -> dict[str, Any]:
    from elas.model.transformer_config import DTYPES

    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    account = measure_step(lambda: model.step(batch), model, device)
    found = {
        "saved_bytes": account.layers,
        "head_bytes": account.head,
        "step_bytes": account.peak,
        "above_bytes": account.above,
    }
    found |= {"peak_bytes": resident + account.peak, "peak_parts": account.parts, "weight_bytes": weights}
    expected = memory.estimate(config, 1)
    tokens, e = config.train.micro_batch_size * config.model.seq_length, DTYPES[config.train.dtype].itemsize
    kept = int(tokens * config.model.num_layers * memory.token_bytes(config, e))
    predicted = {name: getattr(expected, name) for name in ("weights", "optimizer", "gradients")}
    predicted |= {"layers": kept, "head": expected.head}
    measured = {"weights": weights, "optimizer": resident - weights, "gradients": account.gradients}
    measured |= {"layers": account.layers, "head": account.head}
    return found | {"predicted": predicted, "measured": measured}


def ratios(rows: list[dict]) -> list[dict]:
    """Ratios of two variants, by dtype."""
    by_key = {(row["dtype"], row["variant"]): row for row in rows}
    found = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for what, of, to in RATIOS:
            over, under = by_key.get((dtype, of)), by_key.get((dtype, to))
            if over and under and not over["wrong"] and not under["wrong"] and over[what] and under[what]:
                ratio = over[what] / under[what]
                found.append({"dtype": dtype, "what": what, "of": of, "to": to, "ratio": ratio})
    return found
