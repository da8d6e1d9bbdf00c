"""ELAS in Megatron-LM: two lines in its `pretrain_gpt.py`; its arguments keep their meaning.

    from elas.megatron import elas_builder, extra_args_provider

    pretrain(…, partial(model_provider, elas_builder), …, extra_args_provider=extra_args_provider)

`docs/examples/pretrain_gpt_elas.py` is such a script; `docs/megatron.md` lists what is supported and what is refused.
"""

from elas.megatron.arguments import extra_args_provider
from elas.megatron.builder import elas_builder

__all__ = ["elas_builder", "extra_args_provider"]
