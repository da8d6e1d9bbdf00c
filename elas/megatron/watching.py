"""What 2:4 does to activations, in Megatron-LM's log and TensorBoard: `--sparsity-tokens N`.

Megatron-LM has no callbacks around a step, so two functions of its training module are wrapped, of those that its loop
calls on every rank: `train_step`, before which layers are asked to look, and `training_log`, after which ranks sum up
what they saw.
"""

import argparse
import functools

import torch.distributed as dist

from elas.model import observe


def log_sparsity(args: argparse.Namespace) -> None:
    """Wrap Megatron-LM's training module, once; called by `elas_builder` where tokens are asked for.

    Args:
        args: Megatron's, with `sparsity_tokens`; looks are at iterations that `--log-interval` logs.
    """
    from megatron.training import training  # pyright: ignore[reportMissingImports]  of a Megatron-LM checkout

    if getattr(training.train_step, "looks", False):
        return
    train_step, training_log, watched = training.train_step, training.training_log, []

    @functools.wraps(train_step)
    def look_and_step(forward_step, data_iterator, model, *rest, **more):
        watched[:] = model if (args.curr_iteration + 1) % args.log_interval == 0 else []
        observe.look_next(model, args.sparsity_tokens if watched else 0)
        return train_step(forward_step, data_iterator, model, *rest, **more)

    @functools.wraps(training_log)
    def log_and_tell(losses, total, rate, iteration, *rest, **more):
        result = training_log(losses, total, rate, iteration, *rest, **more)
        if watched:
            _tell(observe.shares(observe.sum_over_ranks(watched, args.num_layers).sum(0)), iteration)
        return result

    look_and_step.looks = True  # pyright: ignore[reportAttributeAccessIssue]  a mark on the function
    training.train_step, training.training_log = look_and_step, log_and_tell


def _tell(shares: dict[str, float | None], iteration: int) -> None:
    """One line, by the last rank as Megatron's own, and to its TensorBoard."""
    from megatron.training.global_vars import get_tensorboard_writer  # pyright: ignore[reportMissingImports]

    if dist.get_rank() != dist.get_world_size() - 1 or shares["sparsity"] is None:
        return
    said = {name: value for name, value in shares.items() if value is not None}
    words = " | ".join(f"{name}: {value:.5f}" for name, value in said.items())
    print(f" iteration {iteration:8d} | {words} |", flush=True)
    writer = get_tensorboard_writer()
    for name, value in said.items() if writer else ():
        writer.add_scalar(f"elas/{name}", value, iteration)
