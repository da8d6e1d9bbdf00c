"""Parameter counts by formula: of the whole model, and of the rank with the most parameters.

Legend: h hidden, g key/value width, f d_ff, r rank, V vocabulary, t tensor-parallel ranks.
"""

from elas.config import Config, ffn_width


def key_value_width(config: Config) -> int:
    """g: width of the keys and of the values, each."""
    model = config.model
    return model.hidden_size // model.num_attention_heads * (model.num_query_groups or model.num_attention_heads)


def layer_parameters(config: Config, tp: int = 1) -> int:
    """Parameters of one transformer layer on one of `tp` tensor-parallel ranks, including norms."""
    h, f, g = config.model.hidden_size, ffn_width(config), key_value_width(config)
    inputs = 2 if config.model.activation == "swiglu" else 1  # gate and up, or up alone
    if config.low_rank.kind == "none":
        return (h * (2 * h + 2 * g) + (inputs + 1) * h * f) // tp + 2 * h
    r = config.low_rank.rank
    # The factor on the hidden side is replicated on every rank; the one on the tensor-parallel side is sharded.
    replicated = 3 * r * h + h * r + inputs * r * h + h * r
    sharded = r * (h + 2 * g) + r * h + inputs * r * f + r * f
    return replicated + sharded // tp + 2 * h


def parameter_count(config: Config) -> int:
    """Parameters of the whole model; a tied embedding counts once."""
    model = config.model
    tables = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    return model.num_layers * layer_parameters(config) + model.hidden_size + tables


def rank_parameters(config: Config) -> int:
    """Parameters on a rank of the largest pipeline stage, before ZeRO partitions them."""
    model, parallel = config.model, config.parallel
    layers = model.num_layers // parallel.pipeline * layer_parameters(config, parallel.tensor)
    table = model.vocab_size * model.hidden_size // parallel.tensor
    if parallel.pipeline == 1:
        return layers + model.hidden_size + table * (1 if model.tie_embeddings else 2)
    return layers + model.hidden_size + table  # the last stage; the first has no final norm


def replicated_parameters(config: Config) -> int:
    """Parameters of one pipeline stage, with the final norm, that every tensor-parallel rank holds whole."""
    h, layers = config.model.hidden_size, config.model.num_layers // config.parallel.pipeline
    if config.low_rank.kind == "none":
        return layers * 2 * h + h
    inputs = 2 if config.model.activation == "swiglu" else 1
    return layers * ((5 + inputs) * config.low_rank.rank * h + 2 * h) + h


def largest_weight(config: Config) -> int:
    """Parameters of a rank's largest weight."""
    model, h, f = config.model, config.model.hidden_size, ffn_width(config)
    gated = 2 if model.activation == "swiglu" else 1
    if config.low_rank.kind == "none":
        widest = max(h + 2 * key_value_width(config), gated * f) * h
    else:
        widest = max(config.low_rank.rank * max(h, f), 3 * config.low_rank.rank * h)
    return max(model.vocab_size * h, widest) // config.parallel.tensor


def gated_width(config: Config) -> int:
    """d_ff of a SwiGLU that costs as much as the configuration's squared ReLU: two thirds, in multiples of 8.

    Of odd widths, tensor cores multiply at a third of their speed, which would flatter the others.
    """
    return max(8, int(ffn_width(config) / 1.5) // 8 * 8)
