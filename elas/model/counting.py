"""`count_steps`: an optimizer counts the training steps of layers with dense steps; called once before a loop.

A step counts after the optimizer has taken it, so gradient accumulation, recomputation in the backward pass and skipped
steps do not count. Models get no hooks, so compiling, copying and pickling them does not change. The counter has weak
references to the models and finds their layers again at every step.
"""

import weakref
from collections.abc import Iterable

import torch

from elas.errors import ConfigError
from elas.model.activation import SparseSwitch, switches


class _Counter:
    """The steps of one model, or of several that share layers: the largest count of any of its optimizers.

    Optimizers for parts of the model each step once per training step; an optimizer that replaces another continues its
    count. Both are correct if each has its own count that starts at the total when it is added.
    """

    def __init__(self, total: int):
        self.total = total
        self.models: list[weakref.ref] = []
        self.counts: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()

    def add(self, models: Iterable[torch.nn.Module], optimizers: Iterable[torch.optim.Optimizer]) -> None:
        known = [ref() for ref in self.models]
        self.models += [weakref.ref(model) for model in models if all(model is not one for one in known)]
        for optimizer in optimizers:
            if optimizer not in self.counts:
                self.counts[optimizer] = self.total
                optimizer.register_step_post_hook(self.after_step)
        self.publish()

    def layers(self) -> list[SparseSwitch]:
        return [one for one in switches(self.living()) if one.dense_steps]

    def living(self) -> list[torch.nn.Module]:
        return [model for ref in self.models if (model := ref()) is not None]

    def publish(self) -> None:
        for layer in self.layers():
            layer.counter = self
            layer.taken(self.total)

    def after_step(self, optimizer: torch.optim.Optimizer, _args, _kwargs) -> None:
        if optimizer not in self.counts:  # its models belong to another counter now
            return
        held = [layer.step for layer in self.layers() if layer.knows_step]
        if held and max(held) != self.total:  # a checkpoint was loaded: continue from its step
            self.total = max(held)
            for one in self.counts:
                self.counts[one] = self.total
        self.counts[optimizer] += 1
        self.total = max(self.total, self.counts[optimizer])
        self.publish()


def count_steps(models: torch.nn.Module | list[torch.nn.Module], optimizer) -> None:
    """Count training steps for dense steps, in a loop other than `elas train`.

    Call it once, when the model and the optimizer exist, and again for a layer that is added later, a copy of the model
    or another optimizer. Repeated calls do not count twice.

    Args:
        models: the model, or its chunks, wrapped (DDP, FSDP) or not.
        optimizer: a `torch.optim.Optimizer`, or one of Megatron-core's or DeepSpeed's around it. If several optimizers
            each move a part of the model, call this for each.

    Raises:
        ConfigError: no model, no optimizer, or one that does not hold any of the models' parameters.
    """
    models = [models] if isinstance(models, torch.nn.Module) else models
    if not isinstance(models, list | tuple) or not all(isinstance(model, torch.nn.Module) for model in models):
        raise ConfigError(
            "models", type(models).__name__, "is not a model", "give a torch.nn.Module, or a list of them"
        )
    optimizers = _torch_optimizers(optimizer)
    if not optimizers:
        fix = "give the torch.optim.Optimizer that trains the model"
        raise ConfigError("optimizer", type(optimizer).__name__, "is not an optimizer", fix)
    _check_trains(models, optimizer)
    layers = [layer for layer in switches(models) if layer.dense_steps]
    counters = list({id(one.counter): one.counter for one in layers if isinstance(one.counter, _Counter)}.values())
    counter = counters[0] if counters else _Counter(max((layer.step for layer in layers), default=0))
    for other in counters[1:]:  # of models that were counted separately before
        counter.total = max(counter.total, other.total)
        counter.add(other.living(), list(other.counts))
        other.counts.clear()
    counter.add(models, optimizers)


def _check_trains(models: list[torch.nn.Module], optimizer) -> None:
    """Refuse a plain optimizer of other parameters; those of Megatron-core and DeepSpeed hold copies of parts."""
    if not isinstance(optimizer, torch.optim.Optimizer) or not hasattr(optimizer, "param_groups"):
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if held and not any(id(parameter) in held for model in models for parameter in model.parameters()):
        why = "holds none of the model's parameters, so its steps do not train the model"
        fix = "give the optimizer that trains it, created after the model is sharded and moved"
        raise ConfigError("optimizer", type(optimizer).__name__, why, fix)


def _torch_optimizers(optimizer) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside those of Megatron-core, DeepSpeed and Accelerate."""
    if isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "_optimizer_step_post_hooks"):
        return [optimizer]
    inner = getattr(optimizer, "chained_optimizers", None) or [getattr(optimizer, "optimizer", None)]
    return [one for each in inner if each is not None for one in _torch_optimizers(each)]
