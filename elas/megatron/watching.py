"""Statistics of 2:4 in Megatron-LM's log and TensorBoard: `--sparsity-tokens N`.

Megatron-LM has no callbacks around a step, so two functions of its training module are wrapped that its loop calls on
every rank: before `train_step` a sample is requested from the layers, and after `training_log` ranks sum the counts.
"""

import argparse
import functools

import torch.distributed as dist

from elas.model import observe


def log_sparsity(args: argparse.Namespace) -> None:
    """Wrap functions of Megatron-LM's training module, once; called by `elas_builder` for `--sparsity-tokens`.

    Args:
        args: Megatron's, with `sparsity_tokens`; iterations that `--log-interval` logs are sampled.
    """
    from megatron.training import training  # pyright: ignore[reportMissingImports]  of a Megatron-LM checkout

    if getattr(training.train_step, "looks", False):
        return
    train_step, training_log, sampled = training.train_step, training.training_log, []

    @functools.wraps(train_step)
    def sample_and_step(forward_step, data_iterator, model, *rest, **more):
        sampled[:] = model if (args.curr_iteration + 1) % args.log_interval == 0 else []
        observe.look_next(model, args.sparsity_tokens if sampled else 0)
        return train_step(forward_step, data_iterator, model, *rest, **more)

    @functools.wraps(training_log)
    def log_and_write(losses, total, rate, iteration, *rest, **more):
        result = training_log(losses, total, rate, iteration, *rest, **more)
        if sampled:
            _write(observe.shares(observe.sum_over_ranks(sampled, args.num_layers).sum(0)), iteration)
        return result

    sample_and_step.looks = True  # pyright: ignore[reportAttributeAccessIssue]  a mark on the function
    training.train_step, training.training_log = sample_and_step, log_and_write


def _write(shares: dict[str, float | None], iteration: int) -> None:
    """Print one line, on the last rank like Megatron's own, and write to its TensorBoard."""
    from megatron.training.global_vars import get_tensorboard_writer  # pyright: ignore[reportMissingImports]

    if dist.get_rank() != dist.get_world_size() - 1 or shares["sparsity"] is None:
        return
    known = {name: value for name, value in shares.items() if value is not None}
    words = " | ".join(f"{name}: {value:.5f}" for name, value in known.items())
    print(f" iteration {iteration:8d} | {words} |", flush=True)
    writer = get_tensorboard_writer()
    for name, value in known.items() if writer else ():
        writer.add_scalar(f"elas/{name}", value, iteration)
