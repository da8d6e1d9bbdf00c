"""Train a tiny Llama with layers of `elas.nn` in Hugging Face's Trainer; print its losses as JSON.

python tests/nn/trained.py FOLDER plain      fp32
python tests/nn/trained.py FOLDER all        bf16=True, gradient checkpointing, torch_compile
"""

import json
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from elas.nn import LowRankFFN, LowRankLinear

STEPS = 8
WAYS = {
    "plain": {},
    "all": dict(
        bf16=True,
        gradient_checkpointing=True,
        torch_compile=True,
        torch_compile_backend="aot_eager",  # all of torch.compile but the code generator, which takes minutes
    ),
}


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=32, use_cache=False))
    for layer in model.model.layers:
        layer.mlp = LowRankFFN(64, 128, 16)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, LowRankLinear.from_linear(getattr(layer.self_attn, name), 16))
    return model


def losses(folder: str, way: str) -> list[float]:
    model = small_llama()
    drawn = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(1)).tolist()
    data = [{"input_ids": one, "labels": one} for one in drawn]
    arguments = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=8, learning_rate=2e-3, lr_scheduler_type="constant",
        logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, seed=1, **WAYS[way],
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    before = [p.detach().clone() for p in model.model.layers[0].mlp.parameters()]
    trainer.train()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.model.layers[0].mlp.parameters()))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    print(json.dumps({way: losses(sys.argv[1], way) for way in WAYS}))
