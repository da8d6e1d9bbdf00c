"""How even and how well conditioned the factor pairs of a model are.

A pair's product does not change under factor_out·A, A⁻¹·factor_in, but the steps of an optimizer do: it sees factors.
Every pair is whole on one rank for a moment (`elas.engine.exchange`); all values come from its two r × r Gram matrices.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elas.engine.engine import Engine
from elas.engine.exchange import Exchange
from elas.engine.matrices import pairs_of
from elas.engine.zero import Fragment
from elas.model.shards import global_names

WORST = 1e8
"""Largest condition number that fp64 Gram matrices show."""


def statistics(out: Tensor, into: Tensor) -> dict[str, float]:
    """Of factor_out `[n, r]` and factor_in `[r, k]`, any dtype; computed in fp64.

    Returns:
        `norm_ratio`: Frobenius norm of factor_out by that of factor_in. `condition_out`, `condition_in`: largest by
        smallest singular value, at most 1e8. `effective_rank` of the product: e to the entropy of its normalized
        singular values (Roy and Vetterli, 2007), from 1 to r.
    """
    gram_out, gram_in = out.double().T @ out.double(), into.double() @ into.double().T
    values, vectors = torch.linalg.eigh(gram_out)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ gram_in @ root).clamp_min(0).sqrt()
    share = product / product.sum().clamp_min(1e-300)
    entropy = float(-torch.special.xlogy(share, share).sum())
    norms = [max(float(gram.trace()), 1e-300) ** 0.5 for gram in (gram_out, gram_in)]
    return {
        "norm_ratio": norms[0] / norms[1],
        "condition_out": _condition(values),
        "condition_in": _condition(torch.linalg.eigvalsh(gram_in)),
        "effective_rank": float(torch.tensor(entropy).exp()),
    }


def _condition(squares: Tensor) -> float:
    """From eigenvalues of a Gram matrix, in ascending order."""
    least, most = float(squares[0]), float(squares[-1])
    return min(WORST, (most / least) ** 0.5) if least > 0 and most > 0 else WORST


@torch.no_grad()
def measure(engine: Engine) -> dict[str, Any]:
    """Statistics of every pair of the model, for metrics.jsonl; every rank must call it.

    Returns:
        `pairs`, by statistic: its value for each pair, in the order of `names`; and three numbers for all of them:
        the largest condition number, the most uneven norms (their ratio, or its inverse), the mean effective rank.
        Empty for a model without factors.
    """
    names = {id(parameter): name for chunk in engine.chunks for name, parameter in global_names(chunk).items()}
    exchange, mine = Exchange(engine), {}
    exchange.begin()
    for owned in exchange.rounds(list(pairs_of(engine.chunks))):  # a rank has one pair at a time
        wanted = [([(rows, Fragment.master) for rows in pair], owner) for (pair,), owner in owned]
        if found := exchange.gather(wanted):
            ((out, _),) = next(pairs for pairs, owner in owned if owner == exchange.rank)
            mine[names[id(out.parameter)]] = statistics(*found)
    everywhere: list[dict[str, dict[str, float]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, mine)
    of_all = {name: found for one in everywhere for name, found in one.items()}
    if not of_all:
        return {}
    ordered = sorted(of_all, key=_by_layer)
    table = {key: [of_all[name][key] for name in ordered] for key in of_all[ordered[0]]}
    ratios = [max(ratio, 1 / ratio) for ratio in table["norm_ratio"]]
    return {
        "pair_condition": max(*table["condition_out"], *table["condition_in"]),
        "pair_norm_ratio": max(ratios),
        "effective_rank": sum(table["effective_rank"]) / len(ordered),
        "pairs": {"names": ordered, **table},
    }


def _by_layer(name: str) -> tuple[tuple[int, str], ...]:
    """Sorts layer 2 before layer 10."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in name.split("."))
