"""Tensor parallelism of the FFNs with torch's DTensor: a `ParallelStyle` for `parallelize_module`.

    from torch.distributed.tensor.parallel import parallelize_module
    from elas.nn.parallel import TensorParallelFFN

    parallelize_module(model, mesh["tp"], {"layers.*.mlp": TensorParallelFFN()})

Input and output are plain tensors, replicated on every rank. d_ff is split. With low rank the ranks exchange vectors of
width r only, in one all-reduce of v in the forward and one of du in the backward pass, as in `elas.model.low_rank`.
"""

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from elas.errors import ConfigError
from elas.kernels.relu2_24 import sharding
from elas.nn.ffn import LowRankFFN, SparseFFN

sharding.register()  # on import, for models that are compiled before their first call


class TensorParallelFFN(ParallelStyle):
    """Splits a `LowRankFFN` or `SparseFFN` along d_ff."""

    def _apply(self, module: torch.nn.Module, device_mesh: DeviceMesh) -> torch.nn.Module:
        """Replace the parameters by DTensors; called by torch.

        Raises:
            ConfigError: another module, or d_ff does not split into whole groups of four (eight for `compressed`).
        """
        if not isinstance(module, LowRankFFN | SparseFFN):
            raise ConfigError(
                "module", type(module).__name__, "is not an FFN of elas.nn", "name LowRankFFNs or SparseFFNs"
            )
        if isinstance(module, SparseFFN) and module.gated:
            why = "gate and up are one weight, and a shard of it would not have a part of both"
            raise ConfigError("activation", "swiglu", why, "use LowRankFFN, or two linears of your own")
        size, ranks = module.ffn_hidden_size, device_mesh.size()
        unit, need = (4, "whole 2:4 groups") if module.can_be_sparse else (1, "equal shares")
        options = module.options_when_sparse
        if unit == 4 and (options.ffn_memory, options.method, options.gradient) == (
            "compressed",
            "magnitude",
            "masked",
        ):
            unit, need = 8, "pairs of 2:4 groups, which compressed memory packs in one byte"
        if size % (unit * ranks):
            why = f"{ranks} ranks require {need}"
            raise ConfigError("ffn_hidden_size", size, why, f"give a multiple of {unit * ranks}")
        for name, linear in (("linear_fc1", module.linear_fc1), ("linear_fc2", module.linear_fc2)):
            distribute_module(linear, device_mesh, _placed(name))
        whole_in: Any = _whole_in  # torch's annotations lack the return values
        whole_out: Any = _whole_out
        return distribute_module(module, device_mesh, None, whole_in, whole_out)


def _placed(name: str):
    first = name == "linear_fc1"

    def place(_, linear: torch.nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in list(linear.named_parameters(recurse=False)):
            split = Replicate()
            if first and key != "factor_in":  # rows of factor_out or weight, and biases
                split = Shard(0)
            elif not first and key in ("factor_in", "weight"):
                split = Shard(1)
            value = distribute_tensor(parameter.detach(), mesh, [split])
            linear.register_parameter(key, torch.nn.Parameter(value, requires_grad=parameter.requires_grad))

    return place


def _whole_in(_, inputs: tuple, mesh: DeviceMesh) -> tuple:
    return tuple(DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in inputs)


def _whole_out(_, output: DTensor, mesh: DeviceMesh) -> torch.Tensor:
    return output.redistribute(mesh, [Replicate()]).to_local()
