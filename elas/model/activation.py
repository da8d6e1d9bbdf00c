"""Non-linearities as modules whose 2:4 sparsity starts after `sparsity.dense_steps` training steps.

2:4 is on from the start unless dense steps are asked for. Then a layer must learn which training step it is in, and
`step` (1 for the first) is what it goes by: pruning is on in steps after `dense_steps`, and evaluation runs as the last
trained step did. The number is saved with a module's state, so a checkpoint is evaluated as it was trained, too. It
comes from one of these, and training without any of them is an error rather than a model that stays dense:

    set_step(models, step)          a loop that knows its step says so before each one (`elas train`)
    count_steps(models, optimizer)  one line before any other loop: steps of the optimizer are counted
                                    (`elas.model.counting`)
    elas.megatron                   follows the iterations of Megatron-LM's own loop

What 2:4 does to the activation is seen by `elas.model.observe`.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from elas.config import SparsityConfig
from elas.errors import ConfigError
from elas.kernels.relu2_24 import Relu24Options, relu2_24
from elas.model.kernel import options_of
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
        is_relu2: whether it is a squared ReLU, which an observer looks at.
        can_be_sparse: whether there is any 2:4 here.
        dense_steps: training steps before it is on.
        step: number of the last training step that began, or, by `count_steps`, that was taken; 0 before any.
        counter: what counts the steps, if `count_steps` was called.
    """

    DENSE_STEPS = "sparsity.dense_steps"  # as users of this class give it
    sparsity_step: torch.Tensor  # a buffer, where there are dense steps

    def __init__(self, sparsity: SparsityConfig, kind: str = "relu2"):
        super().__init__()
        self._options = {flag: options_of(sparsity, sparse=flag) for flag in (False, True)}
        self.is_relu2 = kind == "relu2"
        self.can_be_sparse = sparsity.kind == "2:4" and kind == "relu2"
        self.dense_steps = sparsity.dense_steps if self.can_be_sparse else 0
        self.sparse = self.can_be_sparse and self.dense_steps == 0
        self.knows_step = self.dense_steps == 0
        self.counter: object | None = None
        self.step = 0  # as the buffer says it, here without waiting for a GPU
        if self.dense_steps:
            self.register_buffer(STEP_KEY, torch.zeros(1, dtype=torch.int64))
        self._version = 0  # of that buffer, as `step` was read from it
        self.observer = Observer()

    @property
    def sparse(self) -> bool:
        """Whether 2:4 is on, in training or in evaluation, as the module is now."""
        return self._sparse[0] if self.training else self._sparse[1]

    @sparse.setter
    def sparse(self, active: bool) -> None:
        self._sparse = active, active

    def taken(self, step: int) -> None:
        """Say that training step `step` is done: the next one trains by its own number, evaluation runs as this one."""
        self.step, self.knows_step = step, True
        self._sparse = step + 1 > self.dense_steps, step > self.dense_steps
        if self.dense_steps:
            self.sparsity_step.fill_(step)
            self._version = self.sparsity_step._version

    @property
    def options_when_sparse(self) -> Relu24Options:
        """The kernel's options after dense steps."""
        return self._options[True]

    @property
    def options(self) -> Relu24Options:
        """The kernel's options as of now.

        Raises:
            ConfigError: in training, if nothing says which step this is.
        """
        if not self.knows_step:
            if self.training:
                why = "nothing counts the training steps of this layer, so 2:4 would never start"
                fix = "call elas.nn.count_steps(model, optimizer), again if the layer is newer than the last call"
                raise ConfigError(self.DENSE_STEPS, self.dense_steps, why, f"{fix}, or set dense_steps to 0")
            self._follow_buffer()
        return self._options[self.sparse]

    def _follow_buffer(self) -> None:
        """What averages weights (`AveragedModel`) writes buffers in place, and no method of a module runs."""
        step = self.sparsity_step
        if torch.compiler.is_compiling() or type(step) is not torch.Tensor or step.is_meta or step.is_inference():
            return
        if step._version != self._version:  # so that a GPU is waited for after a change alone
            self.step, self._version = int(step), step._version
            self._sparse = self.step + 1 > self.dense_steps, self.step > self.dense_steps

    def reset_parameters(self) -> None:
        """Begin before the first step: after `to_empty` the buffer holds whatever memory held."""
        if self.dense_steps:
            with torch.no_grad():
                self.sparsity_step.zero_()
            self.step, self._sparse = 0, (False, False)

    def __getstate__(self) -> dict:
        """For copies and pickles: no counter follows them, so training one before `count_steps` is an error."""
        return {**self.__dict__, "counter": None, "knows_step": self.dense_steps == 0}

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if self.dense_steps:
            self.step = int(self.sparsity_step)
            self._sparse = self.step + 1 > self.dense_steps, self.step > self.dense_steps
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
        options = self.options  # first: it says whether 2:4 is on
        self.observer.look(x, None, self.sparse)
        return relu2_24(x, options)


class SquaredReLU24(Activation):
    """`Activation` of kind `relu2`, as Megatron's MLP builds one: from the configuration alone."""

    def __init__(self, config: "ElasTransformerConfig"):
        super().__init__(config.sparsity, "relu2")


def switches(models: Iterable[torch.nn.Module]) -> list[SparseSwitch]:
    """Every layer of these that may be sparse, as they are now."""
    return [m for model in models for m in model.modules() if isinstance(m, SparseSwitch) and m.can_be_sparse]


def set_sparse(models: Iterable[torch.nn.Module], active: bool) -> None:
    """Turn 2:4 on or off in every layer that has it, whatever its step."""
    for switch in switches(models):
        switch.sparse, switch.knows_step = active, True


def set_step(models: Iterable[torch.nn.Module], step: int) -> None:
    """Say that training step `step` begins (1 for the first): 2:4 is on if it is after `sparsity.dense_steps`."""
    for switch in switches(models):
        switch.sparse, switch.knows_step = step > switch.dense_steps, True
        if switch.dense_steps and switch.step != step:
            switch.step = step
            switch.sparsity_step.fill_(step)
