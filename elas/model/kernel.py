"""The FFN's kernel for a configuration; errors of `elas.kernels` under configuration keys.

`elas.kernels` names the arguments of its functions, which callers may know by other names; the keys for them are here
alone.
"""

import torch

from elas.config import Config, LowRankConfig, SparsityConfig, ffn_width
from elas.config.schema import SPARSITY_KEYS
from elas.errors import ConfigError
from elas.kernels.relu2_24 import Implementation, Relu24Options, registry


def keys_of(low_rank: LowRankConfig) -> dict[str, str]:
    """Configuration keys by the kernel's argument names; u and v are r wide, at full rank h wide."""
    width = "model.hidden_size" if low_rank.kind == "none" else "low_rank.rank"
    return {**SPARSITY_KEYS, "features": "model.ffn_hidden_size", "r_in": width, "r_out": width}


def options_of(sparsity: SparsityConfig, *, sparse: bool) -> Relu24Options:
    """The kernel's options of the `sparsity` section, with pruning on or off.

    Raises:
        ConfigError: an unknown value, or values that do not go together.
    """
    try:
        return Relu24Options.of(sparsity, sparse=sparse)
    except ConfigError as error:
        raise error.renamed(SPARSITY_KEYS) from None


def chosen(config: Config) -> tuple[Implementation, str]:
    """The implementation that computes the core of a run's squared-ReLU FFN on this machine, and why.

    The caller is to show it: the kernel's log does not repeat it in this process.

    Raises:
        ConfigError: the one named in `sparsity.implementation` is unknown, or cannot compute this run.
    """
    sparsity, dtype = config.sparsity, getattr(torch, config.train.dtype)
    r = config.model.hidden_size if config.low_rank.kind == "none" else config.low_rank.rank
    widths = registry.Widths(r, ffn_width(config) // config.parallel.tensor, r)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # without choosing or initialising one
    phases = [sparsity.kind != "none"]
    if phases[0] and sparsity.dense_steps:
        phases.append(False)
    choices = []
    for sparse in phases:
        options = options_of(sparsity, sparse=sparse)
        try:
            found, why = registry.choose(options, device, dtype, sparsity.implementation, widths)
        except ConfigError as error:
            if choices:  # it computes 2:4, but not the steps before it
                why = f"it does not compute the first {sparsity.dense_steps} steps, which have no 2:4"
                fix = "set sparsity.dense_steps=0 or sparsity.implementation=auto"
                raise ConfigError("sparsity.implementation", sparsity.implementation, why, fix) from None
            raise error.renamed(keys_of(config.low_rank)) from None
        registry.announced(found, why, device, dtype)
        choices.append((found, why))
    return choices[0]
