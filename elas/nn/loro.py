"""LORO (arXiv 2605.03667) as a plain torch optimizer, for models with low-rank layers of `elas.nn`.

It alternates the approximate steps of `elas.optim.loro` with the exact step of `elas.optim.riemannian`. Every process
requires whole factors: a single process, or DDP, where all ranks compute the same step. `elas train` supports ZeRO's
partitions and tensor-parallel shards.
"""

from dataclasses import dataclass

import torch

from elas.errors import ConfigError
from elas.nn.linear import LowRankLinear
from elas.nn.settings import check_choice, check_count
from elas.optim.adamw import parameter_groups
from elas.optim.loro import Loro, corrected, refresh
from elas.optim.riemannian import NotTaken, exact_step

REFRESHES = ("with_exact", "only", "none")


@dataclass(frozen=True)
class _Pair:
    factor_in: torch.nn.Parameter  # [n·r, i], of which this pair has rows [first, first + r)
    factor_out: torch.nn.Parameter  # [o, r]
    first: int
    rank: int
    c: float


class LORO(Loro):
    """Approximate steps with AdamW's moments, and exact steps on the manifold of rank-r matrices every `exact_every`.

    In approximate steps the learning rate of factors is scaled by `c = r / hidden`, with hidden the smaller width of
    the layer. Other parameters follow AdamW (without bias correction of the second moment inside the root).

    Args:
        model: its `LowRankLinear`s have the factor pairs; all its parameters are optimized.
        lr: learning rate; a scheduler may change it.
        betas: decays of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; for matrices only.
        exact_every: steps between exact steps; None for none.
        refresh: `with_exact` zeroes all moments after each exact step, `only` zeroes them without the exact step,
            `none` never.

    Attributes:
        not_taken: pairs that took an approximate step in the last exact one, since they had no full rank or the SVD
            failed.

    Raises:
        ConfigError: no model, no low-rank layer, sharded factors, a non-linearity between factors, or an invalid
            argument.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        exact_every: int | None = 500,
        refresh: str = "with_exact",
    ):
        if not isinstance(model, torch.nn.Module):
            why = "is not a model, and LORO requires its low-rank layers"
            raise ConfigError("model", type(model).__name__, why, "give the torch.nn.Module itself, not its parameters")
        check_choice("refresh", refresh, REFRESHES)
        if exact_every is not None:
            check_count("exact_every", exact_every, "give a number of steps such as 500, or None for no exact steps")
        if not lr >= 0:
            raise ConfigError("lr", lr, "is not a number of 0 or more", "give one such as 1e-3")
        self.exact_every, self.refresh, self.not_taken = exact_every, refresh, 0
        self.model, self.pairs = model, list(_pairs(model))
        if not self.pairs:
            raise ConfigError("model", type(model).__name__, "has no LowRankLinear", "use torch.optim.AdamW")
        for pair in self.pairs:
            _check_whole(pair)
        super().__init__(_groups(model, self.pairs, weight_decay), lr=lr, betas=betas, eps=eps)
        for group in self.param_groups:
            group.setdefault("steps", 0)  # now, so that `state_dict` has it before the first step

    @torch.no_grad()
    def step(self, closure=None):
        """One step: approximate, or exact when it is due.

        Raises:
            ConfigError: the model's low-rank layers are sharded, or have been replaced.
        """
        self._check_held()
        if closure is not None:
            with torch.enable_grad():
                closure = _once(closure())
        steps = self.param_groups[0]["steps"] + 1
        due = self.exact_every is not None and steps % self.exact_every == 0
        self.moments_only = due and self.refresh != "only"
        loss = super().step(closure)
        for group in self.param_groups:
            group["steps"] = steps
        if due and self.refresh != "only":
            self._exact()
        if due and self.refresh != "none":
            refresh(self.state.values())
        return loss

    def _check_held(self) -> None:
        """Check that the model's layers still have the same parameters; `fully_shard`, for one, replaces them.

        Raises:
            ConfigError: they have other or sharded parameters.
        """
        now = list(_pairs(self.model))
        for pair in now:
            _check_whole(pair)
        if [(id(p.factor_in), id(p.factor_out)) for p in now] != [
            (id(p.factor_in), id(p.factor_out)) for p in self.pairs
        ]:
            why = "its low-rank layers have other parameters than when LORO was created, so a step would not train them"
            fix = "create LORO after layers are replaced"
            raise ConfigError("model", type(self.model).__name__, why, fix)

    def _exact(self) -> None:
        of = {p: group for group in self.param_groups for p in group["params"]}
        self.not_taken = 0
        for pair in self.pairs:
            if pair.factor_in not in self.state or pair.factor_out not in self.state:
                continue  # frozen, or not used yet
            group, rows = of[pair.factor_out], slice(pair.first, pair.first + pair.rank)
            m, n = pair.factor_out.float(), pair.factor_in[rows].T.float()
            d_m, d_n = self._direction(pair.factor_out, group), self._direction(pair.factor_in, group)[rows].T
            lr_t = corrected(group["lr"], group["betas"], float(self.state[pair.factor_out]["step"]))
            try:
                m, n = exact_step(m, n, d_m, d_n, lr_t)
            except NotTaken:
                self.not_taken += 1
                keep = 1 - group["lr"] * group["weight_decay"]
                m, n = keep * (m - lr_t * pair.c * d_m), keep * (n - lr_t * pair.c * d_n)
            pair.factor_out.copy_(m)
            pair.factor_in[rows] = n.T.to(pair.factor_in.dtype)

    def _direction(self, parameter: torch.Tensor, group: dict) -> torch.Tensor:
        state = self.state[parameter]
        return state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"])


def _once(loss):
    return lambda: loss


def _pairs(model: torch.nn.Module):
    for name, module in model.named_modules():
        if not isinstance(module, LowRankLinear):
            continue
        if module.activation is not None:
            why = "has a non-linearity between its factors, so their product is not a matrix of rank r"
            raise ConfigError(f"model.{name}", type(module).__name__, why, "use torch.optim.AdamW")
        c = module.rank / min(module.in_features, max(module.outputs.values()))
        for number, factor_out in enumerate(module.output_factors):
            yield _Pair(module.factor_in, factor_out, number * module.rank, module.rank, c)


def _groups(model: torch.nn.Module, pairs: list[_Pair], weight_decay: float) -> list[dict]:
    scales = {id(p): pair.c for pair in pairs for p in (pair.factor_in, pair.factor_out)}
    groups = []
    for group in parameter_groups(model, weight_decay):
        for c in sorted(set(scales.values())):
            groups.append({**group, "params": [p for p in group["params"] if scales.get(id(p)) == c], "c": c})
            groups[-1]["factor"] = True
        groups.append({**group, "params": [p for p in group["params"] if id(p) not in scales], "c": 1.0})
    return [group for group in groups if group["params"]]


def _check_whole(pair: _Pair) -> None:
    """Refuse sharded factors.

    Raises:
        ConfigError: a DTensor, or a parameter that ZeRO 3 has partitioned.
    """
    for factor in (pair.factor_in, pair.factor_out):
        if hasattr(factor, "device_mesh") or factor.dim() != 2:
            why = "exact steps require whole factors on every rank, and these are sharded"
            raise ConfigError("model", "LowRankLinear", why, "use DDP, or elas train")
