"""`elas checkpoint export` and `import`: training goes on, from our engine to Megatron-core's optimizers and back."""

import pytest
from crossing import KINDS, abroad, back, leave, refused, shapes
from support.corpora import write_corpus
from support.ranks import run_ranks

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_across_both_borders(kind, tmp_path):
    """Tensors are equal to the last bit. Losses differ by the order of sums: 1e-6 in fp32, 1e-3 in bf16."""
    write_corpus(tmp_path / "corpus", vocab=256)
    wanted = run_ranks(2, leave, kind, str(tmp_path), timeout=200.0)[0]
    found = run_ranks(2, abroad, kind, str(tmp_path), timeout=200.0)[0]
    assert found["loaded"] == [] and found["imported"] == []
    assert all(found["sparse"])
    near = 2e-3 if kind.endswith("bf16") else 2e-6
    assert found["before"] == pytest.approx(wanted, rel=near)
    assert run_ranks(2, back, kind, str(tmp_path), timeout=200.0)[0] == pytest.approx(found["after"], rel=near)
    if kind == "low rank":
        commands_refuse_in_a_line(tmp_path)


def test_shapes_by_formula_are_those_of_the_model():
    assert all(wrong == [] for wrong in run_ranks(1, shapes, timeout=200.0)[0].values())


def commands_refuse_in_a_line(folder):
    """Of what the kind above left; nothing is executed, and nothing is left of what was refused."""
    said, alone = run_ranks(1, refused, str(folder), timeout=200.0)[0]
    wanted = [
        "holds no torch_dist checkpoint",
        "cannot be read as a checkpoint of Megatron-LM",
        "cannot be read as a checkpoint of Megatron-LM",
        "low_rank.rank=8: Megatron-LM trained",
        "model.vocab_size=384: Megatron-LM padded the vocabulary to 256; set it to 256",
        "model.norm_eps=0.001: Megatron-LM trained",
        "model.num_layers=8: Megatron-LM trained",
        "model.tie_embeddings=True: Megatron-LM trained",
        "decoder.layers.mlp.linear_fc1.factor_out has shape (4, 128, 16), but ",
        "sparsity.kind='none': Megatron-LM trained",
        "model.activation='swiglu': Megatron-LM trained",
        "optimizer.kind='loro': Megatron-LM's moments are AdamW's",
        "already holds a run",
        "data.train=None: no corpus to train on",
        "exists; give a folder that does not",
        "no checkpoint there",
    ]
    assert len(said) == len(wanted)
    for message, part in zip(said, wanted):
        assert part in message and "\n" not in message
    assert "holds weights without moments" in alone[0] and "checkpoint.init_from=" in alone[0]
    assert "starting with the weights of" in alone[1]
    assert not list(folder.glob("**/*.partial"))
