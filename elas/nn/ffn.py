"""Feed-forward layers in plain PyTorch: squared ReLU with 2:4, or SwiGLU, low-rank or full-rank.

Legend: h hidden, f d_ff, r width between input and core (the rank; h at full rank).

    squared ReLU   u = x · factor_inᵀ [..., r];  v = prune(relu²(u · m_upᵀ)) · n_downᵀ [..., r];  y = v · factor_outᵀ
    SwiGLU         y = down(silu(gate(x)) · up(x))

The modules are `linear_fc1` and `linear_fc2`, with the parameters of `elas.model.ffn` on one tensor-parallel rank. Each
is called once in a forward pass and passes its weight to the core during that call, so FSDP2, adapters and hooks work.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elas.kernels.relu2_24 import Relu24Options, ffn_core
from elas.model.activation import SparseSwitch
from elas.model.core_call import Core, with_bias
from elas.nn.linear import LowRankLinear
from elas.nn.settings import check_choice, check_parameters, check_size, sparsity_of

ACTIVATIONS = ("relu2", "swiglu")


class _FFN(SparseSwitch):
    """Shared by both: the core between two linears, or a gate before the second."""

    DENSE_STEPS = "dense_steps"
    linear_fc1: "LowRankLinear | _Linear"
    linear_fc2: "LowRankLinear | _Linear"

    def __init__(
        self,
        ffn_hidden_size: int,
        activation: str,
        options: Relu24Options | None,
        dense_steps: int,
        kernel: str,
        bias: bool,
        dtype: torch.dtype | None,
    ):
        check_choice("activation", activation, ACTIVATIONS)
        check_parameters(bias, dtype, activation)
        check_size("ffn_hidden_size", ffn_hidden_size)
        sparsity = sparsity_of(activation, options, dense_steps, ("ffn_hidden_size", ffn_hidden_size), kernel)
        super().__init__(sparsity, activation)
        self.gated, self.implementation = activation == "swiglu", kernel
        self.ffn_hidden_size = ffn_hidden_size

    def reset_parameters(self) -> None:
        """Initialise all weights again, and set the step to 0."""
        super().reset_parameters()
        self.linear_fc1.reset_parameters()
        self.linear_fc2.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., h]` to `y [..., h]`."""
        if self.gated:
            gate, up = self.linear_fc1(x)
            return self.linear_fc2(F.silu(gate) * up)
        options, kernel = self.options, self.implementation

        def within_fc1(u: Tensor, m_up: Tensor) -> Tensor:
            self.observer.look(x, self.linear_fc1.project, self.sparse)
            return self.linear_fc2(u, end=lambda u, n_down: ffn_core(u, m_up, n_down, options, kernel))

        return self.linear_fc1(x, core=within_fc1)

    def extra_repr(self) -> str:
        """The text in `print(model)`."""
        kind = "swiglu" if self.gated else "relu2, 2:4" if self.can_be_sparse else "relu2"
        return f"activation={kind}" + (f", dense_steps={self.dense_steps}" if self.dense_steps else "")


class LowRankFFN(_FFN):
    """The FFN of ELAS (arXiv 2605.03667): low-rank linears around a squared ReLU that is 2:4 sparse.

    Args:
        hidden_size: h.
        ffn_hidden_size: f; a multiple of 4 for 2:4.
        rank: r.
        bias: whether both linears have one.
        init: `lowrank` or `cola`; see `LowRankLinear`.
        activation: `relu2`, 2:4 sparse unless options say otherwise, or `swiglu` (then `linear_fc1` has two pairs,
            `gate` and `up`).
        between: a non-linearity between the factors of each linear; see `LowRankLinear`'s `activation`.
        options: pruning, gradient and what is kept for the backward pass; None: 2:4 by magnitude, its exact
            gradient, nothing f wide kept. `Relu24Options(sparse=False)`: a squared ReLU without 2:4.
        dense_steps: training steps before 2:4; requires `elas.nn.count_steps`.
        implementation: name of the core's implementation, or `auto`; see `elas.kernels.relu2_24.ffn_core`.
        device: of the parameters, as in torch's layers.
        dtype: of the parameters: fp64, fp32 or bf16 (with `swiglu` also fp16).

    Raises:
        ConfigError: an invalid argument, or arguments that do not go together.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        rank: int,
        bias: bool = False,
        init: str = "lowrank",
        activation: str = "relu2",
        *,
        between: str | None = None,
        options: Relu24Options | None = None,
        dense_steps: int = 0,
        implementation: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(ffn_hidden_size, activation, options, dense_steps, implementation, bias, dtype)
        more: dict[str, Any] = dict(bias=bias, init=init, activation=between, device=device, dtype=dtype)
        outputs = {"gate": ffn_hidden_size, "up": ffn_hidden_size} if self.gated else ffn_hidden_size
        self.linear_fc1 = LowRankLinear(check_size("hidden_size", hidden_size), outputs, rank, **more)
        self.linear_fc2 = LowRankLinear(ffn_hidden_size, hidden_size, rank, **more)


class _Linear(torch.nn.Linear):
    """torch's linear, which passes its weight to the core as `LowRankLinear` does."""

    def project(self, x: Tensor) -> Tensor:
        """The output, for the observer."""
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor, *, core: Core | None = None, end: Core | None = None) -> Tensor:
        """`x [..., i]` to `[..., o]`; `core` and `end` as in `LowRankLinear.forward`, with the weight as factor."""
        if core is not None:
            return core(*with_bias(x, self.weight, self.bias))
        if end is not None:
            y = end(x, self.weight)
            return y if self.bias is None else y + self.bias
        return super().forward(x)


class _GatedLinear(_Linear):
    """Gate and up in one weight `[2f, h]`, as in Megatron-core's MLP."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up, `[..., f]` each."""
        gate, up = super().forward(x).chunk(2, dim=-1)
        return gate, up


class SparseFFN(_FFN):
    """`LowRankFFN` with full-rank linears, initialised as torch's; see there for the arguments."""

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        bias: bool = False,
        activation: str = "relu2",
        *,
        options: Relu24Options | None = None,
        dense_steps: int = 0,
        implementation: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(ffn_hidden_size, activation, options, dense_steps, implementation, bias, dtype)
        check_size("hidden_size", hidden_size)
        more: dict[str, Any] = dict(bias=bias, device=device, dtype=dtype)
        if self.gated:
            self.linear_fc1 = _GatedLinear(hidden_size, 2 * ffn_hidden_size, **more)
        else:
            self.linear_fc1 = _Linear(hidden_size, ffn_hidden_size, **more)
        self.linear_fc2 = _Linear(ffn_hidden_size, hidden_size, **more)
