"""The kernel as the configuration asks for it: chosen before the run, with errors in the configuration's keys."""

import logging

import pytest
import torch

from elas.config import Config, SparsityConfig
from elas.errors import ConfigError
from elas.kernels.relu2_24 import Implementation, Relu24Options, ffn_core, register, registry
from elas.model import kernel


def config_of(**sparsity) -> Config:
    config = Config()
    config.model.hidden_size, config.low_rank.rank, config.train.dtype = 64, 24, "float32"
    config.sparsity = SparsityConfig(**{"implementation": "odd", "ffn_memory": "compressed", **sparsity})
    return config


@pytest.fixture
def odd():
    """An implementation that computes 2:4 alone, r_out in multiples of 16, and features of whole sixty-fours."""

    def fits(widths, device, dtype):
        if widths.features % 64:
            return f"takes features in multiples of 64, not features={widths.features}"
        return f"takes an r_out in multiples of 16, not r_out={widths.r_out}" if widths.r_out % 16 else None

    supports = lambda options: None if options.sparse else "multiplies 2:4 activations only"  # noqa: E731
    register(Implementation("odd", "compressed", None, lambda *_: None, -1, supports, fits))
    yield
    registry.unregister("odd", "compressed")


def refused(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        kernel.chosen(config)
    return str(caught.value)


def test_what_a_run_asks_of_a_kernel_is_checked_before_it(odd):
    config = config_of(dense_steps=0)
    assert refused(config).startswith("sparsity.implementation='odd': not available: takes an r_out in multiples of 16")
    assert "not low_rank.rank=24; use auto |" in refused(config)
    config.low_rank.kind = "none"  # at full rank the core is as wide as the model
    assert kernel.chosen(config) == (registry.implementations("compressed")[-1], "chosen by name")
    config.model.hidden_size = 72
    assert "not model.hidden_size=72" in refused(config)
    config.model.hidden_size, config.parallel.tensor = 64, 8  # 4 · 64 features over 8 ranks
    assert "not model.ffn_hidden_size=32" in refused(config)


def test_a_kernel_without_dense_steps_is_refused_with_them(odd):
    config = config_of(dense_steps=7)
    config.low_rank.rank = 16
    assert refused(config) == (
        "sparsity.implementation='odd': it does not compute the first 7 steps, which have no 2:4; "
        "set sparsity.dense_steps=0 or sparsity.implementation=auto"
    )
    config.sparsity.dense_steps = 0
    assert kernel.chosen(config)[0].name == "odd"
    config.sparsity.kind = "none"
    assert "2:4 activations only" in refused(config)


@pytest.mark.parametrize("key, value", (("method", "topk"), ("scale", 0.0), ("backward", "split")))
def test_options_are_refused_by_name_or_by_key(key, value):
    """The same error for a caller of the kernel and for one with a configuration."""
    with pytest.raises(ConfigError, match=f"^{key}=") as of_kernel:
        Relu24Options(**{key: value})
    with pytest.raises(ConfigError, match=rf"^sparsity\.{key}=") as of_configuration:
        kernel.options_of(config_of(**{key: value}).sparsity, sparse=True)
    if key == "backward":
        assert str(of_kernel.value).endswith("not supported with ffn_memory=fused; set ffn_memory=eager")
        assert str(of_configuration.value).endswith("ffn_memory=compressed; set sparsity.ffn_memory=eager")
    assert of_configuration.value.key == f"sparsity.{key}" and of_configuration.value.value == value


def test_what_the_start_line_shows_is_not_logged_again(caplog):
    config = config_of(implementation="auto", ffn_memory="compressed")
    with caplog.at_level(logging.INFO, "elas.kernels"):
        kernel.chosen(config)
        for sparse in (True, False):  # as the run computes it: dense steps first
            options = kernel.options_of(config.sparsity, sparse=sparse)
            ffn_core(torch.ones(2, 24), torch.ones(256, 24), torch.ones(24, 256), options)
    assert caplog.records == []
