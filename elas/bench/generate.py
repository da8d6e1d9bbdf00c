"""`elas bench generate`: prefill and decode apart, of full-rank, low-rank and 2:4-sparse models side by side.

What a row says. `prefill_tokens_per_s` and `ttft_ms`: a forward pass over `context` tokens of each of `batch` prompts,
to the logits of the last token. `decode_tokens_per_s`: one token for each of `batch` texts at a time, after `context`
tokens. Both from medians over rounds in turns. `peak_bytes`: weights, cache, and the most that a prefill allocates on
top. `kv_bytes_per_token`: of the cache, per token of one text. `bandwidth_share`: bytes that decoding must read in a
second (weights but for the embedding, and the cache), over what this machine reads in a plain sum, measured in the same
run; where only live rows are read, fewer bytes are read than it counts.

Weights are random: half of the features of a squared ReLU are zero, where trained models have more.
"""

import gc
import json

import torch

from elas import accelerator
from elas.bench import arguments, measure, show
from elas.command import Parser
from elas.config import presets
from elas.console import LiveLine, table
from elas.files import write_json

VARIANTS = ["hf_llama", "full_swiglu", "lowrank_relu2", "elas", "elas_latent", "dense_export"]
OF_STEP = {"elas_latent": "elas", "dense_export": "elas"}
"""Variants whose configuration is that of another one of `elas bench step`."""
RATIOS = [
    ("decode_tokens_per_s", "lowrank_relu2", "full_swiglu"),
    ("decode_tokens_per_s", "elas", "lowrank_relu2"),
    ("decode_tokens_per_s", "elas", "hf_llama"),
    ("decode_tokens_per_s", "elas_latent", "elas"),
    ("decode_tokens_per_s", "elas", "dense_export"),
    ("prefill_tokens_per_s", "elas", "full_swiglu"),
    ("kv_bytes_per_token", "elas_latent", "full_swiglu"),
]


def main(argv: list[str]) -> int:
    """Run `elas bench generate`; returns 0, raises `UserError` for mistakes."""
    options = _parser().parse_args(argv)
    arguments.choices("--preset", options.preset, presets())
    dtypes = arguments.dtypes(options.dtypes)
    names = arguments.choices("--variants", options.variants, VARIANTS)
    batches = arguments.counts("--batches", options.batches)
    contexts = arguments.counts("--contexts", options.contexts)
    for name in ("layers", "new-tokens", "repeats", "threads", "limit-s"):
        arguments.at_least(f"--{name}", getattr(options, name.replace("-", "_")), 1)
    before = torch.get_num_threads()
    if options.threads:
        torch.set_num_threads(options.threads)
    progress, rows = LiveLine(every_s=measure.SILENCE_S), []
    try:
        bandwidth = _bandwidth()
        for dtype in dtypes:
            rows += _Cells(options, dtype, bandwidth, progress).rows(names, batches, contexts)
        facts = {**arguments.environment(), "preset": options.preset, "layers": options.layers}
        facts |= {"repeats": options.repeats, "new_tokens": options.new_tokens, "bandwidth_bytes_per_s": bandwidth}
    finally:
        torch.set_num_threads(before)
        progress.clear()
    facts |= {"rows": rows, "ratios": _ratios(rows)}
    write_json(options.json, facts)
    _print(facts)
    print(json.dumps(facts))
    return 0


class _Cells:
    """Measures one dtype."""

    def __init__(self, options, dtype: str, bandwidth: float, progress: LiveLine):
        self._options, self._dtype, self._bandwidth, self._progress = options, dtype, bandwidth, progress
        self._device = accelerator.device()
        self._prefill_s_per_token = 0.0  # of the slowest variant, to foresee how long a cell takes

    def rows(self, names: list[str], batches: list[int], contexts: list[int]) -> list[dict]:
        """All of its rows; variants take turns in each cell."""
        from elas.bench.generate_models import build
        from elas.bench.step_models import Shape, variant_config

        longest = max(contexts) + self._options.new_tokens + 1
        shape = Shape(self._options.preset, self._options.layers, 1, min(longest, 256), 0)
        variants = []
        for name in names:
            self._progress(f"{self._dtype} {name}: building")
            config = variant_config(OF_STEP.get(name, name), shape, self._dtype)
            variants.append(build(name, config, longest, getattr(torch, self._dtype)))
        rows = [row for context in sorted(contexts) for batch in sorted(batches)
                for row in self._cell(variants, batch, context)]  # fmt: skip
        variants.clear()
        gc.collect()
        return rows

    def _cell(self, variants: list, batch: int, context: int) -> list[dict]:
        common = {"dtype": self._dtype, "batch": batch, "context": context}
        rows = {v.name: {"variant": v.name, **common, **self._sizes(v, batch, context)} for v in variants}
        too_much = self._too_much(rows, batch, context)
        if too_much:
            for row in rows.values():
                row |= dict.fromkeys(("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_ms", "peak_bytes"))
                row |= {"bandwidth_share": None, "not_run": too_much}
            return list(rows.values())
        ids = torch.randint(2, 1000, (batch, context), generator=torch.Generator().manual_seed(1)).to(self._device)
        for v in variants:
            self._progress(f"{self._dtype} {v.name} {batch} × {context}: memory")
            with measure.Memory(self._device) as memory:
                self._prefill(v, ids)
            rows[v.name]["peak_bytes"] = rows[v.name].pop("weight_bytes") + memory.peak
        prefill = self._in_turns(variants, lambda v: self._prefill_s(v, ids), f"{batch} × {context}: prefill", 1)
        self._prefill_s_per_token = max(max(prefill.values()) / ids.numel(), self._prefill_s_per_token)
        decode = self._in_turns(
            variants, lambda v: self._decode_s(v, batch, context), f"{batch} × {context}: decode", self._options.repeats
        )
        for name, row in rows.items():
            row["ttft_ms"] = 1e3 * prefill[name]
            row["prefill_tokens_per_s"] = ids.numel() / prefill[name]
            row["decode_tokens_per_s"] = batch / decode[name]
            row["bandwidth_share"] = row["bytes_per_step"] / decode[name] / self._bandwidth
            row["not_run"] = None
        return list(rows.values())

    def _in_turns(self, variants: list, job, what: str, repeats: int) -> dict[str, float]:
        found = measure.in_turns(
            {v.name: lambda v=v: (job(v),) for v in variants},
            repeats=repeats,
            warmup=0 if repeats == 1 else 1,
            progress=lambda text: self._progress(f"{self._dtype} {what} {text}"),
        )
        return {name: times[0] for name, times in found.items()}

    @torch.inference_mode()
    def _prefill(self, v, ids: torch.Tensor):
        return v.model(input_ids=ids, past_key_values=v.cache(), use_cache=True, logits_to_keep=1)

    def _prefill_s(self, v, ids: torch.Tensor) -> float:
        return measure.seconds(lambda: self._prefill(v, ids), self._device)[0]

    @torch.inference_mode()
    def _decode_s(self, v, batch: int, context: int) -> float:
        """Seconds of a token."""
        from elas.bench.generate_models import filled

        cache, ids = filled(v, batch, context), torch.ones(batch, 1, dtype=torch.int64, device=self._device)

        def steps() -> None:
            for _ in range(self._options.new_tokens):
                v.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

        v.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return measure.seconds(steps, self._device)[0] / self._options.new_tokens

    def _sizes(self, v, batch: int, context: int) -> dict:
        kv = v.kv_bytes_per_token
        weights = sum(p.numel() * p.element_size() for p in v.model.parameters())
        read = v.weight_bytes + kv * batch * context
        return {"kv_bytes_per_token": kv, "weight_bytes": weights, "bytes_per_step": read}

    def _too_much(self, rows: dict[str, dict], batch: int, context: int) -> str | None:
        """Why a cell is left out: it would take longer than allowed, or more memory than there is."""
        seconds = self._prefill_s_per_token * batch * context
        if seconds > self._options.limit_s:
            return f"a prefill would take about {seconds:.0f} s (--limit-s {self._options.limit_s})"
        from elas.bench.step_models import free_memory

        need = 3 * max(row["kv_bytes_per_token"] for row in rows.values()) * batch * context
        free = free_memory()
        if free is not None and need > 0.8 * free:
            return f"needs about {need / 1e9:.0f} GB for the cache and its growth"
        return None


def _bandwidth() -> float:
    """Bytes a second that a sum over a large tensor reads; the best of five."""
    device = accelerator.device()
    large = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    seconds = min(measure.seconds(large.sum, device)[0] for _ in range(5))
    return large.numel() * large.element_size() / seconds


def _ratios(rows: list[dict]) -> list[dict]:
    by_key = {(row["dtype"], row["batch"], row["context"], row["variant"]): row for row in rows}
    found = []
    for dtype, batch, context in dict.fromkeys(key[:3] for key in by_key):
        for what, of, to in RATIOS:
            over, under = (by_key.get((dtype, batch, context, name)) for name in (of, to))
            if over and under and over[what] and under[what]:
                case = {"dtype": dtype, "batch": batch, "context": context, "what": what, "of": of, "to": to}
                found.append(case | {"ratio": over[what] / under[what]})
    return found


def _print(facts: dict) -> None:
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}; a plain sum reads "
          f"{facts['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s")  # fmt: skip
    headers = ["variant", "dtype", "batch", "context", "prefill tok/s", "first ms", "decode tok/s", "bandwidth",
               "peak MiB", "KV B/token"]  # fmt: skip
    cells = [
        [
            row["variant"],
            row["dtype"],
            str(row["batch"]),
            str(row["context"]),
            *(_number(row[key]) for key in ("prefill_tokens_per_s", "ttft_ms", "decode_tokens_per_s")),
            "–" if row["bandwidth_share"] is None else f"{row['bandwidth_share']:.2f}",
            show.mebibytes(row["peak_bytes"]),
            f"{row['kv_bytes_per_token']:,}",
        ]
        for row in facts["rows"]
    ]
    print(table(headers, cells, left=2))
    for reason in dict.fromkeys((r["dtype"], r["batch"], r["context"], r["not_run"]) for r in facts["rows"]):
        if reason[3]:
            print(f"note: {reason[0]} {reason[1]} × {reason[2]}: not run, {reason[3]}")
    print()
    print(show.ratio_table(facts["ratios"], ("dtype", "batch", "context")))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _parser() -> Parser:
    parser = Parser(
        "elas bench generate",
        "Prefill and decode of full-rank, low-rank and ELAS models, and of transformers' Llama.",
        "elas bench generate --preset 350m --batches 1 --contexts 512",
    )
    add = parser.add_argument
    add("--preset", default="350m", help="shape: " + ", ".join(presets()) + " (default: %(default)s)")
    add("--layers", type=int, metavar="N", help="transformer layers (default: the preset's)")
    add("--dtypes", default="float32,bfloat16", help="default: %(default)s")
    add("--variants", default=",".join(VARIANTS), help="default: %(default)s")
    add("--batches", default="1,8,32", help="texts at a time (default: %(default)s)")
    add("--contexts", default="512,4096", help="tokens before the first new one (default: %(default)s)")
    add("--new-tokens", type=int, default=8, metavar="N", help="tokens of a round of decoding (default: %(default)s)")
    add("--repeats", type=int, default=5, metavar="N", help="counted rounds of decoding (default: %(default)s)")
    limit = "leave out cells whose prefill takes longer than this (default: %(default)s)"
    add("--limit-s", type=int, default=60, metavar="S", help=limit)
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    return parser
