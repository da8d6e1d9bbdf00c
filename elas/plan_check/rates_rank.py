"""On a rank: the rates of `elas.plan.rates.Rates`, with one rank busy and with all of them at the same time.

Each piece of work is repeated for a quarter of a second on every busy rank, after a barrier; the rate is that of the
median call, averaged over the busy ranks. Pieces are the operations that the model consists of, forward and backward.

Legend: n tokens, h hidden, f d_ff, r rank, V vocabulary.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from elas import accelerator, parallel
from elas.bench import measure
from elas.config import Config, ParallelConfig, ffn_width, load_config
from elas.model.transformer_config import DTYPES, transformer_config
from elas.optim.muon import orthogonalized
from elas.plan.rates import Rates
from elas.plan_check import host_rank, links_rank

WIDTHS = (64, 128, 256, 512)
"""Ranks that products of factors are measured at."""
TURN_S, LEAST_CALLS = 0.25, 3
TABLE = 2**24
"""fp32 values of a tensor that no cache holds."""
UPDATED = 2**23
"""Parameters of the optimizer's measurement."""

Call = Callable[[], object]


def on_rank(facts: dict[str, Any]) -> dict[str, Any]:
    """Rates by busy ranks and dtype, and links; `facts`: `preset`, `batch`, `seq`, `dtypes`."""
    layout = parallel.initialize(ParallelConfig(), seed=0)
    return rates_here(facts, host_rank.host(layout))


def rates_here(facts: dict[str, Any], host: host_rank.Host) -> dict[str, Any]:
    """The same in existing process groups of any layout, with what Python needs given."""
    rank, world = dist.get_rank(), dist.get_world_size()
    busy: dict[int, dict[str, Any]] = {}
    for count in sorted({1, world}):
        pace = Pace(count, rank)
        busy[count] = {dtype: dataclasses.asdict(_rates(facts, dtype, pace, host)) for dtype in facts["dtypes"]}
    return {"busy": busy, "links": links_rank.links(world), "device": accelerator.device().type}


class Pace:
    """Times calls on the busy ranks at the same time, while the others wait.

    Args:
        busy: the first so many ranks are.
        rank: this one.
    """

    def __init__(self, busy: int, rank: int):
        self._busy, self._active, self._device = busy, rank < busy, accelerator.device()

    def __call__(self, call: Call) -> float:
        """Seconds of a call: the median on each busy rank, averaged over them; the same on every rank."""
        times = [0.0]
        dist.barrier()
        if self._active:
            call()
            end, times = time.perf_counter() + TURN_S, []
            while len(times) < LEAST_CALLS or time.perf_counter() < end:
                times.append(measure.seconds(call, self._device)[0])
        total = torch.tensor(statistics.median(times), dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return float(total) / self._busy


def _rates(facts: dict[str, Any], dtype: str, pace: Pace, host: host_rank.Host) -> Rates:
    config = layer_config(facts, dtype)
    model, tokens = config.model, facts["batch"] * facts["seq"]
    h, f, vocabulary = model.hidden_size, ffn_width(config), model.vocab_size
    make = _Maker(DTYPES[dtype], tokens)
    few = min(tokens, 512)
    factor = {r: 6 * tokens * 2 * r * h / pace(make.pair(h, r)) for r in WIDTHS}
    core = {r: 14 * tokens * f * r / pace(make.core(f, r)) for r in WIDTHS}  # six products, and one again
    return Rates(
        full_rank=6 * tokens * h * 4 * h / pace(make.linear(h, 4 * h)),
        factor=factor,
        core=core,
        scores=6 * tokens * h * facts["seq"] / pace(make.scores(facts["batch"], model.num_attention_heads, h)),
        head=6 * few * h * vocabulary / pace(make.head(few, h, vocabulary)),
        bandwidth=12 * TABLE / pace(_adds()),
        fresh=4 * TABLE / pace(lambda: torch.empty(TABLE, device=accelerator.device()).fill_(1.0)),
        norm_s=pace(make.norms(config)) / (tokens * h),
        heads_s=pace(make.heads(config)) / (tokens * h),
        gate_s=pace(make.gate(f)) / (tokens * f),
        adam_s=pace(_adam()) / UPDATED,
        iteration=_iteration(pace, f),
        host_layer_s=host.layer_s,
        host_batch_s=host.batch_s,
        host_step_s=host.step_s,
    )


def layer_config(facts: dict[str, Any], dtype: str) -> Config:
    """One layer of the preset with 2:4, which keeps everything."""
    values = {"model.num_layers": 1, "model.seq_length": facts["seq"], "model.max_position_embeddings": None}
    values |= {"train.micro_batch_size": facts["batch"], "train.global_batch_size": facts["batch"]}
    return load_config(facts["preset"], {**values, "train.dtype": dtype, "train.recompute": "none",
                                         "sparsity.dense_steps": 0, "parallel.zero": 0})  # fmt: skip


class _OneRank:
    """Stands for a tensor-parallel group of one rank, in any layout."""

    def size(self) -> int:
        """One."""
        return 1

    def rank(self) -> int:
        """The first."""
        return 0


class _Maker:
    """Makes the pieces of work for so many tokens in a dtype: each a function that runs both passes."""

    def __init__(self, dtype: torch.dtype, tokens: int):
        self._dtype, self._tokens, self._device = dtype, tokens, accelerator.device()

    def _draw(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(shape, device=self._device).mul_(scale).to(self._dtype)
        return drawn.requires_grad_()

    def _both(self, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Call:
        dy = torch.randn_like(function(*inputs))

        def run() -> None:
            function(*inputs).backward(dy)
            for one in inputs:
                one.grad = None

        return run

    def linear(self, width: int, out: int) -> Call:
        """`x [n, width]` by a weight `[out, width]`."""
        return self._both(F.linear, self._draw(self._tokens, width), self._draw(out, width, scale=width**-0.5))

    def pair(self, h: int, r: int) -> Call:
        """`x [n, h]` by a pair of factors."""
        inputs = self._draw(self._tokens, h), self._draw(r, h, scale=h**-0.5), self._draw(h, r, scale=r**-0.5)
        return self._both(lambda x, a, b: F.linear(F.linear(x, a), b), *inputs)

    def core(self, f: int, r: int) -> Call:
        """The 2:4 FFN core, fused."""
        from elas.kernels.relu2_24 import Relu24Options, ffn_core

        inputs = self._draw(self._tokens, r), self._draw(f, r, scale=r**-0.5), self._draw(r, f, scale=f**-0.5)
        return self._both(lambda u, m, n: ffn_core(u, m, n, Relu24Options()), *inputs)

    def scores(self, batch: int, heads: int, h: int) -> Call:
        """Causal attention."""
        shape = batch, heads, self._tokens // batch, h // heads
        inputs = [self._draw(*shape) for _ in range(3)]
        return self._both(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *inputs)

    def head(self, tokens: int, h: int, vocabulary: int) -> Call:
        """Output layer and loss of `tokens`."""
        from elas.model.head import LinearCrossEntropy

        labels = torch.randint(vocabulary, (tokens,), device=self._device)
        weights = torch.full((tokens,), 1.0 / tokens, device=self._device)
        inputs = self._draw(tokens, h), self._draw(vocabulary, h, scale=0.02)
        return self._both(lambda x, w: LinearCrossEntropy.apply(x, w, labels, weights, _OneRank()), *inputs)

    def norms(self, config: Config) -> Call:
        """Two norms and two residual additions."""
        from elas.model.norm import RMSNorm

        norm = RMSNorm(transformer_config(config), config.model.hidden_size)

        def twice(x: torch.Tensor) -> torch.Tensor:
            y = x + norm(x)
            return y + norm(y)

        return self._both(twice, self._draw(self._tokens, 1, config.model.hidden_size))

    def gate(self, f: int) -> Call:
        """silu(gate) · up."""
        return self._both(lambda g, u: F.silu(g) * u, self._draw(self._tokens, f), self._draw(self._tokens, f))

    def heads(self, config: Config) -> Call:
        """Rotary embedding of q and k, and the attention's output back from heads."""
        from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

        from elas.model.rotary import rotate

        model, batch = config.model, config.train.micro_batch_size
        width = model.hidden_size // model.num_attention_heads
        angles = RotaryEmbedding(width, 1.0, rotary_base=model.rotary_base)(model.seq_length)
        shape, megatron = (model.seq_length, batch, model.num_attention_heads, width), transformer_config(config)
        q, k = self._draw(*shape), self._draw(*shape)
        out = self._draw(batch, model.num_attention_heads, model.seq_length, width)
        dy, dout = torch.randn_like(q), torch.randn_like(q).flatten(2)

        def run() -> None:
            turned = [rotate(x, angles, megatron) for x in (q, k)]
            joined = out.permute(2, 0, 1, 3).reshape(model.seq_length, batch, -1)
            torch.autograd.backward([*turned, joined], [dy, dy, dout])
            q.grad = k.grad = out.grad = None

        return run


def _iteration(pace: Pace, f: int) -> float:
    """FLOP/s of Muon's products for a factor of the FFN."""
    rank, steps = 256, 5
    u = torch.randn(f, rank, device=accelerator.device())
    return (4 * f * rank**2 + 2 * (4 * steps - 3) * rank**3) / pace(lambda: orthogonalized(u, steps))


def _adds() -> Call:
    a, b = (torch.ones(TABLE, device=accelerator.device()) for _ in range(2))
    return lambda: a.add_(b)


def _adam() -> Call:
    parameters = [torch.nn.Parameter(torch.ones(UPDATED // 8, device=accelerator.device())) for _ in range(8)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True).step
