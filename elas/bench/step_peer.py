"""The model that `elas bench step` compares with: transformers' Llama, torch's AdamW and a plain loop.

It has the shape and the initial weights of the full-rank SwiGLU variant, so both compute the same loss. In bf16 its
weights and moments are bf16 only, while ours are also fp32 in ZeRO, so it moves 8 bytes per parameter less.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from elas.bench.step_models import Batch
from elas.config import Config, ffn_width
from elas.model.transformer_config import DTYPES
from elas.optim.adamw import parameter_groups


class HfLlama:
    """A `LlamaForCausalLM` with the `step` of `elas.engine.engine.Engine`.

    Args:
        config: of the full-rank SwiGLU variant.
        model: Megatron's model of that configuration, whose weights are copied.
        fused: whether AdamW is one kernel, instead of torch's default.
        compiled: whether the model runs through torch.compile.
        checkpointed: whether each layer is computed again in the backward pass (transformers' gradient checkpointing).
    """

    def __init__(
        self,
        config: Config,
        model: torch.nn.Module,
        *,
        fused: bool = False,
        compiled: bool = False,
        checkpointed: bool = False,
    ):
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = config.model
        self._clip = config.optimizer.clip_grad
        weights = dict(model.named_parameters())
        dtype = DTYPES[config.train.dtype]
        with torch._C.DisableTorchFunction():
            fields: dict[str, Any] = {  # rope_theta is accepted, but not declared as a parameter
                "vocab_size": shape.vocab_size,
                "hidden_size": shape.hidden_size,
                "intermediate_size": ffn_width(config),
                "num_hidden_layers": shape.num_layers,
                "num_attention_heads": shape.num_attention_heads,
                "num_key_value_heads": shape.num_query_groups or shape.num_attention_heads,
                "max_position_embeddings": shape.max_position_embeddings or shape.seq_length,
                "rms_norm_eps": shape.norm_eps,
                "rope_theta": float(shape.rotary_base),
                "tie_word_embeddings": shape.tie_embeddings,
                "use_cache": False,
            }
            model_of: Any = LlamaForCausalLM._from_config
            self.model = model_of(LlamaConfig(**fields), attn_implementation="sdpa", dtype=dtype)
            self.model.to(next(iter(weights.values())).device)
            self.model.load_state_dict(to_llama(weights, config), strict=not shape.tie_embeddings)
            self.model.train()
            if checkpointed:
                self.model.gradient_checkpointing_enable()
            self._call = torch.compile(self.model) if compiled else self.model
            chosen = config.optimizer
            self.optimizer = torch.optim.AdamW(
                parameter_groups(self.model, chosen.weight_decay),
                lr=chosen.lr,
                betas=(chosen.beta1, chosen.beta2),
                eps=chosen.eps,
                fused=fused or None,
            )

    @property
    def module(self) -> torch.nn.Module:
        """The whole model."""
        return self.model

    @contextlib.contextmanager
    def around_update(self, begin: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
        """Call these before and after each step of the optimizer."""
        handles = [
            self.optimizer.register_step_pre_hook(lambda *_: begin()),
            self.optimizer.register_step_post_hook(lambda *_: end()),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def ends(self) -> list[torch.nn.Module]:
        """Embedding and final norm."""
        return [self.model.model.embed_tokens, self.model.model.norm]

    @property
    def layers(self) -> list[torch.nn.Module]:
        """The transformer layers."""
        return list(self.model.model.layers)

    def parameters(self) -> list[torch.nn.Parameter]:
        """All parameters."""
        return list(self.model.parameters())

    def step(self, batch: Batch) -> tuple[float, float]:
        """Mean loss and gradient norm of one step on tokens and labels `[b, s]`.

        The replacement of CUDA, a torch function mode, is off here, since it would slow this model down.
        """
        tokens, labels = batch
        with torch._C.DisableTorchFunction():
            loss = self._call(input_ids=tokens, labels=labels, shift_labels=labels).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip or float("inf"))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return float(loss.detach()), float(norm)


def to_llama(weights: Mapping[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
    """Megatron's full-rank SwiGLU weights under Llama's names.

    Megatron's QKV weight holds for each key/value head its query heads, the key head and the value head; fc1 holds
    gate, then up.
    """
    heads = config.model.num_attention_heads
    groups = config.model.num_query_groups or heads
    hidden, head = config.model.hidden_size, config.model.hidden_size // heads
    out = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
    }
    if not config.model.tie_embeddings:
        out["lm_head.weight"] = weights["output_layer.weight"]
    for i in range(config.model.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        mixed = weights[ours + "self_attention.linear_qkv.weight"].view(groups, heads // groups + 2, head, hidden)
        gate, up = weights[ours + "mlp.linear_fc1.weight"].chunk(2)
        parts = {
            "input_layernorm": weights[ours + "input_layernorm.weight"],
            "self_attn.q_proj": mixed[:, :-2].reshape(-1, hidden),
            "self_attn.k_proj": mixed[:, -2].reshape(-1, hidden),
            "self_attn.v_proj": mixed[:, -1].reshape(-1, hidden),
            "self_attn.o_proj": weights[ours + "self_attention.linear_proj.weight"],
            "post_attention_layernorm": weights[ours + "pre_mlp_layernorm.weight"],
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": weights[ours + "mlp.linear_fc2.weight"],
        }
        out |= {f"{theirs}{name}.weight": weight for name, weight in parts.items()}
    return {name: weight.detach() for name, weight in out.items()}
