"""Megatron-LM's `pretrain_gpt.py` with ELAS's layers: what a script of your own changes are the two marked lines.

Put a checkout of Megatron-LM core_v0.16.1 on PYTHONPATH; all of its arguments work as ever, with ELAS's beside them:

    PYTHONPATH=~/Megatron-LM torchrun --nproc_per_node 8 docs/examples/pretrain_gpt_elas.py \
        --squared-relu --low-rank lowrank --rank 256 --dense-steps 1000 --tensor-model-parallel-size 4 …
"""

from functools import partial

import pretrain_gpt as gpt
from megatron.core.enums import ModelType
from megatron.training import pretrain
from model_provider import model_provider

from elas.megatron import elas_builder, extra_args_provider  # the first line


def main() -> None:
    """Train, by Megatron-LM's own data, loss and loop."""
    gpt.train_valid_test_datasets_provider.is_distributed = True
    pretrain(
        gpt.train_valid_test_datasets_provider,
        partial(model_provider, elas_builder),
        ModelType.encoder_or_decoder,
        gpt.forward_step,
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
        extra_args_provider=extra_args_provider,  # and the second, with `elas_builder` in place of `gpt_builder`
        get_embedding_ranks=gpt.get_embedding_ranks,
    )


if __name__ == "__main__":
    main()
