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
    from elas.kernels.relu2_24 import Relu24Options, select

    check_deepspeed_json(config)
    if config.model.activation == "relu2":
        import torch

        options = Relu24Options.of(config.sparsity, sparse=True)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        select(options, device, getattr(torch, config.train.dtype), config.sparsity.implementation)
    prebuild_deepspeed(offload=offloads_optimizer(read_deepspeed_json(config)))
