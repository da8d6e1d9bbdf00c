"""Configuration of ELAS models for transformers: low-rank linears, squared ReLU, 2:4 sparsity of the activation."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class ElasConfig(PreTrainedConfig):
    """Shape and kind of an ELAS model (arXiv 2605.03667).

    Args:
        vocab_size: rows of the embedding and of the output layer.
        hidden_size: width of the residual stream.
        intermediate_size: width of the FFN.
        num_hidden_layers: layers.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; None for one for each query head.
        head_dim: width of a head; None for hidden_size / num_attention_heads.
        hidden_act: `relu2`, squared ReLU without a gate, or `silu`, gated (SwiGLU).
        max_position_embeddings: longest sequence that the model was trained for.
        initializer_range: standard deviation of embedding, output layer and full-rank linears at the start.
        rms_norm_eps: epsilon of RMSNorm.
        use_cache: keep keys and values while generating.
        tie_word_embeddings: the output layer is the embedding.
        rope_parameters: as in transformers; `{"rope_type": "default", "rope_theta": 10000.0}`.
        attention_dropout: on attention weights, in training.
        low_rank: `none`: full-rank linears; `lowrank`: W = factor_out · factor_in; `cola`: a non-linearity between.
        rank: inner width r of every pair of factors.
        factor_act: non-linearity between factors, of `cola`: `silu` or `relu2`.
        sparsity: `2:4` keeps two of every four features of a squared ReLU, `none` all.
        sparsity_method: `magnitude`, or `soft_threshold`, which also shrinks the kept two by the third largest.
        sparsity_gradient: `masked`, or `ste`, straight through the mask.
        sparsity_scale: factor on soft-thresholded values.
        value_cache: `full` keeps values while generating; `latent` keeps what they are made of, r numbers a token
            in place of num_key_value_heads · head_dim, and expands after the attention.
    """

    model_type = "elas"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "relu2"
    max_position_embeddings: int = 256
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_dropout: float | int = 0.0
    low_rank: str = "lowrank"
    rank: int = 128
    factor_act: str = "silu"
    sparsity: str = "2:4"
    sparsity_method: str = "magnitude"
    sparsity_gradient: str = "masked"
    sparsity_scale: float | int = 1.0
    value_cache: str = "full"

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """Which linears are split over tensor-parallel ranks: those beside the wide activation, not the bottlenecks."""
        column, row = (".factor_out", ".factor_in") if self.low_rank != "none" else ("", "")
        attention = {f"layers.*.self_attn.{name}_proj{column}": "colwise" for name in "qkv"}
        names = ("gate", "up") if self.hidden_act == "silu" else ("up",)
        ffn = {f"layers.*.mlp.{name}_proj{column}": "colwise" for name in names}
        ends = {f"layers.*.self_attn.o_proj{row}": "rowwise", f"layers.*.mlp.down_proj{row}": "rowwise"}
        return attention | ffn | ends

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str] | None) -> None:
        """Keep our plan: transformers before 5.22 sets one that also splits the embedding of tied models."""

    def validate_architecture(self):
        """Raise `ValueError` for a value that no model has; transformers calls it."""
        choices = {
            "hidden_act": ("relu2", "silu"),
            "low_rank": ("none", "lowrank", "cola"),
            "factor_act": ("silu", "relu2"),
            "sparsity": ("none", "2:4"),
            "sparsity_method": ("magnitude", "soft_threshold"),
            "sparsity_gradient": ("masked", "ste"),
            "value_cache": ("full", "latent"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        if self.num_key_value_heads is not None and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads}: must divide num_attention_heads="
                f"{self.num_attention_heads}"
            )
        if self.sparsity == "2:4" and self.hidden_act == "relu2" and self.intermediate_size % 4:
            raise ValueError(f"intermediate_size={self.intermediate_size}: 2:4 sparsity needs a multiple of 4")
        if self.value_cache == "latent" and self.low_rank == "none":
            raise ValueError("value_cache='latent': full-rank values have no latent; use 'full'")


__all__ = ["ElasConfig"]
