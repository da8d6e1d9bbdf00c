"""`elas bench ffn`: forward and backward of variants of the whole feed-forward layer, `x [n, h]` to `y [n, h]`.

Legend: n tokens, h hidden.

Columns of a row:

- `fwd_ms`, `bwd_ms`: medians of rounds in turns; on a GPU its own time, and `host_ms` what Python takes to submit both.
- `tflops`, `peak_share`, `bandwidth_share`: of the six products with each weight, the chip's dense bf16 peak, and its
  memory's for x, y, their gradients, weights and weight gradients, each moved once.
- `saved_bytes`: saved for the backward pass, without parameters and x.
- `peak_bytes`: peak allocation of a forward and backward pass, above parameters, x and dy.
- `rel_err`: RMS error against the variant's formula in fp64, the largest over y, dx and all weight gradients. If it
  exceeds its bound, the row has no time and the exit status is 1.

The check runs at the timed size. Its upstream gradient is zero except for a few hundred tokens spread over all, so the
formula is computed for those alone; the other tokens must contribute zero to the weight gradients.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch

from elas import accelerator
from elas.bench import arguments, ffn_variants, measure, roofline, show
from elas.bench.arguments import DTYPES
from elas.bench.ffn_variants import COMPILED, ON_REQUEST, VARIANTS, Variant
from elas.bench.one_process import one_process
from elas.command import Parser
from elas.config import load_config, presets
from elas.console import LiveLine, table
from elas.errors import ConfigError
from elas.files import write_json
from elas.model.ffn import ElasFFN

BOUNDS = {"float32": 3e-6, "bfloat16": 1e-2}
"""Bounds of `rel_err`: up to ten thousand roundings of 6e-8 partly cancel to about 1e-6; in bf16 the gradient of the
first factor passes five tensors rounded to 8 bits, 1e-3 each. A wrong mask gives 0.1 or more."""
CHECKED_TOKENS = 384
RATIOS = [
    ("time", "elas_fused", "lowrank_relu2"),
    ("time", "elas_fused", "elas_eager"),
    ("time", "elas_compressed", "lowrank_relu2"),
    ("time", "full_swiglu", "elas_fused"),
    ("time", "elas_fused", "lowrank_relu2_compiled"),
    ("time", "elas_compressed", "lowrank_relu2_compiled"),
    ("time", "elas_fused", "full_swiglu_compiled"),
    ("time", "elas_compressed", "full_swiglu_compiled"),
    ("time", "elas_fused", "full_swiglu_liger"),
    ("saved_bytes", "elas_fused", "lowrank_relu2"),
    ("saved_bytes", "elas_compressed", "lowrank_relu2"),
    ("peak_bytes", "elas_fused", "lowrank_relu2"),
]


def main(argv: list[str]) -> int:
    """Run `elas bench ffn`.

    Args:
        argv: arguments after the command.

    Returns:
        Exit status: 0, or 1 if a variant has wrong results, or none can run here.
    """
    parser = Parser(
        "elas bench ffn",
        "Forward and backward of the feed-forward layer: full rank, low rank, and 2:4 with eager, compressed or fused "
        "memory.",
        "elas bench ffn --shapes 60m,350m --dtypes float32 --tokens 1024",
    )
    parser.add_argument("--shapes", default="60m,350m,1b", help="presets, separated by commas (default: %(default)s)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="default: %(default)s")
    others = f"default: all but {', '.join(ON_REQUEST)}; on a GPU also {', '.join(COMPILED)}"
    parser.add_argument("--variants", help=others)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    parser.add_argument("--tokens", type=int, default=4096, metavar="T", help="tokens in x (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="counted rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    options = parser.parse_args(argv)
    shapes = arguments.choices("--shapes", options.shapes, presets())
    dtypes = arguments.dtypes(options.dtypes)
    known = {**VARIANTS, **COMPILED, **ON_REQUEST}
    arguments.use_device(options.device)
    usual = [*VARIANTS, *(COMPILED if accelerator.has_cuda() else ())]
    names = arguments.choices("--variants", options.variants or ",".join(usual), list(known))
    for option, value in (("--tokens", options.tokens), ("--repeats", options.repeats), ("--threads", options.threads)):
        arguments.at_least(option, value, 1)
    threads_before = torch.get_num_threads()
    if options.threads:
        torch.set_num_threads(options.threads)
    progress = LiveLine(every_s=measure.SILENCE_S)
    rows, notes, facts = [], [], {}
    try:
        with one_process(), ffn_variants.topk_registered():
            for shape in shapes:
                for dtype in dtypes:
                    more, said = _cell(shape, dtype, names, options.tokens, options.repeats, progress)
                    rows, notes = rows + more, notes + said
                    facts = {**arguments.environment(), "tokens": options.tokens, "repeats": options.repeats}
                    facts |= {"rows": rows, "ratios": ratios(rows), "notes": notes}
                    if options.json is not None and (options.json.is_file() or not options.json.exists()):
                        write_json(options.json, facts)  # lest a run that is cut off leave nothing
    finally:
        torch.set_num_threads(threads_before)
    progress.clear()
    write_json(options.json, facts)
    _print(facts)
    return 1 if not rows or any(row["fwd_ms"] is None for row in rows) else 0


def _cell(
    shape: str, dtype: str, names: list[str], tokens: int, repeats: int, progress: Callable[[str], None]
) -> tuple[list[dict], list[str]]:
    """Rows of one shape and dtype, and notes on missing variants or times."""
    device = accelerator.device()
    hidden = load_config(shape, {}).model.hidden_size
    generator = torch.Generator().manual_seed(1)
    x, dy = (
        torch.randn(tokens, 1, hidden, generator=generator).to(device, DTYPES[dtype]) for _ in range(2)
    )  # Megatron's order: sequence, batch, hidden
    x.requires_grad_()
    layers, rows, notes = {}, {}, []
    for name in names:
        variant = {**VARIANTS, **COMPILED, **ON_REQUEST}[name]
        progress(f"{shape} {dtype} {name}: checking")
        try:
            layer = ffn_variants.build(variant, shape, dtype)
            implementation = ffn_variants.implementation(variant, layer)
        except ConfigError as error:
            notes.append(f"{shape} {dtype} {name}: left out: {error}")
            continue
        row = {"shape": shape, "dtype": dtype, "variant": name, "fwd_ms": None, "bwd_ms": None}
        row |= {"saved_bytes": None, "peak_bytes": None, "rel_err": check(variant, layer, x)}
        error, bound = row["rel_err"], BOUNDS[dtype]
        rows[name] = row | {"bound": bound, "implementation": implementation}
        if error > bound:
            notes.append(f"{shape} {dtype} {name}: WRONG, error {error:.1e} above {bound:.0e}: not timed")
            continue
        ffn_variants.fill(layer, 2, ranked=False)
        layers[name] = layer
        rows[name] |= _bytes(layer, x, dy)
    times = measure.in_turns(
        {name: _job(layer, x, dy) for name, layer in layers.items()},
        repeats=repeats,
        progress=lambda text: progress(f"{shape} {dtype} {text}"),
    )
    for name, (forward, backward, host) in times.items():
        weights = sum(p.numel() for p in layers[name].parameters())
        least = x.element_size() * (5 * x.numel() + 3 * weights)
        rows[name] |= {"fwd_ms": 1e3 * forward, "bwd_ms": 1e3 * backward, "host_ms": 1e3 * host}
        rows[name] |= roofline.shares(6.0 * tokens * weights, least, forward + backward, dtype, device)
    layers.clear()
    gc.collect()
    return list(rows.values()), notes


def check(variant: Variant, layer: ElasFFN, x: torch.Tensor) -> float:
    """Largest error of the layer against its formula; sets the layer's weights.

    Args:
        variant: has the formula.
        layer: the module.
        x: `[n, 1, h]`, requiring grad.

    Returns:
        The largest RMS error, relative to the RMS of the true value, over y, dx and the weights' gradients.
    """
    ffn_variants.fill(layer, 3, ranked=True)
    n = x.shape[0]
    rows = torch.linspace(0, n - 1, min(n, CHECKED_TOKENS)).long().unique().to(x.device)
    dy = torch.zeros_like(x)
    generator = torch.Generator().manual_seed(4)
    dy[rows] = torch.randn(len(rows), *x.shape[1:], generator=generator).to(x)
    y, _ = layer(x)
    y.backward(dy)
    assert x.grad is not None
    got = {"y": y.detach()[rows, 0], "dx": x.grad[rows, 0]} | {name: p.grad for name, p in layer.named_parameters()}
    weights = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    few = x.detach()[rows, 0].double().requires_grad_()
    true = ffn_variants.formula(variant, weights, few)
    true.backward(dy[rows, 0].double())
    want: dict[str, Any] = {"y": true.detach(), "dx": few.grad} | {name: w.grad for name, w in weights.items()}
    elsewhere = x.grad.index_fill(0, rows, 0).count_nonzero()  # a token without gradient has no dx
    _forget(layer, x)
    return float("inf") if elsewhere else max(measure.rms_error(got[name], want[name]) for name in want)


def _forget(layer: ElasFFN, x: torch.Tensor) -> None:
    x.grad = None
    layer.zero_grad(set_to_none=True)


def _bytes(layer: ElasFFN, x: torch.Tensor, dy: torch.Tensor) -> dict[str, int]:
    """Saved and peak bytes of a forward and backward pass, after one that builds and caches."""
    _job(layer, x, dy)()
    saved = measure.SavedBytes([x, *layer.parameters()])
    with saved.hooks():
        layer(x)
    with measure.Memory(x.device) as memory:
        y, _ = layer(x)
        y.backward(dy)
        del y
    _forget(layer, x)
    return {"saved_bytes": saved.total, "peak_bytes": memory.peak}


def _job(layer: ElasFFN, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], tuple[float, ...]]:
    """A function that runs forward and backward and returns their times, and the host's."""

    def job() -> tuple[float, ...]:
        forward, forward_host, (y, _) = measure.gpu_seconds(lambda: layer(x), x.device)
        backward, backward_host, _ = measure.gpu_seconds(lambda: y.backward(dy), x.device)
        _forget(layer, x)
        return forward, backward, forward_host + backward_host

    return job


def ratios(rows: list[dict]) -> list[dict]:
    """Ratios of the costs of two variants, by shape and dtype; `time` is forward plus backward."""
    cells: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        cells.setdefault((row["shape"], row["dtype"]), {})[row["variant"]] = row
    found = []
    for (shape, dtype), cell in cells.items():
        for what, over, under in RATIOS:
            values = [_value(cell.get(name), what) for name in (over, under)]
            if None not in values and values[1]:
                key = {"shape": shape, "dtype": dtype, "what": what, "of": over, "to": under}
                found.append({**key, "ratio": values[0] / values[1]})
    return found


def _value(row: dict | None, what: str) -> Any:
    if row is None or row["fwd_ms"] is None:
        return None
    return row["fwd_ms"] + row["bwd_ms"] if what == "time" else row[what]


def _share(row: dict, key: str) -> str:
    value = row.get(key)
    return "–" if value is None else f"{100 * value:.0f}"


def _print(facts: dict) -> None:
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}; {facts['tokens']} tokens, medians "
          f"of {facts['repeats']}")  # fmt: skip
    on_gpu = any(row.get("peak_share") is not None for row in facts["rows"])
    headers = ["shape", "dtype", "variant", "runs", "fwd ms", "bwd ms"] + ["host ms", "% peak", "% bw"] * on_gpu
    headers += ["saved MiB", "peak MiB", "rel err"]
    cells = [
        [row["shape"], row["dtype"], row["variant"], row["implementation"] or "–"]
        + [show.milliseconds(row[key]) for key in ("fwd_ms", "bwd_ms")]
        + [show.milliseconds(row.get("host_ms")), _share(row, "peak_share"), _share(row, "bandwidth_share")] * on_gpu
        + [show.mebibytes(row[key]) for key in ("saved_bytes", "peak_bytes")]
        + [f"{row['rel_err']:.1e}" + (" WRONG" if row["fwd_ms"] is None else "")]
        for row in facts["rows"]
    ]
    print(table(headers, cells, left=4))
    if on_gpu:
        print("host: what Python takes to submit both; % peak: of the chip's dense bf16 FLOP/s; % bw: of its memory's")
    print("saved: for the backward pass, without parameters and x; peak: above parameters, x and dy; rel err: against")
    print("fp64, largest over y, dx and weight gradients\n")
    print(show.ratio_table(facts["ratios"], ("shape", "dtype")))
    for note in facts["notes"]:
        print(f"note: {note}")
