"""Rates at which one rank computes, moves and sends: assumed shares of a data sheet's peak, or measured.

`elas plan --measure` writes a hardware file of measured rates (JSON, `Measured`), and `--hardware this-machine` reads
it. Where ranks share cores or a memory bus, one alone is faster than one of many, so a file has rates of a rank alone
and of a rank while all are busy.
"""

import json
import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elas.errors import UserError
from elas.extensions import cache_dir

EFFICIENCY = {"full-rank products": 0.55, "factor products": 0.35, "2:4 FFN core": 0.35, "scores": 0.35,
              "head": 0.55, "fp64 products": 0.55, "memory": 0.75, "links": 0.75}  # fmt: skip
"""Share of the peak that each kind of work reaches, where nothing was measured."""
HOST_S = 7e-3
NORM_VALUES, HEAD_VALUES, GATE_VALUES = 24, 16, 10
"""Values that element-wise work of a layer's passes reads or writes for each token and feature: norms and residuals,
rotary embedding and layout of q, k and v, silu(gate) · up. Where they were measured, these are not used."""
UPDATE_BYTES = 28
"""Bytes that AdamW reads and writes for each parameter: weight, gradient, two moments, in fp32."""
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "send")


@dataclass(frozen=True)
class Rates:
    """Of one rank and one dtype. Products count forward and backward pass together, with what is computed again."""

    full_rank: float
    """FLOP/s of products with full-rank weights."""
    factor: dict[int, float]
    """FLOP/s of products with factors, by the rank of the pair."""
    core: dict[int, float]
    """FLOP/s of the 2:4 FFN core with its passes, by the width of its ends."""
    scores: float
    """FLOP/s of causal attention, softmax included, counting the half that is not masked."""
    head: float
    """FLOP/s of output layer and cross entropy."""
    bandwidth: float
    """Bytes/s that large tensors are read and written at."""
    fresh: float
    """Bytes/s that memory just obtained from the system is first written at; a GPU's allocator keeps what was freed."""
    norm_s: float
    """Seconds for each token and feature of a layer's norms and residual additions, both passes."""
    heads_s: float
    """The same of the rest of a layer that is no product: rotary embedding, layout of q, k and v."""
    gate_s: float
    """Seconds for each token and feature of silu(gate) · up, both passes."""
    adam_s: float
    """Seconds of AdamW for each parameter."""
    iteration: float
    """FLOP/s of Muon's products, in fp64."""
    host_layer_s: float
    """Seconds that Python needs for one layer's passes of one micro-batch."""
    host_batch_s: float
    """Seconds that Python needs for a micro-batch besides."""
    host_step_s: float
    """Seconds that Python needs for a step besides."""

    def of_rank(self, table: dict[int, float], rank: int) -> float:
        """The rate at a rank, between the measured ones; beyond them that of the nearest."""
        known = sorted(table)
        above = next((one for one in known if one >= rank), known[-1])
        below = next((one for one in reversed(known) if one <= rank), known[0])
        if above == below:
            return table[above]
        share = math.log(rank / below) / math.log(above / below)
        return table[below] ** (1 - share) * table[above] ** share


@dataclass(frozen=True)
class Link:
    """Between ranks, for one kind of collective: the bytes of a ring that a rank sends, and what each call costs."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Measured:
    """What `elas plan --measure` found.

    Attributes:
        name: of the processor or GPU.
        device: cpu or cuda.
        ranks: that were busy at the same time, one thread or GPU each.
        memory: bytes of a rank.
        busy: rates by the number of busy ranks (1 and `ranks`), then by dtype.
        links: by kind (`KINDS`); empty with one rank.
        about: where and when: torch's version, date, seconds, load of the machine before.
    """

    name: str
    device: str
    ranks: int
    memory: float
    busy: dict[int, dict[str, Rates]]
    links: dict[str, Link]
    about: dict[str, Any]

    def rates(self, ranks: int, dtype: str) -> Rates:
        """Rates of a rank while so many are busy."""
        return self.busy[1 if ranks == 1 else self.ranks][dtype]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def assumed(flops: float, bandwidth: float, fp64: float, dtype: str) -> Rates:
    """Rates by shares of a data sheet's peaks; fp32 is TF32.

    Args:
        flops: FLOP/s of dense bf16 products.
        bandwidth: bytes/s of the memory.
        fp64: FLOP/s of fp64 products.
        dtype: of weights and activations.
    """
    peak, e = (flops / 2, 4) if dtype == "float32" else (flops, 2)
    share, moved = EFFICIENCY, bandwidth * EFFICIENCY["memory"]
    return Rates(
        full_rank=peak * share["full-rank products"],
        factor={1: peak * share["factor products"]},
        core={1: peak * share["2:4 FFN core"]},
        scores=peak * share["scores"],
        head=peak * share["head"],
        bandwidth=moved,
        fresh=moved,
        norm_s=NORM_VALUES * e / moved,
        heads_s=HEAD_VALUES * e / moved,
        gate_s=GATE_VALUES * e / moved,
        adam_s=UPDATE_BYTES / moved,
        iteration=fp64 * share["fp64 products"],
        host_layer_s=HOST_S,
        host_batch_s=0.0,
        host_step_s=0.0,
    )


def default_file() -> Path:
    """Where `elas plan --measure` writes: `$XDG_CACHE_HOME/elas/hardware/HOST.json`, or below `~/.cache`."""
    return cache_dir() / "hardware" / f"{platform.node() or 'this-machine'}.json"


def read_measured(path: Path) -> Measured:
    """The hardware file at `path`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not path.exists():
        raise UserError(f"--hardware this-machine: {path} does not exist; run `elas plan --measure` first")
    try:
        return measured_from(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"{path}: not a hardware file ({error}); `elas plan --measure` makes a new one") from error


def measured_from(found: dict[str, Any]) -> Measured:
    """From a dict like that of `Measured.to_dict`; raises what a malformed one gives, `ValueError` for bad rates."""
    busy = {int(ranks): {dtype: _rates(one) for dtype, one in by.items()} for ranks, by in found["busy"].items()}
    links = {kind: Link(**found["links"][kind]) for kind in KINDS if kind in found["links"]}
    for link in links.values():
        if not (0 < link.bytes_per_s < math.inf and 0 <= link.latency_s < math.inf):
            raise ValueError(f"a link is {link}")
    measured = Measured(**{**found, "busy": busy, "links": links})
    if not {1, measured.ranks} <= busy.keys() or (measured.ranks > 1 and len(links) < len(KINDS)):
        raise ValueError("rates are missing")
    if not 0 < measured.memory < math.inf:
        raise ValueError(f"memory is {measured.memory}")
    return measured


def halfway(one: Any, other: Any) -> Any:
    """Between two rates, or each pair of rates in nested dicts."""
    return {key: halfway(one[key], other[key]) for key in one} if isinstance(one, dict) else (one + other) / 2


def _rates(values: dict[str, Any]) -> Rates:
    """Raises `ValueError` for a rate that is not above 0, and `TypeError` for a missing one."""
    tables = {name: {int(rank): rate for rank, rate in values[name].items()} for name in ("factor", "core")}
    rates = Rates(**{**values, **tables})
    numbers = {name: [value] for name, value in asdict(rates).items() if name not in tables}
    numbers |= {name: list(table.values()) for name, table in tables.items()}
    for name, found in numbers.items():
        least = 0.0 if name.endswith("_s") else 1.0
        if not found or not all(isinstance(one, int | float) and least <= one < math.inf for one in found):
            raise ValueError(f"{name} is {found}")
    return rates
