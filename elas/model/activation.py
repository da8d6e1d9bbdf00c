"""Non-linearities as modules whose 2:4 sparsity starts after `sparsity.dense_steps` training steps.

2:4 is on from the start unless dense steps are asked for. Then a layer must learn which training step it is in, and
`step` (1 for the first) is what it goes by: pruning is on in steps after `dense_steps`, and evaluation runs as the last
trained step did. The number is saved with a module's state, so a checkpoint is evaluated as it was trained, too. It
comes from one of these, and training without any of them is an error rather than a model that stays dense:

    set_step(models, step)          a loop that knows its step says so before each one (`elas train`)
    count_steps(models, optimizer)  one line before any other loop: steps of the optimizer are counted
    elas.megatron                   follows the iterations of Megatron-LM's own loop

Counting is by optimizer steps and by the outermost module's forward, so neither gradient accumulation nor
recomputation in the backward pass is counted, and a step that is skipped is not either.

What 2:4 does to the activation is seen by `elas.model.observe`.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from elas.config import SparsityConfig
from elas.errors import ConfigError
from elas.kernels.relu2_24 import Relu24Options, relu2_24
from elas.model.observe import Observer

if TYPE_CHECKING:  # `elas.nn` imports this file, without Megatron-core
    from elas.model.transformer_config import ElasTransformerConfig

STEP_KEY = "sparsity_step"


class SparseSwitch(torch.nn.Module):
    """Holds whether 2:4 is active, and an observer of what it does.

    Args:
        sparsity: kind, options of the kernel, dense steps.
        kind: the non-linearity; only `relu2` can be sparse.

    Attributes:
        can_be_sparse: whether there is any 2:4 here.
        sparse: whether it is on.
        dense_steps: training steps before it is.
        step: number of the training step, from 1; 0 before any.
    """

    def __init__(self, sparsity: SparsityConfig, kind: str = "relu2"):
        super().__init__()
        self._options = {flag: Relu24Options.of(sparsity, sparse=flag) for flag in (False, True)}
        self.can_be_sparse = sparsity.kind == "2:4" and kind == "relu2"
        self.dense_steps = sparsity.dense_steps if self.can_be_sparse else 0
        self.sparse = self.can_be_sparse and self.dense_steps == 0
        self._knows_step = self.dense_steps == 0
        self.step = 0  # as the buffer says it, here without waiting for a GPU
        if self.dense_steps:
            self.register_buffer(STEP_KEY, torch.zeros(1, dtype=torch.int64))
        self.observer = Observer()

    @property
    def options(self) -> Relu24Options:
        """The kernel's options as of now.

        Raises:
            ConfigError: in training, if nothing says which step this is.
        """
        if self.training and not self._knows_step:
            why = "nothing counts the training steps, so 2:4 would never start"
            fix = "call elas.model.activation.count_steps(models, optimizer) once, or set it to 0"
            raise ConfigError("sparsity.dense_steps", self.dense_steps, why, fix)
        return self._options[self.sparse]

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if self.dense_steps:
            self.step = int(self.sparsity_step)
            self.sparse = self.step > self.dense_steps
        elif prefix + STEP_KEY in unexpected:  # trained with dense steps, and now without: nothing to count
            unexpected.remove(prefix + STEP_KEY)


class Activation(SparseSwitch):
    """An element-wise non-linearity: `silu`, or `relu2` with 2:4 when that is active."""

    def __init__(self, sparsity: SparsityConfig, kind: str):
        super().__init__(sparsity, kind)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [..., f]` to the same shape and dtype."""
        if self.kind == "silu":
            return F.silu(x)
        self.observer.look(x, None, self.sparse)
        return relu2_24(x, self.options)


class SquaredReLU24(Activation):
    """`Activation` of kind `relu2`, as Megatron's MLP builds one: from the configuration alone."""

    def __init__(self, config: "ElasTransformerConfig"):
        super().__init__(config.sparsity, "relu2")


def _switches(models: Iterable[torch.nn.Module]) -> list[SparseSwitch]:
    return [m for model in models for m in model.modules() if isinstance(m, SparseSwitch) and m.can_be_sparse]


def set_sparse(models: Iterable[torch.nn.Module], active: bool) -> None:
    """Turn 2:4 on or off in every layer that has it, whatever its step."""
    for switch in _switches(models):
        switch.sparse, switch._knows_step = active, True


def set_step(models: Iterable[torch.nn.Module], step: int) -> None:
    """Say that training step `step` begins (1 for the first): 2:4 is on if it is after `sparsity.dense_steps`."""
    for switch in _switches(models):
        switch.sparse, switch._knows_step = step > switch.dense_steps, True
        if switch.dense_steps and switch.step != step:
            switch.step = step
            switch.sparsity_step.fill_(step)


def count_steps(models: torch.nn.Module | list[torch.nn.Module], optimizer) -> None:
    """Count training steps for `sparsity.dense_steps`, in a loop that is not ours.

    Args:
        models: the model, or its chunks; its wrappers (DDP, FSDP) may be given as well.
        optimizer: a `torch.optim.Optimizer`, or one of Megatron-core's around it. A step counts when it steps.
    """
    models = [models] if isinstance(models, torch.nn.Module) else list(models)
    switches = [switch for switch in _switches(models) if switch.dense_steps]
    stepped = True  # since the last forward pass in training

    def before_forward(module: torch.nn.Module, _args) -> None:
        nonlocal stepped
        if module.training and stepped and switches:
            stepped = False
            set_step(models, switches[0].step + 1)

    def after_step(*_args) -> None:
        nonlocal stepped
        stepped = True

    for model in models:
        model.register_forward_pre_hook(before_forward)
    _torch_optimizers(optimizer)[0].register_step_post_hook(after_step)


def _torch_optimizers(optimizer) -> list[torch.optim.Optimizer]:
    """What Megatron-core's optimizers are wrapped around."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return [optimizer]
    inner = getattr(optimizer, "chained_optimizers", None) or [optimizer.optimizer]
    return [one for each in inner for one in _torch_optimizers(each)]
