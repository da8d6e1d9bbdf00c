"""Builds a run's extensions and kernels before its process groups exist."""

from elas.config import Config
from elas.config.deepspeed import offloads_optimizer, read_deepspeed_json
from elas.engine.deepspeed import check_deepspeed_json


def prebuild(config: Config) -> None:
    """Build what the run needs; every rank calls it, one of them builds while the others wait.

    Raises:
        UserError: DeepSpeed's op cannot be built, or the kernel named in `sparsity.implementation` is unavailable.
    """
    from elas.extensions import prebuild_deepspeed

    check_deepspeed_json(config)
    if config.model.activation == "relu2":
        from elas.model import kernel

        kernel.chosen(config)
    prebuild_deepspeed(offload=offloads_optimizer(read_deepspeed_json(config)))
