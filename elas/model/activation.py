"""Non-linearities as modules whose 2:4 sparsity starts after `sparsity.dense_steps` training steps.

With dense steps a layer must know the number of the training step, `step` (1 for the first): pruning is on in steps
after `dense_steps`, and evaluation runs as the last trained step did. The number is saved with the module's state, so a
checkpoint is evaluated as it was trained. It is set by one of these; training without any raises an error, since the
model would silently stay dense:

    set_step(models, step)          called before each step by a loop that knows its number (`elas train`)
    count_steps(models, optimizer)  called once before any other loop; counts steps of the optimizer
                                    (`elas.model.counting`)
    elas.megatron                   follows the iterations of Megatron-LM's loop

`elas.model.observe` measures what 2:4 does to the activation.
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
    """Knows whether 2:4 is active, and has an observer.

    Args:
        sparsity: kind, options of the kernel, dense steps.
        kind: the non-linearity; only `relu2` can be sparse.

    Attributes:
        is_relu2: whether it is a squared ReLU, which the observer can measure.
        can_be_sparse: whether 2:4 is configured.
        dense_steps: training steps before 2:4 is on.
        step: number of the training step that began last or, with `count_steps`, ended last; 0 before the first.
        counter: the counter of steps, if `count_steps` was called.
    """

    DENSE_STEPS = "sparsity.dense_steps"  # the name of the setting in errors
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
        self.step = 0  # the buffer's value; reading the buffer would wait for the GPU
        if self.dense_steps:
            self.register_buffer(STEP_KEY, torch.zeros(1, dtype=torch.int64))
        self._version = 0  # of the buffer when `step` was read from it
        self.observer = Observer()

    @property
    def sparse(self) -> bool:
        """Whether 2:4 is on in the module's current mode, training or evaluation."""
        return self._sparse[0] if self.training else self._sparse[1]

    @sparse.setter
    def sparse(self, active: bool) -> None:
        self._sparse = active, active

    def taken(self, step: int) -> None:
        """Record that training step `step` has ended; evaluation runs as this step did."""
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
        """The kernel's current options.

        Raises:
            ConfigError: in training, if the number of the step is unknown.
        """
        if not self.knows_step:
            if self.training:
                why = "nothing counts the training steps of this layer, so 2:4 would never start"
                fix = "call elas.nn.count_steps(model, optimizer), again after adding a layer"
                raise ConfigError(self.DENSE_STEPS, self.dense_steps, why, f"{fix}, or set dense_steps to 0")
            self._follow_buffer()
        return self._options[self.sparse]

    def _follow_buffer(self) -> None:
        """Read the buffer if it was written in place, as `AveragedModel` does, without a method of the module."""
        step = self.sparsity_step
        if torch.compiler.is_compiling() or type(step) is not torch.Tensor or step.is_meta or step.is_inference():
            return
        if step._version != self._version:  # only then: reading waits for the GPU
            self.step, self._version = int(step), step._version
            self._sparse = self.step + 1 > self.dense_steps, self.step > self.dense_steps

    def reset_parameters(self) -> None:
        """Set the step to 0; after `to_empty` the buffer is uninitialised memory."""
        if self.dense_steps:
            with torch.no_grad():
                self.sparsity_step.zero_()
            self.step, self._sparse = 0, (False, False)

    def __getstate__(self) -> dict:
        """For copies and pickles: they have no counter, so training one before `count_steps` is an error."""
        return {**self.__dict__, "counter": None, "knows_step": self.dense_steps == 0}

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if self.dense_steps:
            self.step = int(self.sparsity_step)
            self._sparse = self.step + 1 > self.dense_steps, self.step > self.dense_steps
        elif prefix + STEP_KEY in unexpected:  # saved with dense steps, loaded without: there is nothing to count
            unexpected.remove(prefix + STEP_KEY)


class Activation(SparseSwitch):
    """An element-wise non-linearity: `silu`, or `relu2`, with 2:4 if that is active."""

    def __init__(self, sparsity: SparsityConfig, kind: str):
        super().__init__(sparsity, kind)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [..., f]` to the same shape and dtype."""
        if self.kind == "silu":
            return F.silu(x)
        options = self.options  # before `self.sparse`, which it updates
        self.observer.look(x, None, self.sparse)
        return relu2_24(x, options)


class SquaredReLU24(Activation):
    """`Activation` of kind `relu2` with the constructor that Megatron's MLP calls."""

    def __init__(self, config: "ElasTransformerConfig"):
        super().__init__(config.sparsity, "relu2")


def switches(models: Iterable[torch.nn.Module]) -> list[SparseSwitch]:
    """The layers in these models that can be sparse."""
    return [m for model in models for m in model.modules() if isinstance(m, SparseSwitch) and m.can_be_sparse]


def set_sparse(models: Iterable[torch.nn.Module], active: bool) -> None:
    """Turn 2:4 on or off in every layer that can be sparse, regardless of the step."""
    for switch in switches(models):
        switch.sparse, switch.knows_step = active, True


def set_step(models: Iterable[torch.nn.Module], step: int) -> None:
    """Set the number of the training step that begins (1 for the first); 2:4 is on after `sparsity.dense_steps`."""
    for switch in switches(models):
        switch.sparse, switch.knows_step = step > switch.dense_steps, True
        if switch.dense_steps and switch.step != step:
            switch.step = step
            switch.sparsity_step.fill_(step)
