"""Operands of the libraries' 2:4 products, against PyTorch's own conversions in plain Python."""

import pytest
import torch
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    _calculate_meta_reordering_scatter_offsets,
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from elas.errors import ConfigError
from elas.kernels.relu2_24 import Relu24Options, implementations, pack, registry, semi_structured
from elas.kernels.relu2_24.plain import compressed

CPU = torch.device("cpu")
METHODS = ("magnitude", "soft_threshold")
SHAPES = ((32, 64), (64, 192), (96, 128))


def pruned(shape, method, seed=0, lowest=None):
    """s and its packed form, from z of N(0, 1) or, above `lowest`, of values that are kept as non-zeros."""
    z = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if lowest is not None:
        z = z.abs() + lowest
    return compressed.compress(z.bfloat16(), Relu24Options(method=method))


def from_cutlass(values: torch.Tensor, meta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of `to_cutlass`: values `[n, f/2]` and codes uint8 `[n, f/8]`."""
    words = meta.flatten()[semi_structured.word_places(*meta.shape, meta.device)].view(meta.shape)
    return values, words.view(torch.uint8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_cutlass_reads_our_operand_as_s(shape, method):
    """Also groups with fewer than two non-zeros, where PyTorch would name other positions."""
    s, (values, codes) = pruned(shape, method)
    sparse, meta = semi_structured.to_cutlass(values, codes)
    assert meta.dtype == torch.int16
    assert meta.shape == (shape[0], shape[1] // 16)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(sparse, meta), s)


@pytest.mark.parametrize("shape", SHAPES)
def test_operand_and_metadata_equal_pytorchs_for_two_of_four(shape):
    s, (values, codes) = pruned(shape, "magnitude", lowest=0.1)
    want = sparse_semi_structured_from_dense_cutlass(s)
    for got, expected in zip(semi_structured.to_cutlass(values, codes), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_pytorchs_operand_comes_back_as_our_packed_form(shape):
    s, (values, codes) = pruned(shape, "magnitude", lowest=0.1)
    got = from_cutlass(*sparse_semi_structured_from_dense_cutlass(s))
    assert torch.equal(got[0], values)
    assert torch.equal(got[1], codes)
    assert torch.equal(pack.put(got[0], *pack.decode(got[1], shape[1] // 4)), s)


@pytest.mark.parametrize("n, words", ((32, 4), (64, 12), (160, 8)))
def test_places_of_words_are_cutlasss(n, words):
    want = _calculate_meta_reordering_scatter_offsets(n, words, torch.int16, CPU)
    assert torch.equal(semi_structured.word_places(n, words, CPU), want)


def test_multiples_are_those_pytorch_states():
    for library, owner in (
        ("cutlass", SparseSemiStructuredTensorCUTLASS),
        ("cusparselt", SparseSemiStructuredTensorCUSPARSELT),
    ):
        stated = owner._DTYPE_SHAPE_CONSTRAINTS[torch.bfloat16]
        want = (stated.sparse_min_rows, stated.sparse_min_cols, stated.dense_min_cols)
        assert semi_structured.MULTIPLES[library] == want


@pytest.mark.parametrize(
    "library, features, r_out, says",
    (
        ("cutlass", 96, 8, "multiples of 64 on a rank, not features=96"),
        ("cutlass", 64, 12, "multiples of 8, not r_out=12"),
        ("cusparselt", 24, 8, "multiples of 16 on a rank, not features=24"),
        ("cusparselt", 16, 8, None),
    ),
)
def test_widths_that_the_library_does_not_take(library, features, r_out, says):
    (one,) = [one for one in implementations("compressed") if one.name == library]
    found = one.fits(registry.Widths(8, features, r_out), CPU, torch.bfloat16)
    assert found is None if says is None else says in found


@pytest.mark.parametrize("library, tokens", (("cutlass", 48), ("cutlass", 0), ("cusparselt", 8)))
def test_tokens_that_the_library_does_not_take_are_refused(library, tokens):
    with pytest.raises(ConfigError, match=rf"^tokens={tokens}: {library} takes tokens in multiples of \d+; ") as caught:
        semi_structured.check_tokens(library, tokens)
    assert "\n" not in str(caught.value)


def test_cusparselt_gets_contiguous_2_of_4_operands(monkeypatch):
    """Its compressed form is opaque; the call is checked with a compression that keeps the matrix as it is."""
    s, packed = pruned((32, 64), "magnitude")
    n_down = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    handed = []
    monkeypatch.setattr(torch, "_cslt_compress", lambda x: handed.append(x) or x)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda x, y: x @ y)
    v = semi_structured.down_product("cusparselt", s.T.contiguous().T, packed, n_down)
    assert handed[0].is_contiguous()
    assert ((handed[0].view(-1, 4) != 0).sum(-1) <= 2).all()
    assert torch.equal(v, s @ n_down.T)


def test_what_cutlass_is_handed_multiplies_to_the_product(monkeypatch):
    s, packed = pruned((32, 64), "soft_threshold")
    n_down = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    monkeypatch.setattr(
        torch,
        "_sparse_semi_structured_mm",
        lambda values, meta, y: sparse_semi_structured_to_dense_cutlass(values, meta) @ y,
    )
    assert torch.equal(semi_structured.down_product("cutlass", s, packed, n_down), s @ n_down.T)


@pytest.mark.parametrize("library", semi_structured.MULTIPLES)
def test_without_a_gpu_it_says_so_and_skips_dense_steps(library):
    assert "NVIDIA" in semi_structured.obstacle(library, CPU, torch.bfloat16)
    assert "2:4 activations only" in semi_structured.unsupported(Relu24Options(sparse=False))
    assert semi_structured.unsupported(Relu24Options()) is None
