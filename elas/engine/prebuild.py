"""Compiling what a run will need before its process groups exist."""

from elas.config import Config
from elas.config.deepspeed import offloads_optimizer, read_deepspeed_json
from elas.engine.deepspeed import check_deepspeed_json


def prebuild(config: Config) -> None:
    """Compile what the run will need; called by every rank, of which one builds while the others wait.

    Raises:
        UserError: DeepSpeed's op cannot be built, or a kernel named in `sparsity.implementation` cannot be had.
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
