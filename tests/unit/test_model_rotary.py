"""`rotate` against Megatron-core's own function, to the last bit."""

import types

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

from elas.model.rotary import rotate

S, B, N = 6, 2, 3


class OneRank:
    """A context-parallel group of one, which Megatron's function asks for its size."""

    def size(self) -> int:
        """1."""
        return 1

    def rank(self) -> int:
        """0."""
        return 0


def settings(**changed):
    """What the two read of Megatron's configuration."""
    base = {"apply_rope_fusion": False, "rotary_interleaved": False, "multi_latent_attention": False}
    return types.SimpleNamespace(**{**base, "position_embedding_type": "rope", **changed})


def both(config, hn: int, d: int, dtype: torch.dtype, batch: int = 1, mscale: float = 1.0):
    """Output and gradient of Megatron's function and of ours, from the same input."""
    draw = torch.Generator().manual_seed(hn + d)
    angles = torch.randn(S, batch, 1, d, generator=draw) * 3
    x = torch.randn(S, B, N, hn, generator=draw).to(dtype)
    dout = torch.randn(B, N, S, hn, generator=draw).to(dtype).permute(2, 0, 1, 3)  # as attention's backward gives it
    found = []
    for turn in (
        lambda x: apply_rotary_pos_emb(x, angles, config=config, mscale=mscale, cp_group=OneRank()),
        lambda x: rotate(x, angles, config, OneRank()),
    ):
        leaf = x.clone().requires_grad_()
        out = turn(leaf)
        out.backward(dout)
        found.append((out, leaf.grad))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("hn", "d", "batch"), [(8, 8, 1), (8, 4, 1), (8, 8, B), (10, 2, 1)])
def test_same_bits_as_megatron(dtype, hn, d, batch):
    (out, grad), (ours, ours_grad) = both(settings(), hn, d, dtype, batch)
    assert ours.dtype == dtype and torch.equal(ours, out) and torch.equal(ours_grad, grad)
    assert not torch.equal(out, torch.zeros_like(out))


def test_interleaved_pairs_are_megatrons():
    (out, grad), (ours, ours_grad) = both(settings(rotary_interleaved=True), 8, 8, torch.float32)
    halves = both(settings(), 8, 8, torch.float32)[1]
    assert torch.equal(ours, out) and torch.equal(ours_grad, grad) and not torch.equal(halves[0], out)


def test_yarn_scale():
    yarn = {"yarn_rotary_scaling_factor": 4.0, "yarn_mscale": 1.0, "yarn_mscale_all_dim": 0.0}
    config = settings(**yarn)
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as module

    scale = module._yarn_get_concentration_factor_from_config(config)
    (out, _), (ours, _) = both(config, 8, 8, torch.float32, mscale=scale)
    assert scale > 1 and torch.equal(ours, out)


def test_cos_and_sin_kept_from_validation_serve_training():
    """They are kept between calls; angles changed in place, another dtype or inference mode must not give old ones."""
    config, angles = settings(), torch.randn(S, 1, 1, 8)
    x = torch.randn(S, B, N, 8)
    with torch.inference_mode():
        first = rotate(x, angles, config)
        rotate(x, torch.randn(S, 1, 1, 8), config)  # a tensor of inference mode has no version
    leaf = x.clone().requires_grad_()
    out = rotate(leaf, angles, config)
    out.sum().backward()
    assert torch.equal(out, first)
    assert rotate(x.double(), angles, config).dtype == torch.float64
    angles.mul_(2)
    assert torch.equal(rotate(x, angles, config), apply_rotary_pos_emb(x, angles, config=config, cp_group=OneRank()))
    assert not torch.equal(rotate(x, angles, config), first)
