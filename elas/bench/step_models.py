"""The models whose training steps are compared, and the expected result of their first step.

Legend: b batch, s sequence.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from elas import accelerator
from elas.bench.ffn_variants import DENSE, SWIGLU, gated_width
from elas.config import Config, load_config
from elas.config.rules import validate
from elas.engine import grads
from elas.engine.engine import Engine
from elas.engine.losses import token_losses
from elas.errors import UserError
from elas.model.provider import make_model_provider
from elas.plan.counts import parameter_count
from elas.plan.memory import token_bytes

Batch = tuple[torch.Tensor, torch.Tensor]  # tokens and labels, int64 [b, s]

KEPT = {"train.recompute": "none"}
SPARSE: dict[str, object] = {"sparsity.kind": "2:4", "sparsity.dense_steps": 0}
OVERRIDES: dict[str, dict[str, object]] = {
    "hf_llama": {"low_rank.kind": "none", **SWIGLU},
    "hf_llama_fused": {"low_rank.kind": "none", **SWIGLU},
    "hf_llama_compiled": {"low_rank.kind": "none", **SWIGLU},
    "full_swiglu": {"low_rank.kind": "none", **SWIGLU},
    "hf_llama_checkpointed": {"low_rank.kind": "none", **SWIGLU},
    "full_swiglu_logits": {"low_rank.kind": "none", **SWIGLU},
    "lowrank_swiglu": {**SWIGLU, **KEPT},
    "lowrank_relu2": {**DENSE, **KEPT},
    "elas": SPARSE,
    "elas_kept": {**SPARSE, **KEPT},
    "elas_layer": {**SPARSE, "train.recompute": "layer"},
}
"""Keys that replace the preset's, by variant; d_ff is the preset's, or two thirds of it for SwiGLU."""

LEARNING_RATE = 1e-4  # so small that training on one batch repeatedly stays finite


@dataclass(frozen=True)
class Shape:
    """Settings that all variants of a run share.

    Args:
        preset: name of the shipped configuration.
        layers: transformer layers; None takes the preset's.
        batch: b, samples a step.
        seq: s, tokens a sample.
        zero: ZeRO stage, 0 or 1.
    """

    preset: str
    layers: int | None
    batch: int
    seq: int
    zero: int


def variant_config(variant: str, shape: Shape, dtype: str) -> Config:
    """The configuration of one variant, validated.

    Raises:
        ConfigError: the options and the preset do not go together.
    """
    preset = load_config(shape.preset, {})
    overrides = OVERRIDES[variant]
    values = {
        "model.num_layers": shape.layers or preset.model.num_layers,
        "model.seq_length": shape.seq,
        "model.max_position_embeddings": None,
        "train.micro_batch_size": shape.batch,
        "train.global_batch_size": shape.batch,
        "train.dtype": dtype,
        "optimizer.kind": "adamw",  # for all alike, as of transformers' Llama
        "optimizer.lr": LEARNING_RATE,
        "parallel.zero": shape.zero,
        **overrides,
    }
    gated = overrides.get("model.activation") == "swiglu"
    config = load_config(shape.preset, values | ({"model.ffn_hidden_size": gated_width(preset)} if gated else {}))
    validate(config, 1)
    return config


class Ours:
    """`elas.engine.engine.Engine` on one batch at a time.

    Args:
        engine: of the variant.
        with_logits: compute the loss as Megatron does.
    """

    def __init__(self, engine: Engine, *, with_logits: bool = False):
        self.engine = engine
        self.engine.set_learning_rate(engine.config.optimizer.lr)
        self.module.with_logits = with_logits

    @property
    def module(self) -> Any:
        """The whole model."""
        return self.engine.chunks[0]

    @contextlib.contextmanager
    def around_update(self, begin: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
        """Call these before and after each update, which includes the reduction of gradients."""
        engine: Any = self.engine
        update = engine._update

        def between(step) -> None:
            begin()
            update(step)
            end()

        engine._update = between
        try:
            yield
        finally:
            del engine._update  # the instance's; the class's remains

    @property
    def ends(self) -> list[torch.nn.Module]:
        """Embedding and final norm."""
        model = self.module
        found = [model.embedding if model.pre_process else None, model.decoder.final_layernorm]
        return [one for one in found if one is not None]

    @property
    def layers(self) -> list[torch.nn.Module]:
        """The transformer layers."""
        return list(self.engine.chunks[0].decoder.layers)

    def parameters(self) -> list[torch.nn.Parameter]:
        """All parameters."""
        return list(self.engine.chunks[0].parameters())

    def step(self, batch: Batch) -> tuple[float, float]:
        """Mean loss and gradient norm of one step."""
        return self.engine.step(itertools.repeat(batch))


def plain_model(config: Config) -> torch.nn.Module:
    """The variant's model with its initial weights and eager memory: autograd alone, no kernel."""
    changed = {"sparsity.ffn_memory": "eager", "sparsity.implementation": "auto", "train.recompute": "none"}
    eager = load_config(None, _flat(config) | changed)
    return make_model_provider(eager)()


def first_step(model: torch.nn.Module, batch: Batch) -> tuple[float, float]:
    """Loss and gradient norm of a plain model before any update, without engine, ZeRO or kernel."""
    loss = token_losses(model, *batch).mean()
    loss.backward()
    norm = grads.grad_norm([model])
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), float(norm)


def _flat(config: Config) -> dict[str, object]:
    return {f"{section}.{key}": v for section, values in config.to_dict().items() for key, v in values.items()}


def refuse_if_too_large(configs: dict[str, Config]) -> None:
    """Refuse variants that do not fit in memory together, before building any.

    All have their weights and optimizers at the same time, and one at a time takes a step: what layers keep without
    recomputation, since that is how each is checked, and the logits.

    Raises:
        UserError: the estimate exceeds 95 % of the free memory.
    """
    held, step = 0, 0
    for name, config in configs.items():
        size = 4 if config.train.dtype == "float32" else 2
        each = 4 * size if name.startswith("hf_llama") else 2 * size + 12 + (size if config.parallel.zero else 0)
        parameters = parameter_count(config)
        held += (each - size) * parameters  # gradients are freed after each step
        tokens = config.train.micro_batch_size * config.model.seq_length
        kept = config.model.num_layers * token_bytes(config, size, recompute="none", ffn_memory="eager")
        logits = 4 + 4 * name.startswith("hf_llama") + 2 * (size == 2)  # bytes; as measured
        step = max(step, int(tokens * (kept + logits * config.model.vocab_size)) + size * parameters)
    free, config = free_memory(), next(iter(configs.values()))
    if free is None or held + step <= 0.95 * free:
        return
    model, samples = config.model, config.train.micro_batch_size
    sizes = {"--batch": samples, "--seq": model.seq_length}
    if held > step:
        sizes = {"--layers": model.num_layers, "--variants": len(configs)}
    flag, value = max(((name, size) for name, size in sizes.items()), key=lambda one: one[1])
    others = [name for name in dict.fromkeys([*sizes, "--variants"]) if name != flag]
    raise UserError(
        f"{flag} {value}: weights and optimizers of {', '.join(configs)} require about {held / 2**30:.1f} GiB, a step "
        f"{step / 2**30:.1f}, and {free / 2**30:.1f} are free; give less, or less of {' or '.join(others)}"
    )


def free_memory() -> int | None:
    """Bytes that can be allocated on the device; None if unknown."""
    if accelerator.has_cuda():
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
