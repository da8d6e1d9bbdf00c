"""The whole training run in plain PyTorch: schedule, clipping, AdamW, LORO with exact steps and refreshes, validation.

Like `plain_model`, it imports nothing of elas, Megatron or DeepSpeed. A step takes the gradient of the mean loss over
all labels of the global batch at once: there are no micro-batches and no ranks here.

Legend: M `[o, r]` and N `[i, r]` are a pair's factors, W = M Nᵀ; D = m / (√v + eps) with the moments m, v.
"""

import math
from dataclasses import dataclass, field

import torch
from plain_model import Forward, Weights, initial_weights
from torch import Tensor

Batch = tuple[Tensor, Tensor]  # tokens and labels, int64 [b, s]; label −1 counts for nothing


@dataclass
class Record:
    """What a run leaves: a row for each step, the validation losses before and after, and the end state.

    `tokens` of a row are the labels that counted so far.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    valid: list[float] = field(default_factory=list)
    weights: Weights = field(default_factory=dict)
    moments: dict[str, Weights] = field(default_factory=dict)


def learning_rate(step: int, settings: dict) -> float:
    """Rate of step `step`, which counts from 1."""
    peak, schedule, steps = settings["optimizer"]["lr"], settings["schedule"], settings["train"]["steps"]
    warmup, low = schedule["warmup_steps"], settings["optimizer"]["lr"] * schedule["min_lr_ratio"]
    restart = 1.0
    if schedule["kind"] == "cosine_restart":
        every = settings["optimizer"]["exact_every"]
        since_refresh = (step - 1) % every + 1
        restart = min(since_refresh / 5, 1.0) if step > every else 1.0
    if step <= warmup:
        return restart * peak * step / warmup
    if schedule["kind"] == "constant":
        return peak
    if schedule["kind"] == "wsd":
        last = schedule["decay_steps"] or max(1, steps // 10)
        return low + (peak - low) * min(1.0, (steps - step) / last)
    return restart * (low + (peak - low) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2)


class Optimizer:
    """AdamW, or LORO, over weights by global name.

    Args:
        weights: updated in place.
        settings: the run's configuration.
    """

    def __init__(self, weights: Weights, settings: dict):
        self.weights, self.settings, self.options = weights, settings, settings["optimizer"]
        self.first = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.count = 0  # updates since the moments were last zeroed

    def update(self, gradients: Weights, step: int, lr: float) -> None:
        """One step with gradients that are clipped already."""
        beta1, beta2 = self.options["beta1"], self.options["beta2"]
        self.count += 1
        for name, gradient in gradients.items():
            self.first[name] = beta1 * self.first[name] + (1 - beta1) * gradient
            self.second[name] = beta2 * self.second[name] + (1 - beta2) * gradient**2
        (self._loro if self.options["kind"] == "loro" else self._adamw)(step, lr)

    def _decay(self, weight: Tensor, lr: float) -> float:
        """Factor of decoupled weight decay; norm weights, the only vectors, do not decay."""
        return 1 - lr * self.options["weight_decay"] if weight.dim() == 2 else 1.0

    def _adamw(self, _step: int, lr: float) -> None:
        for name, w in self.weights.items():
            mean = self.first[name] / (1 - self.options["beta1"] ** self.count)
            square = self.second[name] / (1 - self.options["beta2"] ** self.count)
            w.copy_(w * self._decay(w, lr) - lr * mean / (square.sqrt() + self.options["eps"]))

    def _loro(self, step: int, lr: float) -> None:
        """arXiv 2605.03667: factors move by r / h of the rate, but for exact steps; everything else by all of it."""
        every, refresh = self.options["exact_every"], self.options["refresh"]
        due = every is not None and step % every == 0
        exact = due and refresh != "only"
        rate = lr * math.sqrt(1 - self.options["beta2"] ** self.count) / (1 - self.options["beta1"] ** self.count)
        scale = self.settings["low_rank"]["rank"] / self.settings["model"]["hidden_size"]
        for name, w in self.weights.items():
            factor = "factor_" in name
            if not (factor and exact):
                moved = w - rate * (scale if factor else 1.0) * self._direction(name)
                w.copy_(moved * self._decay(w, lr))
        if exact:
            for factor_in in [name for name in self.weights if name.endswith("factor_in")]:
                self._exact_steps(factor_in, rate)
        if due and refresh != "none":
            for moment in (*self.first.values(), *self.second.values()):
                moment.zero_()
            self.count = 0

    def _direction(self, name: str) -> Tensor:
        return self.first[name] / (self.second[name].sqrt() + self.options["eps"])

    def _exact_steps(self, factor_in: str, rate: float) -> None:
        """Move every pair that `factor_in [pairs · r, i]` is stacked of."""
        stem, r = factor_in.removesuffix("factor_in"), self.settings["low_rank"]["rank"]
        outs = [name for name in self.weights if name.startswith(f"{stem}factor_out")]
        d_in = self._direction(factor_in)
        for pair, out in enumerate(outs):
            rows = slice(pair * r, (pair + 1) * r)
            stack = self.weights[factor_in]
            m, n = exact_step(self.weights[out], stack[rows].T, self._direction(out), d_in[rows].T, rate)
            self.weights[out].copy_(m)
            stack[rows] = n.T


def exact_step(m: Tensor, n: Tensor, d_m: Tensor, d_n: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """New M and N by the published formulas: a step along the tangent space at M Nᵀ, truncated to rank r, balanced.

    An SVD leaves the sign of a pair of singular vectors open: here the largest entry of each column of M is positive.
    """
    r = m.shape[1]
    (u, r_m), (v, r_n) = torch.linalg.qr(m), torch.linalg.qr(n)
    gv, utg = d_m @ r_n.inverse(), r_m.inverse().T @ d_n.T
    k0 = utg @ v
    q1, k1 = torch.linalg.qr((utg - k0 @ v.T).T)
    q2, k2 = torch.linalg.qr(gv - u @ (u.T @ gv))
    core = torch.zeros(2 * r, 2 * r, dtype=m.dtype)
    core[:r, :r] = r_m @ r_n.T - rate * k0
    core[:r, r:], core[r:, :r] = -rate * k1.T, -rate * k2
    a, sigma, bt = torch.linalg.svd(core)
    root = sigma[:r].sqrt()
    new_m, new_n = torch.cat([u, q2], 1) @ a[:, :r] * root, torch.cat([v, q1], 1) @ bt[:r].T * root
    sign = new_m.gather(0, new_m.abs().argmax(0, keepdim=True)).sign()
    return new_m * sign, new_n * sign


def train(settings: dict, batches: list[Batch], valid: Batch, dtype: torch.dtype = torch.float64) -> Record:
    """A whole run.

    Args:
        settings: the configuration as nested plain dictionaries.
        batches: the global batch of each step.
        valid: the validation samples, all in one batch.
        dtype: of everything.
    """
    weights, record = initial_weights(settings, dtype), Record()
    optimizer, dense, seen = Optimizer(weights, settings), settings["sparsity"]["dense_steps"], 0

    def validate(step: int) -> None:
        """With 2:4 as the step has it, or before the first step as that one will."""
        tokens, labels = valid
        record.valid.append(
            float(Forward(weights, settings, max(1, step) > dense).loss_sum(tokens, labels) / counted(labels))
        )

    validate(0)
    for step, (tokens, labels) in enumerate(batches, start=1):
        leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
        loss = Forward(leaves, settings, step > dense).loss_sum(tokens, labels) / counted(labels)
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        limit = settings["optimizer"]["clip_grad"]
        if 0 < limit < norm:
            gradients = {name: g * (limit / (norm + 1e-6)) for name, g in gradients.items()}
        lr = learning_rate(step, settings)
        optimizer.update(gradients, step, lr)
        seen += counted(labels)
        record.steps.append({"step": step, "tokens": seen, "loss": float(loss.detach()), "grad_norm": norm, "lr": lr})
    validate(len(batches))
    record.weights, record.moments = weights, {"exp_avg": optimizer.first, "exp_avg_sq": optimizer.second}
    return record


def counted(labels: Tensor) -> int:
    """Labels that count."""
    return int((labels >= 0).sum())
