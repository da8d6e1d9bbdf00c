"""The interface to Megatron-core: a backend that provides low-rank, 2:4-sparse modules, and layer specs with it."""

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from elas.model.activation import SquaredReLU24
from elas.model.attention import ElasSelfAttention, SdpaCoreAttention
from elas.model.check import check
from elas.model.ffn import ffn_class
from elas.model.full_rank import FullRankColumnParallelLinear, FullRankRowParallelLinear
from elas.model.low_rank import LowRankColumnParallelLinear, LowRankRowParallelLinear
from elas.model.norm import LayerNorm, RMSNorm
from elas.model.transformer_config import ElasTransformerConfig


class ElasTransformerLayer(TransformerLayer):
    """Megatron's layer; with `config.recompute_bottleneck`, linears compute their norm's output again."""

    def __init__(self, config: ElasTransformerConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if not config.recompute_bottleneck:
            return
        inputs = [(self.input_layernorm, self.self_attention.linear_qkv), (self.pre_mlp_layernorm, self.mlp.linear_fc1)]
        for norm, linear in inputs:
            norm.remembers, linear.input_norm = True, (norm,)


class ElasSpecProvider(BackendSpecProvider):
    """Megatron-core's backend protocol with ELAS's modules.

    Args:
        low_rank: whether linears are factor pairs, or else Megatron's full-rank linears.
    """

    def __init__(self, low_rank: bool = True):
        self.low_rank = low_rank

    def column_parallel_linear(self) -> type:
        """Linear whose output features are split over tensor-parallel ranks."""
        return LowRankColumnParallelLinear if self.low_rank else FullRankColumnParallelLinear

    def row_parallel_linear(self) -> type:
        """Linear whose input features are split over tensor-parallel ranks."""
        return LowRankRowParallelLinear if self.low_rank else FullRankRowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        """False: norms are separate modules."""
        return False

    def column_parallel_layer_norm_linear(self) -> type | None:
        """None: norms are separate modules."""
        return None

    def layer_norm(self, rms_norm: bool = True, for_qk: bool = False) -> type:
        """RMSNorm or LayerNorm, for layers and for q and k; both support sequence parallelism."""
        return RMSNorm if rms_norm else LayerNorm

    def core_attention(self) -> type:
        """Causal attention without an s × s matrix."""
        return SdpaCoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool):
        """Not supported: there are no low-rank experts.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("ElasSpecProvider has no mixture-of-experts layers")

    def activation_func(self) -> type:
        """Squared ReLU with 2:4, for Megatron's MLP with `use_te_activation_func`; `ElasFFN` has its own."""
        return SquaredReLU24


def layer_spec(provider: BackendSpecProvider, config: ElasTransformerConfig | None = None, tp_group=None) -> ModuleSpec:
    """Spec of one transformer layer made of `provider`'s modules.

    Args:
        provider: provides the modules.
        config: the norms, by `normalization`, `qk_layernorm`, `qk_l2_norm`; None: RMSNorm before attention and FFN, and
            none for q and k.
        tp_group: tensor-parallel group of the FFN; None takes Megatron's global one. (Megatron passes groups to
            attention and to its own MLP only.)
    """
    rms_norm = True
    qk_norm: Any = None  # None is allowed; Megatron's annotation lacks it
    if config is not None:
        check(config)
        rms_norm = config.normalization == "RMSNorm"
        if config.qk_l2_norm:
            qk_norm = L2Norm
        elif config.qk_layernorm:
            qk_norm = provider.layer_norm(rms_norm, for_qk=True)
    add: Any = get_bias_dropout_add  # Megatron's annotation is too narrow
    linears = MLPSubmodules(linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear())
    attention = SelfAttentionSubmodules(
        linear_qkv=provider.column_parallel_linear(),
        core_attention=provider.core_attention(),
        linear_proj=provider.row_parallel_linear(),
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    return ModuleSpec(
        module=ElasTransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=provider.layer_norm(rms_norm),
            self_attention=ModuleSpec(
                module=ElasSelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=add,
            pre_cross_attn_layernorm=IdentityOp,
            pre_mlp_layernorm=provider.layer_norm(rms_norm),
            mlp=ffn_class(linears, tp_group),
            mlp_bda=add,
        ),
    )


def block_spec(
    config: ElasTransformerConfig, vp_stage: int | None = None, pg_collection=None
) -> TransformerBlockSubmodules:
    """Spec of the layers of this pipeline stage or chunk, with the final norm on the last stage.

    Args:
        config: widths, `low_rank` and parallel sizes.
        vp_stage: model chunk of an interleaved pipeline.
        pg_collection: process groups; None takes Megatron's global ones.

    Raises:
        ConfigError: a field that requests an unsupported feature (`elas.model.features`).
    """
    check(config)
    provider = ElasSpecProvider(low_rank=config.low_rank.kind != "none")
    tp_group = None if pg_collection is None else pg_collection.tp
    pp_rank = None if pg_collection is None else pg_collection.pp.rank()
    number = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    layers = [layer_spec(provider, config, tp_group)] * number
    norm: Any = provider.layer_norm(config.normalization == "RMSNorm")  # Megatron's annotation is too narrow
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)
