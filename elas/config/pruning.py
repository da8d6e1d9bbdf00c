"""What 2:4 pruning and its kernel can be set to, shared by the `sparsity` section and `elas.kernels.relu2_24`."""

from typing import Any, Literal

from elas.errors import ConfigError

Method = Literal["magnitude", "soft_threshold"]
Gradient = Literal["masked", "ste"]
FfnMemory = Literal["fused", "compressed", "eager"]
Backward = Literal["dense", "split"]

SPLIT_REQUIRES = {"ffn_memory": "eager", "method": "magnitude", "gradient": "masked"}


def check_split(chosen: Any) -> None:
    """Refuse settings that the split backward pass does not support.

    Args:
        chosen: has `backward`, `ffn_memory`, `method` and `gradient`: a `SparsityConfig` or `Relu24Options`.

    Raises:
        ConfigError: `backward`, under the names of these fields.
    """
    if chosen.backward != "split":
        return
    for name, required in SPLIT_REQUIRES.items():
        if getattr(chosen, name) != required:
            why = f"not supported with {name}={getattr(chosen, name)}"
            raise ConfigError("backward", "split", why, f"set {name}={required}")
