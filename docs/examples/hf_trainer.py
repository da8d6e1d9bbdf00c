"""A causal LM of your own with ELAS's layers in Hugging Face's Trainer, by itself or with DeepSpeed ZeRO 1.

Two pieces of ELAS, without process groups of its own and without Megatron-core: `ffn_core`, which computes
`prune(relu²(u m_upᵀ)) n_downᵀ` and keeps nothing d_ff wide for the backward pass, inside an MLP written here; and
`LowRankLinear` for the projections of attention. Everything else is transformers' Llama, and any training loop works.

    python hf_trainer.py --steps 30                                                     # Trainer alone
    torchrun --nproc_per_node 2 hf_trainer.py --steps 30 --deepspeed                    # and ZeRO 1, also: deepspeed …

It needs `pip install accelerate`. It runs on GPUs or CPUs, on data that it makes itself, and prints the losses that the
Trainer logs, and at the end the first and the last of them:

    ZeRO stage 1, processes: 2, loss: 3.98 to 1.45 in 30 steps
"""

import argparse
import tempfile

import elas

elas.prepare()  # without CUDA, DeepSpeed takes the CPU; before `deepspeed` is imported

import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments  # noqa: E402

from elas.extensions import load_deepspeed  # noqa: E402
from elas.kernels.relu2_24 import Relu24Options, ffn_core  # noqa: E402
from elas.nn import LowRankLinear  # noqa: E402

VOCABULARY, LENGTH = 64, 32
ZERO = {
    "zero_optimization": {"stage": 1},
    "zero_force_ds_cpu_optimizer": False,  # the Trainer's AdamW, without compiling DeepSpeed's
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


class SparseMLP(torch.nn.Module):
    """`y = (prune(relu²(x · into · m_up)) · n_down) · out`: of every four features of a token, two are kept."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int, rank: int):
        super().__init__()
        self.into = torch.nn.Linear(hidden_size, rank, bias=False)
        self.m_up = torch.nn.Parameter(torch.randn(ffn_hidden_size, rank) * (2 / (ffn_hidden_size + rank)) ** 0.5)
        self.n_down = torch.nn.Parameter(torch.randn(rank, ffn_hidden_size) * (2 / (ffn_hidden_size + rank)) ** 0.5)
        self.out = torch.nn.Linear(rank, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [..., hidden_size]` to the same shape."""
        return self.out(ffn_core(self.into(x), self.m_up, self.n_down, Relu24Options()))


def build(rank: int = 16) -> LlamaForCausalLM:
    """A small Llama whose MLPs and linears of attention are replaced."""
    sizes = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, use_cache=False)
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp = SparseMLP(config.hidden_size, config.intermediate_size, rank)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, LowRankLinear(config.hidden_size, config.hidden_size, rank))
    return model


def data(samples: int = 512) -> list[dict]:
    """Sequences that count up by 1 to 3: something to learn."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(VOCABULARY, (samples, 1), generator=generator)
    ups = torch.randint(1, 4, (samples, LENGTH), generator=generator).cumsum(1)
    return [{"input_ids": row, "labels": row} for row in ((starts + ups) % VOCABULARY).tolist()]


def main() -> None:
    """Train and print the losses."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--deepspeed", action="store_true", help="ZeRO 1")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    options = parser.parse_args()
    if options.deepspeed:
        load_deepspeed()  # else DeepSpeed compiles an op for CPUs, for minutes, that training does not use
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=options.steps, per_device_train_batch_size=8, learning_rate=1e-2, seed=1,
            lr_scheduler_type="constant", logging_steps=5, report_to="none", save_strategy="no", disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(), deepspeed=ZERO if options.deepspeed else None,
        )  # fmt: skip
        torch.manual_seed(1)  # the same weights on every process
        trainer = Trainer(build(), arguments, train_dataset=data())
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    if trainer.is_world_process_zero():
        how = f"ZeRO stage {trainer.model_wrapped.zero_optimization_stage()}" if options.deepspeed else "Trainer alone"
        losses_seen = f"{losses[0]:.2f} to {losses[-1]:.2f} in {options.steps} steps"
        print(f"{how}, processes: {arguments.world_size}, loss: {losses_seen}")


if __name__ == "__main__":
    main()
