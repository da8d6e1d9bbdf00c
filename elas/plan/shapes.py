"""Names and shapes of all weights of the whole model, by formula, without building the model."""

import math

from elas.config import Config, ffn_width
from elas.plan.counts import key_value_width

Shape = tuple[int, ...]


def weight_shapes(config: Config) -> dict[str, Shape]:
    """Shape of each weight by its global name (`elas.model.shards.global_names`); a tied embedding occurs once."""
    model = config.model
    shapes: dict[str, Shape] = {"embedding.word_embeddings.weight": (model.vocab_size, model.hidden_size)}
    for number in range(model.num_layers):
        shapes |= {f"decoder.layers.{number}.{name}": shape for name, shape in layer_shapes(config).items()}
    shapes["decoder.final_layernorm.weight"] = (model.hidden_size,)
    if not model.tie_embeddings:
        shapes["output_layer.weight"] = (model.vocab_size, model.hidden_size)
    return shapes


def layer_shapes(config: Config) -> dict[str, Shape]:
    """Shape of each weight of one layer, by its name within the layer."""
    h, f, g = config.model.hidden_size, ffn_width(config), key_value_width(config)
    inputs = {"gate": f, "up": f} if config.model.activation == "swiglu" else {"up": f}
    return {
        "input_layernorm.weight": (h,),
        **_linear(config, "self_attention.linear_qkv", h, {"q": h, "k": g, "v": g}),
        **_linear(config, "self_attention.linear_proj", h, {"out": h}),
        "pre_mlp_layernorm.weight": (h,),
        **_linear(config, "mlp.linear_fc1", h, inputs),
        **_linear(config, "mlp.linear_fc2", f, {"out": h}),
    }


def rank_sizes(config: Config) -> list[int]:
    """Parameters of each weight on a tensor-parallel rank, without a pipeline."""
    t, sizes = config.parallel.tensor, []
    whole = ("linear_qkv.factor_in", "linear_proj.factor_out", "linear_fc1.factor_in", "linear_fc2.factor_out")
    for name, shape in weight_shapes(config).items():
        split = len(shape) > 1 and not name.endswith(whole)
        sizes.append(math.prod(shape) // (t if split else 1))
    return sizes


def _linear(config: Config, name: str, width: int, outputs: dict[str, int]) -> dict[str, Shape]:
    if config.low_rank.kind == "none":
        return {f"{name}.weight": (sum(outputs.values()), width)}
    rank, several = config.low_rank.rank, len(outputs) > 1
    factors = {f"{name}.factor_out" + (f"_{pair}" if several else ""): (out, rank) for pair, out in outputs.items()}
    return {f"{name}.factor_in": (len(outputs) * rank, width), **factors}
