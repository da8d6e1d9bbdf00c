"""On two tensor-parallel ranks: models by `elas_builder` and by the layers alone, and context parallelism."""

import argparse
import dataclasses

import torch
from small import SIZES, batch, loss_of, small


def arguments(*given: str, **megatron) -> argparse.Namespace:
    """Parsed arguments: ours as given, and those of Megatron-LM that the builder reads."""
    from elas.megatron import extra_args_provider

    args = extra_args_provider(argparse.ArgumentParser()).parse_args(given)
    defaults = dict(
        padded_vocab_size=SIZES["vocab_size"],
        max_position_embeddings=SIZES["seq_length"],
        position_embedding_type="rope",
        fp16_lm_cross_entropy=False,
        untie_embeddings_and_output_weights=True,
        rotary_percent=1.0,
        rotary_base=10000,
        use_rope_scaling=False,
        rope_scaling_factor=8.0,
        rotary_seq_len_interpolation_factor=None,
        seed=1,
        init_method_std=0.02,
        squared_relu=True,
        curr_iteration=0,
    )
    return argparse.Namespace(**{**vars(args), **defaults, **megatron})


def megatron_config(**fields):
    """A plain `TransformerConfig`, as Megatron-LM makes it."""
    from features import BASE
    from megatron.core.activations import squared_relu
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(**{**BASE, "activation_func": squared_relu, **fields})


def by_builder() -> dict:
    """What the tests ask of models that `elas_builder` makes."""
    from elas import parallel
    from elas.config import ParallelConfig
    from elas.errors import UserError
    from elas.megatron import elas_builder
    from elas.model.activation import SparseSwitch

    parallel.initialize(ParallelConfig(tensor=2), seed=1)
    config = megatron_config(tensor_model_parallel_size=2)
    found = {}
    model = elas_builder(arguments("--rank", "16"), True, True, None, config=config)
    found["names"] = [name for name, _ in model.named_parameters()]
    found["stds"] = {name: (float(p.std()), getattr(p, "init_std", None)) for name, p in model.named_parameters()}
    found["values"] = {name: p.detach().flatten()[:64].tolist() for name, p in model.named_parameters() if p.dim() > 1}
    found["split"] = {name for name, p in model.named_parameters() if getattr(p, "tensor_model_parallel", False)}
    found["sparse"] = [m.sparse for m in model.modules() if isinstance(m, SparseSwitch)]
    found["loss"] = float(loss_of(model, *batch()))
    args = arguments("--rank", "16", "--layout-independent-init")
    found["independent"] = float(loss_of(elas_builder(args, True, True, None, config=config), *batch()))

    args = arguments("--rank", "16", "--dense-steps", "2")
    model = elas_builder(args, True, True, None, config=config)
    switch = next(m for m in model.modules() if isinstance(m, SparseSwitch))
    found["by iteration"] = []
    for iteration in (0, 1, 2, 7, 1):
        args.curr_iteration = iteration
        loss_of(model, *batch())
        found["by iteration"].append(switch.sparse)
        model.eval()
        with torch.no_grad():
            args.curr_iteration = 1000
            loss_of(model, *batch())
        model.train()
        found["by iteration"].append(switch.sparse)

    found["refused"] = []
    for given, megatron, fields in (
        (("--rank", "16"), {"reset_attention_mask": True}, {}),
        (("--rank", "16"), {"position_embedding_type": "mrope"}, {}),
        (("--rank", "65"), {}, {}),
        (("--rank", "16", "--sparsity-24"), {"squared_relu": False}, SWIGLU_FIELDS),
        (("--rank", "16"), {}, {"activation_func": torch.nn.functional.gelu}),
        (("--rank", "16"), {}, {"attention_backend": "flash"}),
        (("--rank", "16", "--sparsity-backward", "split"), {}, {}),
        (("--rank", "18", "--low-rank", "cola", "--low-rank-activation", "relu2"), {}, {}),
    ):
        try:
            other = megatron_config(tensor_model_parallel_size=2, **fields)
            elas_builder(arguments(*given, **megatron), True, True, None, config=other)
        except UserError as refusal:
            found["refused"].append(str(refusal))
            assert refusal.__cause__ is None and (refusal.__context__ is None or refusal.__suppress_context__)
    swiglu = megatron_config(tensor_model_parallel_size=2, **SWIGLU_FIELDS)
    model = elas_builder(arguments("--rank", "16", squared_relu=False), True, True, None, config=swiglu)
    found["swiglu"] = float(loss_of(model, *batch()))
    return found


def initialised() -> dict:
    """What `use_cpu_initialization` and `perform_initialization=False` do to layers, full rank and low rank."""
    from elas import parallel
    from elas.config import ParallelConfig
    from elas.megatron import elas_builder

    parallel.initialize(ParallelConfig(tensor=2), seed=1)
    found: dict = {"alike": {}, "split": set(), "drawn": {}}
    for kind in ("lowrank", "none"):
        args = arguments(*(["--rank", "16"] if kind == "lowrank" else []), "--low-rank", kind)
        torch.manual_seed(5)
        config = megatron_config(tensor_model_parallel_size=2, use_cpu_initialization=True)
        model = elas_builder(args, True, True, None, config=config)
        for name, parameter in model.named_parameters():
            parts = [torch.empty_like(parameter) for _ in range(2)]
            torch.distributed.all_gather(parts, parameter.detach())
            found["alike"][f"{kind} {name}"] = torch.equal(*parts)
            if getattr(parameter, "tensor_model_parallel", False):
                found["split"].add(f"{kind} {name}")
        if kind == "lowrank":  # the first factors made: qkv's input side, whole, then its output side, split
            torch.manual_seed(5)
            linear = model.decoder.layers[0].self_attention.linear_qkv
            found["whole"] = _redrawn(linear)
        before = _streams()
        unfilled = megatron_config(tensor_model_parallel_size=2, perform_initialization=False)
        elas_builder(args, True, True, None, config=unfilled)
        found["drawn"][kind] = before != _streams()
    return found


def _redrawn(linear) -> bool:
    """Whether a split factor's parts are those of the whole matrix, drawn on every rank from one stream."""
    h = linear.factor_in.shape[1]
    made = type(linear)(h, sum(linear.outputs.values()), config=linear.config, tp_comm_buffer_name="qkv")
    torch.manual_seed(5)
    whole_in = torch.empty(made.factor_in.shape).normal_(0.0, made.factor_in.init_std)
    rows = made.factor_out_q.shape[0]
    whole_q = torch.empty(2 * rows, made.rank).normal_(0.0, made.factor_out_q.init_std)
    mine = whole_q[torch.distributed.get_rank() * rows :][:rows]
    return torch.equal(made.factor_in, whole_in) and torch.equal(made.factor_out_q, mine)


def _streams() -> list[list[int]]:
    """States of all random streams."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    states = [torch.get_rng_state(), *get_cuda_rng_tracker().get_states().values()]
    return [state.tolist() for state in states]


SWIGLU_FIELDS = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
BETWEEN = {
    "window": {"window_size": (6, 0)},
    "off-by-one": {"softmax_type": "off-by-one"},
    "grouped keys": {"num_query_groups": 2},
    "plain": {},
}


def context_parallel() -> dict[str, tuple[list[float], list[float]]]:
    """Losses of three steps of SGD on one rank's whole sequence, and on two ranks' halves of it, by variant."""
    return {name: (_train(1, fields), _train(2, fields)) for name, fields in BETWEEN.items()}


def _train(cp: int, fields: dict) -> list[float]:
    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt import GPTModel

    from elas import accelerator
    from elas.model.init import initialise
    from elas.model.spec import block_spec
    from elas.model.transformer_config import transformer_config

    accelerator.prepare_megatron()
    mpu.destroy_model_parallel()
    with accelerator.shared_gloo_groups():
        mpu.initialize_model_parallel(context_parallel_size=cp, create_gloo_process_groups=False)
    accelerator.seed_model_parallel(1, 0, 0)
    config = dataclasses.replace(
        transformer_config(small({"model.num_query_groups": 4, "train.recompute": "none"})),
        context_parallel_size=cp,
        **fields,
    )
    model = GPTModel(
        config,
        block_spec(config),
        vocab_size=SIZES["vocab_size"],
        max_sequence_length=SIZES["seq_length"],
        position_embedding_type="rope",
    )
    initialise(model, seed=1, std=0.02)
    losses = []
    for step in range(3):
        tokens, labels = batch(2, seed=step)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        tokens, labels, positions = (_own_chunks(x, cp) for x in (tokens, labels, positions))
        loss = model(tokens, positions, None, labels=labels).mean()
        loss.backward()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(float(mean) / 2)
        for parameter in model.parameters():
            torch.distributed.all_reduce(parameter.grad)
            parameter.data -= 0.5 * parameter.grad / 2
            parameter.grad = None
    return losses


def _own_chunks(x: torch.Tensor, cp: int) -> torch.Tensor:
    """As Megatron cuts sequences: of 2·cp chunks, the one of this rank and its mirror image."""
    if cp == 1:
        return x
    chunks, rank = x.chunk(2 * cp, dim=1), torch.distributed.get_rank()
    return torch.cat([chunks[rank], chunks[2 * cp - 1 - rank]], dim=1)


def mlp_of_megatron() -> tuple[str, bool]:
    """Megatron's own MLP over our linears: what it says without our activation, and whether it is 2:4 with it."""
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

    from elas import parallel
    from elas.config import ParallelConfig
    from elas.errors import UserError
    from elas.model.spec import ElasSpecProvider
    from elas.model.transformer_config import transformer_config

    parallel.initialize(ParallelConfig(), seed=1)
    provider = ElasSpecProvider()
    config = dataclasses.replace(transformer_config(small({})), init_method=torch.nn.init.normal_)
    submodules = MLPSubmodules(
        provider.column_parallel_linear(), provider.activation_func(), provider.row_parallel_linear()
    )
    x, message = torch.randn(3, 2, config.hidden_size), ""
    try:
        MLP(config, submodules, ffn_hidden_size=config.ffn_hidden_size)(x)
    except UserError as refusal:
        message = str(refusal)
    config.use_te_activation_func = True  # Megatron's own check of it knows Transformer Engine's activations only
    layer = MLP(config, submodules, ffn_hidden_size=config.ffn_hidden_size)
    kept = []
    layer.linear_fc2.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    layer(x)
    return message, bool(((kept[0] != 0).unflatten(-1, (-1, 4)).sum(-1) <= 2).all())
