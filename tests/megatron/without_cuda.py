"""What `megatron.training` of a Megatron-LM checkout needs on a CPU beyond `elas.prepare()`; for the study only.

megatron.training is no part of the megatron-core wheel, and expects CUDA, nvcc and Apex or Transformer Engine.
"""

import functools
import os

import torch


def install() -> None:
    """Replace what needs a GPU or a compiler; call it after `elas.host.prepare_megatron()`, before `pretrain`."""
    import megatron.core.datasets.utils as datasets
    import megatron.legacy.fused_kernels as fused_kernels
    import megatron.training.arguments as arguments
    import megatron.training.training as training
    import megatron.training.utils as utils

    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    datasets.compile_helpers = lambda: None  # the wheel has them compiled
    fused_kernels.load = lambda args: None
    arguments.get_device_arch_version = utils.get_device_arch_version = lambda: 9
    _state_of_a_fresh_optimizer()


def _state_of_a_fresh_optimizer() -> None:
    """Without Apex, Adam has no state before its first step; Megatron's distributed optimizer asserts one."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer.state_dict

    def state_dict(self):
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if not self.optimizer.state[p]:
                    zeros = torch.zeros_like(p)
                    self.optimizer.state[p] = dict(step=torch.tensor(0.0), exp_avg=zeros, exp_avg_sq=zeros.clone())
        return original(self)

    DistributedOptimizer.state_dict = state_dict


def groups(tensor: int, pipeline: int, virtual: int | None) -> None:
    """Process groups, which Megatron-LM makes itself only where there are GPUs."""
    import elas.parallel
    from elas.config import ParallelConfig

    sizes = ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual or 1)
    elas.parallel.initialize(sizes, seed=int(os.environ.get("STUDY_SEED", "1234")))
