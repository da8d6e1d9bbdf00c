"""Counting of collectives, and naive low-rank tensor parallelism, which the bottleneck form is compared with.

Legend: s sequence, b batch, h hidden, f d_ff, r rank, o output width of a linear, t tensor-parallel ranks.

The naive way splits a factor pair as Megatron splits the two linears of an MLP: `factor_in [r/t, h]` by rows,
`factor_out [o, r/t]` by columns. Each pair then ends in an all-reduce of its whole output, and its backward pass in one
of its whole input. Between pairs everything is replicated: every rank has all heads and all of d_ff.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import apply_rotary_pos_emb
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch.utils._python_dispatch import TorchDispatchMode

from elas.kernels.relu2_24 import relu2_24
from elas.model.activation import SparseSwitch
from elas.model.transformer_config import ElasTransformerConfig

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all_reduce", "all_gather", "reduce_scatter"
_KINDS = {
    "allreduce_": ALL_REDUCE,
    "allgather_": ALL_GATHER,
    "_allgather_base_": ALL_GATHER,
    "reduce_scatter_": REDUCE_SCATTER,
    "_reduce_scatter_base_": REDUCE_SCATTER,
}


def ring_share(kind: str, t: int) -> float:
    """Bytes that a rank of a ring sends for a collective, relative to the bytes of its whole tensor.

    The whole tensor is the input of an all-reduce or reduce-scatter, and the output of an all-gather. An all-reduce is
    a reduce-scatter and an all-gather, each of which sends t − 1 of the t parts.
    """
    return (2 if kind == ALL_REDUCE else 1) * (t - 1) / t


class CountCollectives(TorchDispatchMode):
    """Counts bytes of the whole tensors passed to collectives while it is active.

    Attributes:
        sizes: bytes by kind.

    Raises:
        RuntimeError: a collective of an unknown kind, so that none is missed.
    """

    def __init__(self):
        super().__init__()
        self.sizes: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count a collective, then run the operator."""
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d":
            if name not in _KINDS:
                raise RuntimeError(f"collective {name} is not counted")
            kind = _KINDS[name]
            whole = args[1] if kind == REDUCE_SCATTER else args[0]  # arguments are (output, input)
            self.sizes[kind] = self.sizes.get(kind, 0) + sum(tensor.nbytes for tensor in _flat(whole))
        return func(*args, **(kwargs or {}))

    def sent(self, t: int) -> float:
        """Bytes that a rank sends if collectives are rings."""
        return sum(ring_share(kind, t) * size for kind, size in self.sizes.items())


def _flat(tensors) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else [t for inner in tensors for t in _flat(inner)]


class NaiveLowRankLayer(SparseSwitch):
    """A transformer layer of naive pairs that computes the same function as the bottleneck-parallel layer.

    Args:
        config: Megatron's, with our sections.
        whole: the bottleneck-parallel layer's weights over all ranks, by parameter name.
        t: tensor-parallel ranks.
        rank: this one.
    """

    def __init__(self, config: ElasTransformerConfig, whole: dict[str, torch.Tensor], t: int, rank: int):
        super().__init__(config.sparsity)
        self.config = config
        self.norms = torch.nn.ParameterList([whole["input_layernorm.weight"], whole["pre_mlp_layernorm.weight"]])
        self.pairs = torch.nn.ParameterDict()
        qkv = whole["self_attention.linear_qkv.factor_in"].chunk(3)
        pairs = {name: (qkv[i], whole[f"self_attention.linear_qkv.factor_out_{name}"]) for i, name in enumerate("qkv")}
        for name, place in {
            "proj": "self_attention.linear_proj",
            "up": "mlp.linear_fc1",
            "down": "mlp.linear_fc2",
        }.items():
            pairs[name] = (whole[f"{place}.factor_in"], whole[f"{place}.factor_out"])
        for name, (factor_in, factor_out) in pairs.items():
            self.pairs[f"{name}_in"] = torch.nn.Parameter(factor_in.chunk(t, 0)[rank].clone())
            self.pairs[f"{name}_out"] = torch.nn.Parameter(factor_out.chunk(t, 1)[rank].clone())

    def forward(self, x: torch.Tensor, rotary_pos_emb: torch.Tensor, **_unused) -> tuple[torch.Tensor, None]:
        """`x [s, b, h]` (`[s/t, b, h]` with sequence parallelism) to the same shape."""
        x = x + self._attention(self._norm(0, x), rotary_pos_emb)
        z = self._partial("up", self._whole_sequence(self._norm(1, x)))
        s = relu2_24(reduce_from_tensor_model_parallel_region(z), self.options)
        return x + self._sum(self._partial("down", copy_to_tensor_model_parallel_region(s))), None

    def _attention(self, x: torch.Tensor, rotary_pos_emb: torch.Tensor) -> torch.Tensor:
        x = self._whole_sequence(x)
        q, k, v = (reduce_from_tensor_model_parallel_region(self._partial(name, x)) for name in "qkv")
        q, k, v = (z.unflatten(-1, (-1, self.config.kv_channels)) for z in (q, k, v))
        q, k = (apply_rotary_pos_emb(z, rotary_pos_emb, config=self.config) for z in (q, k))
        q, k, v = (z.permute(1, 2, 0, 3) for z in (q, k, v))
        k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], dim=1) for z in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3).flatten(2)
        return self._sum(self._partial("proj", copy_to_tensor_model_parallel_region(out)))

    def _norm(self, index: int, x: torch.Tensor) -> torch.Tensor:
        weight = self.norms[index]
        return F.rms_norm(x, weight.shape, weight, self.config.layernorm_epsilon)

    def _partial(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """`[.., i]` to this rank's share of a sum `[.., o]`."""
        return F.linear(F.linear(x, self.pairs[f"{name}_in"]), self.pairs[f"{name}_out"])

    def _whole_sequence(self, x: torch.Tensor) -> torch.Tensor:
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True)
        return copy_to_tensor_model_parallel_region(x)

    def _sum(self, y: torch.Tensor) -> torch.Tensor:
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(y)
        return reduce_from_tensor_model_parallel_region(y)


def forward_backward(
    layer: torch.nn.Module, x: torch.Tensor, angles: torch.Tensor, forward=None, backward=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass with a gradient of ones.

    Args:
        layer: Megatron's, ours or the naive one.
        x: its input.
        angles: of the rotary embedding, for the whole sequence.
        forward: a context for the forward pass.
        backward: a context for the backward pass.

    Returns:
        y and dx.
    """
    x = x.detach().requires_grad_()
    with forward or nullcontext():
        y, _ = layer(x, attention_mask=None, rotary_pos_emb=angles)
    with backward or nullcontext():
        y.backward(torch.ones_like(y))
    layer.zero_grad(set_to_none=True)
    assert x.grad is not None
    return y.detach(), x.grad
