"""What `megatron.training` of a Megatron-LM checkout needs on a CPU beyond `elas.prepare()`; for the study only.

megatron.training is no part of the megatron-core wheel, and expects CUDA, nvcc and Apex or Transformer Engine.
"""

import functools
import os
import sys
from pathlib import Path

import torch


def install() -> None:
    """Replace what needs a GPU or a compiler; call it between `elas.accelerator.prepare_megatron()` and `pretrain`."""
    import megatron.core.datasets.utils as datasets
    import megatron.legacy.fused_kernels as fused_kernels
    import megatron.training.arguments as arguments
    import megatron.training.training as training
    import megatron.training.utils as utils

    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    datasets.compile_helpers = lambda: None
    _compiled_helpers()
    _outputs_stay(arguments)
    fused_kernels.load = lambda args: None
    arguments.get_device_arch_version = utils.get_device_arch_version = lambda: 9
    let_torch_adam_load()


def _compiled_helpers() -> None:
    """The wheel of megatron-core has the data sets' helpers compiled; a checkout, which comes first, has not."""
    import megatron.core.datasets

    name = "megatron/core/datasets"
    found = [folder for path in sys.path if any((folder := Path(path) / name).glob("helpers_cpp*.so"))]
    if not found:
        raise RuntimeError(f"no compiled {name}/helpers_cpp on sys.path; pip install megatron-core==0.16.1")
    megatron.core.datasets.__path__.append(str(found[0]))


def _outputs_stay(arguments) -> None:
    """Keep a stage's output until it has arrived.

    Megatron frees it after `isend`, which CUDA's allocator forgives and gloo does not: with an interleaved pipeline the
    next stage then computes with whatever has taken its place.
    """
    original = arguments.core_transformer_config_from_args

    def core_transformer_config_from_args(*args, **kwargs):
        config = original(*args, **kwargs)
        config.deallocate_pipeline_outputs = False
        return config

    arguments.core_transformer_config_from_args = core_transformer_config_from_args


def let_torch_adam_load() -> None:
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
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    @torch.no_grad()
    def set_with_step(self, model_param, tensors):
        """The step lies in parameter groups, whose loading has put it into the state; here it is asked for again.

        All states got one tensor, which Adam then counts up once for each: a copy for each, therefore.
        """
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        state["step"] = state["step"].clone()
        return set_states(self, model_param, {"step": state["step"], **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = set_with_step


def groups(tensor: int, pipeline: int, virtual: int | None) -> None:
    """Process groups, which Megatron-LM makes itself only where there are GPUs."""
    import elas.parallel
    from elas.config import ParallelConfig

    sizes = ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual or 1)
    elas.parallel.initialize(sizes, seed=int(os.environ.get("STUDY_SEED", "1234")))
