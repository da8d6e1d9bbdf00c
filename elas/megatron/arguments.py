"""ELAS's own arguments, added to those of a Megatron-LM script."""

import argparse
from typing import get_args, get_type_hints

from elas.config import LowRankConfig, SparsityConfig
from elas.errors import ConfigError
from elas.kernels.relu2_24 import Relu24Options
from elas.nn.settings import check_implementation


def extra_args_provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ELAS's arguments to Megatron's parser; for `extra_args_provider` of Megatron-LM's `pretrain`.

    Args:
        parser: Megatron's.

    Returns:
        The same parser.
    """
    low_rank, sparsity = LowRankConfig(), SparsityConfig()
    group = parser.add_argument_group("ELAS: low rank and 2:4 activation sparsity")
    add = group.add_argument
    add(
        "--low-rank",
        dest="low_rank_kind",
        choices=_choices(LowRankConfig, "kind"),
        default=low_rank.kind,
        help="how linears are factored; none: full rank (default: %(default)s)",
    )
    add("--rank", type=int, default=low_rank.rank, dest="low_rank_rank", help="r (default: %(default)s)")
    add(
        "--low-rank-activation",
        choices=_choices(LowRankConfig, "activation"),
        default=low_rank.activation,
        help="between the factors, cola only (default: %(default)s)",
    )
    add(
        "--sparsity-24",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="2:4 on the squared ReLU (default: on if there is one)",
    )
    add("--dense-steps", type=int, default=0, help="first iterations without 2:4 (default: %(default)s)")
    for name in ("method", "gradient", "backward", "ffn_memory"):
        flag = "--ffn-memory" if name == "ffn_memory" else f"--sparsity-{name}"
        add(
            flag,
            choices=_choices(SparsityConfig, name),
            default=getattr(sparsity, name),
            dest=f"sparsity_{name}",
            help=f"sparsity.{name} (default: %(default)s)",
        )
    add("--sparsity-scale", type=float, default=sparsity.scale, help="of soft_threshold (default: %(default)s)")
    add(
        "--sparsity-implementation",
        default=sparsity.implementation,
        help="name of a kernel, or auto for the fastest (default: %(default)s)",
    )
    add(
        "--recompute-bottleneck",
        action="store_true",
        help="keep norm outputs, q, k, v, gate and up out of memory; the backward pass computes them from bottlenecks",
    )
    add(
        "--sparsity-tokens",
        type=int,
        default=0,
        help="tokens of a logged iteration in which zeros and dropped values are counted; 0: none (default)",
    )
    add(
        "--layout-independent-init",
        action="store_true",
        help="draw every parameter from seed, name and shape, so that all layouts start from the same model",
    )
    return parser


def sections(args: argparse.Namespace) -> tuple[LowRankConfig, SparsityConfig]:
    """Our two sections from parsed arguments."""
    low_rank = LowRankConfig(kind=args.low_rank_kind, rank=args.low_rank_rank, activation=args.low_rank_activation)
    between = low_rank.kind == "cola" and low_rank.activation == "relu2"
    wanted = (args.squared_relu or between) if args.sparsity_24 is None else args.sparsity_24
    return low_rank, SparsityConfig(
        kind="2:4" if wanted else "none",
        dense_steps=args.dense_steps,
        method=args.sparsity_method,
        gradient=args.sparsity_gradient,
        backward=args.sparsity_backward,
        ffn_memory=args.sparsity_ffn_memory,
        scale=args.sparsity_scale,
        implementation=args.sparsity_implementation,
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse ELAS's arguments that would be ignored, or that do not go together.

    Raises:
        ConfigError: the first of them, under its flag.
    """
    low_rank, sparsity = sections(args)
    cola = low_rank.kind == "cola"
    relu2 = args.squared_relu or (cola and low_rank.activation == "relu2")
    for name, least in (("dense_steps", 0), ("sparsity_tokens", 0), ("low_rank_rank", 1)):
        if getattr(args, name) < least:
            raise ConfigError(_flag(name), getattr(args, name), "is too small", f"give at least {least}")
    if not cola:
        _not_used(args, ("low_rank_activation",), f"--low-rank {low_rank.kind} has nothing between its factors")
    if low_rank.kind == "none":
        _not_used(args, ("low_rank_rank", "recompute_bottleneck"), "--low-rank none has no factors")
    if not relu2:
        wanted = ("dense_steps", "sparsity_tokens", *_OF_24, "sparsity_ffn_memory", "sparsity_implementation")
        _not_used(args, wanted, "there is no squared ReLU", ", or use --squared-relu")
    if sparsity.kind == "none":
        _not_used(args, ("dense_steps", *_OF_24), "there is no 2:4 (--no-sparsity-24)")
    if sparsity.method != "soft_threshold":
        more = ", or use --sparsity-method soft_threshold"
        _not_used(args, ("sparsity_scale",), f"--sparsity-method {sparsity.method} has no scale", more)
    try:
        options = Relu24Options.of(sparsity, sparse=True)
        if relu2:
            check_implementation(sparsity.implementation, "relu2", options)
    except ConfigError as error:
        raise error.renamed({name: _flag(f"sparsity_{name}") for name in _IN_SPARSITY}) from None


_IN_SPARSITY = ("method", "gradient", "backward", "scale", "ffn_memory", "implementation")
_OF_24 = ("sparsity_method", "sparsity_gradient", "sparsity_backward", "sparsity_scale")


def _not_used(args: argparse.Namespace, names: tuple[str, ...], why: str, more: str = "") -> None:
    defaults = extra_args_provider(argparse.ArgumentParser()).parse_args([])
    for name in names:
        if getattr(args, name) != getattr(defaults, name):  # the default may not have been given
            raise ConfigError(_flag(name), getattr(args, name), f"is not used: {why}", f"leave it out{more}")


def _flag(name: str) -> str:
    short = {"low_rank_rank": "rank", "sparsity_ffn_memory": "ffn_memory"}.get(name, name)
    return f"--{short.replace('_', '-')}"


def _choices(section: type, name: str) -> list[str]:
    return list(get_args(get_type_hints(section)[name]))
