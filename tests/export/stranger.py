"""What a user without ELAS does with exported folders; run by `alone.run`. The last line of output is JSON.

stranger.py use RESULT ELAS DENSE     load, run, generate, save and load again, shard, compile
stranger.py tune RESULT ELAS          10 steps with Trainer, and with LoRA adapters by PEFT
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

assert importlib.util.find_spec("elas") is None, "this environment must not have ELAS"
assert importlib.util.find_spec("megatron") is None
TOKENS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(3))


def load(folder, **more):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **more)


def use(elas: Path, dense: Path) -> dict:
    model = load(elas, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(TOKENS).logits
    facts = {"class": type(model).__name__, "module": type(model).__module__.split(".")[0]}
    facts |= {"logits": logits.tolist(), "text": generate(model, TOKENS[:1, :8])}
    facts |= {"dense": type(AutoModelForCausalLM.from_pretrained(dense)).__name__}
    facts |= {"base": type(AutoModel.from_pretrained(elas, trust_remote_code=True)).__name__}
    facts |= {"config": AutoConfig.from_pretrained(elas, trust_remote_code=True).low_rank}
    for name, other in again(model).items():
        with torch.no_grad():
            facts[name] = float((other(TOKENS).logits - logits).abs().max())
    facts["attention"] = {}
    for kind in ("eager", "sdpa"):
        other = load(elas, dtype=torch.float32, attn_implementation=kind).eval()
        with torch.no_grad():
            facts["attention"][kind] = float((other(TOKENS).logits - logits).abs().max())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        facts["compiled"] = float((compiled(TOKENS).logits - logits).abs().max())
    facts["padded"] = padded(model)
    facts["recomputed"] = recomputed(model)
    return facts


def generate(model, tokens, mask=None, new: int = 12) -> list:
    mask = torch.ones_like(tokens) if mask is None else mask
    out = model.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return out[:, tokens.shape[1] :].tolist()


def again(model) -> dict:
    """The model after `save_pretrained`, once whole and once in shards."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/whole")
        model.save_pretrained(f"{folder}/shards", max_shard_size="50KB")
        assert len(list(Path(folder, "shards").glob("*.safetensors"))) > 1
        assert (Path(folder, "whole") / "modeling_elas.py").exists()
        return {name: load(f"{folder}/{name}").eval() for name in ("whole", "shards")}


def padded(model) -> bool:
    """Whether a short text, padded on the left in a batch, is continued as alone."""
    short = TOKENS[1:, :5]
    batch = torch.cat([TOKENS[:1, :8], torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    found = []
    for cache in ("full", "latent"):
        model.config.value_cache = cache
        found.append(generate(model, batch, mask) == generate(model, TOKENS[:1, :8]) + generate(model, short))
    model.config.value_cache = "full"
    return all(found)


def recomputed(model) -> float:
    """Largest relative difference of a gradient with gradient checkpointing."""
    model.train()
    gradients = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model.eval()
    return float((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max())


def tune(elas: Path) -> dict:
    from peft import LoraConfig, PeftModel, get_peft_model

    facts = {"trainer": steps(load(elas, dtype=torch.float32, device_map="cpu"))}
    facts["auto"] = str(load(elas, device_map="auto").device)
    for name, modules in (("factors", ["factor_in", "factor_out"]), ("all", "all-linear")):
        model = get_peft_model(
            load(elas, dtype=torch.float32), LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM")
        )
        before = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
        facts[name] = steps(model)
        assert all(torch.equal(a, b) for a, b in zip(before, (p for p in model.parameters() if not p.requires_grad)))
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model.eval()
            expected = model(TOKENS).logits
            model.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(load(elas, dtype=torch.float32), folder).eval()
            facts[f"{name} again"] = float((loaded(TOKENS).logits - expected).abs().max())
            facts[f"{name} merged"] = float((loaded.merge_and_unload()(TOKENS).logits - expected).abs().max())
    return facts


def steps(model) -> list[float]:
    """Losses of 10 steps on the same few tokens."""
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=10, per_device_train_batch_size=2, learning_rate=3e-3, logging_steps=1, report_to=[],
            use_cpu=True, save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    result = {"use": use, "tune": tune}[sys.argv[1]](*map(Path, sys.argv[3:]))
    Path(sys.argv[2]).write_text(json.dumps(result))
