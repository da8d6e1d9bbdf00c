"""ELAS's own arguments of a Megatron-LM script: none is ignored in silence."""

import pytest
from built import arguments

from elas.errors import ConfigError
from elas.megatron.arguments import check_arguments

SWIGLU = {"squared_relu": False}
REFUSED = [
    ("--dense-steps 3 --no-sparsity-24", {}, "--dense-steps=3: is not used: there is no 2:4"),
    ("--dense-steps 2", SWIGLU, "--dense-steps=2: is not used: there is no squared ReLU; .*--squared-relu"),
    ("--dense-steps -1", {}, "--dense-steps=-1: "),
    (
        "--low-rank lowrank --low-rank-activation relu2",
        {},
        "--low-rank-activation='relu2': is not used: --low-rank low",
    ),
    ("--low-rank none --rank 16", {}, "--rank=16: is not used: "),
    ("--low-rank none --recompute-bottleneck", {}, "--recompute-bottleneck=True: is not used: --low-rank none"),
    ("--rank 0", {}, "--rank=0: "),
    ("--sparsity-tokens 64", SWIGLU, "--sparsity-tokens=64: is not used: there is no squared ReLU"),
    ("--sparsity-tokens -5", {}, "--sparsity-tokens=-5: "),
    ("--sparsity-gradient ste --no-sparsity-24", {}, "--sparsity-gradient='ste': is not used"),
    ("--sparsity-method soft_threshold", SWIGLU, "--sparsity-method='soft_threshold': is not used"),
    ("--ffn-memory eager", SWIGLU, "--ffn-memory='eager': is not used"),
    ("--sparsity-implementation cpu", SWIGLU, "--sparsity-implementation='cpu': is not used"),
    ("--sparsity-implementation cuda", {}, r"--sparsity-implementation='cuda': does not serve .*; use auto \| "),
    ("--sparsity-scale 2", {}, "--sparsity-scale=2.0: .*--sparsity-method magnitude has no scale"),
    (
        "--sparsity-backward split",
        {},
        "--sparsity-backward='split': not supported with --ffn-memory=fused; set --ffn-memory=eager",
    ),
    (
        "--sparsity-backward split --ffn-memory eager --sparsity-gradient ste",
        {},
        "--sparsity-backward=.*--sparsity-grad",
    ),
]
TAKEN = [
    ("--dense-steps 3", {}),
    ("--no-sparsity-24 --ffn-memory eager --sparsity-tokens 8", {}),
    ("--low-rank cola --low-rank-activation relu2 --dense-steps 2 --sparsity-tokens 8", SWIGLU),
    ("--low-rank none", SWIGLU),
    ("--sparsity-method soft_threshold --sparsity-scale 2", {}),
    ("--sparsity-backward split --ffn-memory eager", {}),
]


@pytest.mark.parametrize(("given", "megatron", "message"), REFUSED, ids=[given for given, _, _ in REFUSED])
def test_arguments_without_effect_are_refused_by_their_flag(given, megatron, message):
    with pytest.raises(ConfigError, match=f"^{message}") as said:
        check_arguments(arguments(*given.split(), **megatron))
    assert "\n" not in str(said.value) and said.value.__cause__ is None
    assert "sparsity." not in str(said.value)  # the name of a setting, which was not typed here


@pytest.mark.parametrize(("given", "megatron"), TAKEN, ids=[given for given, _ in TAKEN])
def test_arguments_with_an_effect_are_taken(given, megatron):
    check_arguments(arguments(*given.split(), **megatron))
