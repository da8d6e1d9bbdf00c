"""The seam to Megatron-core: a backend that provides low-rank, 2:4-sparse modules, and the layer specs made of it."""

import warnings

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from elas.model.attention import ElasSelfAttention, SdpaCoreAttention
from elas.model.ffn import ffn_class
from elas.model.low_rank import LowRankColumnParallelLinear, LowRankRowParallelLinear
from elas.model.norm import RMSNorm
from elas.model.transformer_config import ElasTransformerConfig


class ElasSpecProvider(BackendSpecProvider):
    """Megatron-core's backend protocol, answered with ELAS's modules.

    Args:
        low_rank: whether linears are factor pairs; False gives Megatron's own full-rank linears.
    """

    def __init__(self, low_rank: bool = True):
        self.low_rank = low_rank

    def column_parallel_linear(self) -> type:
        """Linear whose output features are split over tensor-parallel ranks."""
        return LowRankColumnParallelLinear if self.low_rank else ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        """Linear whose input features are split over tensor-parallel ranks."""
        return LowRankRowParallelLinear if self.low_rank else RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        """Norms are modules of their own."""
        return False

    def column_parallel_layer_norm_linear(self) -> type | None:
        """None: norms are modules of their own."""
        return None

    def layer_norm(self, rms_norm: bool = True, for_qk: bool = False) -> type:
        """RMSNorm that supports sequence parallelism (also where LayerNorm is asked for: the models have none)."""
        if not rms_norm:
            warnings.warn("ElasSpecProvider has RMSNorm only", stacklevel=2)
        return RMSNorm

    def core_attention(self) -> type:
        """Causal attention without an s × s matrix."""
        return SdpaCoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool):
        """Refused: there are no low-rank experts.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("ElasSpecProvider has no mixture-of-experts layers")

    def activation_func(self) -> type | None:
        """None: `ElasFFN` holds its activation."""
        return None


def layer_spec(provider: BackendSpecProvider) -> ModuleSpec:
    """Spec of one transformer layer made of `provider`'s modules."""
    linears = MLPSubmodules(linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear())
    attention = SelfAttentionSubmodules(
        linear_qkv=provider.column_parallel_linear(),
        core_attention=provider.core_attention(),
        linear_proj=provider.row_parallel_linear(),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=provider.layer_norm(rms_norm=True),
            self_attention=ModuleSpec(
                module=ElasSelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_cross_attn_layernorm=IdentityOp,
            pre_mlp_layernorm=provider.layer_norm(rms_norm=True),
            mlp=ffn_class(linears),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(config: ElasTransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Spec of this pipeline stage's (and chunk's) layers and, on the last one, the final norm.

    Args:
        config: widths, `low_rank` and parallel sizes.
        vp_stage: model chunk of an interleaved pipeline.
    """
    provider = ElasSpecProvider(low_rank=config.low_rank.kind != "none")
    layers = [layer_spec(provider)] * get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=provider.layer_norm(rms_norm=True))
