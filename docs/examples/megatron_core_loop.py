"""Megatron-core's own training loop with ELAS's layers: neither `elas train` nor a checkout of Megatron-LM.

The model comes from ELAS's provider. Schedule, DistributedDataParallel, optimizer and distributed checkpoints are
Megatron-core's, in the manner of its `run_simple_mcore_train_loop.py`. It runs on GPUs or CPUs:

    torchrun --nproc_per_node 2 megatron_core_loop.py --tensor 2 --steps 12 --save checkpoint   # tensor parallel
    torchrun --nproc_per_node 2 megatron_core_loop.py --steps 16 --load checkpoint              # go on, data parallel

It prints loss and gradient norm of every step. After `--save`, each rank reads the checkpoint into a new model, and it
prints in how many weights they differ by a bit: none. The optimizer is Megatron's plain one: without Apex or
Transformer Engine, Megatron-core 0.16 cannot load the state of its distributed one, for any model.
"""

import argparse
from itertools import count
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from elas import accelerator, parallel
from elas.config import ParallelConfig, load_config
from elas.model.provider import make_model_provider
from elas.nn import count_steps

VOCABULARY, LENGTH, GLOBAL_BATCH, MICRO_BATCHES = 128, 32, 8, 2
SETTINGS = {"model.hidden_size": 64, "model.ffn_hidden_size": 256, "model.num_layers": 2, "low_rank.rank": 16}
SETTINGS |= {"model.vocab_size": VOCABULARY, "model.seq_length": LENGTH, "train.dtype": "float32"}
SETTINGS |= {"model.num_attention_heads": 4, "sparsity.dense_steps": 4}


def build(tensor: int, seed: int):
    """The model in Megatron's DDP, and Megatron's Adam."""
    config = load_config(None, {**SETTINGS, "parallel.tensor": tensor, "train.seed": seed})
    module = make_model_provider(config)().to(accelerator.device())
    model = DistributedDataParallel(module.config, DistributedDataParallelConfig(), module)
    adam = OptimizerConfig(optimizer="adam", lr=3e-3, clip_grad=1.0)
    optimizer = get_megatron_optimizer(adam, [model], use_gloo_process_groups=False)  # there is one set of groups
    module.config.finalize_model_grads_func = finalize_model_grads  # the schedule calls it to all-reduce gradients
    count_steps(model, optimizer)  # 2:4 begins after `sparsity.dense_steps` steps of this optimizer
    return model, optimizer


def micro_batches(first_step: int):
    """This rank's micro-batches: sequences that count up by 1 to 3; the global batch is the same on every layout."""
    for step in count(first_step):
        drawn = torch.randint(1, 4, (GLOBAL_BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        samples = (drawn.cumsum(1) % VOCABULARY).to(accelerator.device())
        yield from samples[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()].chunk(MICRO_BATCHES)


def forward_step(batches, model):
    """Losses of a micro-batch's tokens, and the function by which the schedule reduces them to one."""
    samples = next(batches)
    positions = torch.arange(LENGTH, device=samples.device).expand(len(samples), -1)
    losses = model(samples[:, :-1], positions, None, labels=samples[:, 1:])
    return losses, lambda losses: (losses.mean(), losses.detach().mean())


def train_step(model, optimizer, batches) -> str:
    """One step; returns the loss over all data-parallel ranks, and the gradient norm."""
    model.zero_grad_buffer()
    optimizer.zero_grad()
    sizes = dict(seq_length=LENGTH, micro_batch_size=GLOBAL_BATCH // MICRO_BATCHES, num_microbatches=MICRO_BATCHES)
    schedule = get_forward_backward_func()
    seen = schedule(forward_step_func=forward_step, data_iterator=batches, model=model, forward_only=False, **sizes)
    norm = optimizer.step()[1]
    loss = torch.stack(seen).mean() / mpu.get_data_parallel_world_size()
    torch.distributed.all_reduce(loss, group=mpu.get_data_parallel_group())
    return f"loss {loss:.7f} norm {norm:.5f}"


def state_of(model, optimizer, is_loading: bool = False) -> dict:
    """This rank's weights and moments, described so that any layout can read them."""
    weights = model.module.sharded_state_dict()
    return {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, is_loading=is_loading)}


def load(folder: Path, model, optimizer) -> int:
    """Read a checkpoint of any layout; returns its step."""
    state = dist_checkpointing.load(state_of(model, optimizer, is_loading=True), str(folder))
    model.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def main() -> None:
    """Train, save, and read back."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks; the others are data parallel")
    parser.add_argument("--steps", type=int, default=16, help="last step")
    parser.add_argument("--save", type=Path, help="folder for a checkpoint of the last step")
    parser.add_argument("--load", type=Path, help="checkpoint to continue from")
    options = parser.parse_args()
    parallel.initialize(ParallelConfig(tensor=options.tensor), seed=1)  # elas.prepare(), process groups, seeds
    say = print if torch.distributed.get_rank() == 0 else lambda _: None
    model, optimizer = build(options.tensor, seed=1)
    first = load(options.load, model, optimizer) if options.load else 0
    batches = micro_batches(first)
    for step in range(first, options.steps):
        say(f"step {step + 1} {train_step(model, optimizer, batches)}")
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        dist_checkpointing.save({**state_of(model, optimizer), "step": options.steps}, str(options.save))
        again = build(options.tensor, seed=2)  # other weights, until they are loaded
        load(options.save, *again)
        pairs = list(zip(model.parameters(), again[0].parameters(), strict=True))
        differ = torch.tensor(sum(not torch.equal(*pair) for pair in pairs), device=accelerator.device())
        torch.distributed.all_reduce(differ)
        say(f"reloaded: {len(pairs)} weights a rank, {int(differ)} of all differ in a bit")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
