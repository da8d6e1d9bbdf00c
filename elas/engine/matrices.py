"""The matrices of a model's layers, as an optimizer that treats matrices as such sees them.

Megatron-core stacks linears: q, k and v of one weight, gate and up. Each is a matrix of its own here, and so is each
factor. Embedding and output layer are tables of vectors and not among them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from elas.model.full_rank import FullRankColumnParallelLinear, FullRankRowParallelLinear
from elas.model.low_rank import LowRankColumnParallelLinear, LowRankRowParallelLinear


@dataclass(frozen=True)
class Rows:
    """Some rows of a parameter, which are a matrix of their own: a factor of a stacked one, or q of q, k and v.

    Attributes:
        parameter: of the model.
        runs: first row and number of rows, of this rank's tensor-parallel shard; in order.
    """

    parameter: torch.nn.Parameter
    runs: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        """Number of rows on this rank."""
        return sum(count for _, count in self.runs)

    @property
    def split_dim(self) -> int | None:
        """The dimension that tensor-parallel ranks split; None if each has all of it."""
        marked: Any = self.parameter
        return marked.partition_dim if getattr(marked, "tensor_model_parallel", False) else None


def layer_matrices(models: Iterable[torch.nn.Module]) -> list[Rows]:
    """All of them: factors, and weights of full-rank linears."""
    models = list(models)
    return [*(one for pair in pairs_of(models) for one in pair), *matrices_of(models)]


def pairs_of(models: Iterable[torch.nn.Module]) -> Iterator[tuple[Rows, Rows]]:
    """factor_out and factor_in of every low-rank linear in this rank's chunks, in model order."""
    for model in models:
        for module in model.modules():
            if isinstance(module, LowRankColumnParallelLinear):
                for number, factor in enumerate(module.output_factors):
                    yield _all(factor), Rows(module.factor_in, ((number * module.rank, module.rank),))
            elif isinstance(module, LowRankRowParallelLinear):
                yield _all(module.factor_out), _all(module.factor_in)


def matrices_of(models: Iterable[torch.nn.Module]) -> Iterator[Rows]:
    """Weights of every full-rank linear in the layers of this rank's chunks, in model order."""
    for model in models:
        for module in model.modules():
            if isinstance(module, FullRankColumnParallelLinear):
                yield from _column(module)
            elif isinstance(module, FullRankRowParallelLinear):
                yield _all(module.weight)


def _all(parameter: Any) -> Rows:
    rows = parameter.ds_shape[0] if hasattr(parameter, "ds_shape") else parameter.shape[0]  # ZeRO 3 empties it
    return Rows(parameter, ((0, rows),))


def _column(module: Any) -> Iterator[Rows]:
    weight, config = module.weight, module.config
    ((_, rows),) = _all(weight).runs
    if module.place == "qkv":
        head, groups = config.kv_channels, config.num_query_groups or config.num_attention_heads
        queries = config.num_attention_heads // groups * head
        starts = range(0, rows, queries + 2 * head)  # of each group: its queries, its key, its value
        for offset, count in ((0, queries), (queries, head), (queries + head, head)):
            yield Rows(weight, tuple((start + offset, count) for start in starts))
    elif module.place == "fc1" and config.gated_linear_unit:
        for half in range(2):
            yield Rows(weight, ((half * rows // 2, rows // 2),))
    else:
        yield _all(weight)
