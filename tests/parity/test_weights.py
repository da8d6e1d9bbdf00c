"""A checkpoint's weights without an engine: whole, and as the parts of any layout's model."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import weights_run
from support.ranks import run_ranks

from elas.checkpoint.choose import find
from elas.checkpoint.weights import read_weights
from elas.errors import ConfigError, UserError

pytestmark = [pytest.mark.timeout(600), pytest.mark.any_device("processes")]

GATED = {"model.num_query_groups": 2, "model.activation": "swiglu", "sparsity.kind": "none"}
TIED = {**GATED, "model.tie_embeddings": True}
WRITTEN = {
    "tp2-pp2": (4, {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.zero": 1}),
    "dp2-zero3-bf16": (2, {"parallel.zero": 3, "train.dtype": "bfloat16", **GATED}),
    "tied-full-one": (1, {"parallel.zero": 0, **TIED, "low_rank.kind": "none"}),
}
READ = {
    2: [
        {"parallel.tensor": 2, "parallel.sequence": True},
        {"parallel.pipeline": 2},
        {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2},
        {},
    ],
    1: [{}, {"train.dtype": "bfloat16"}],
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, tuple[str, dict, list]]:
    """By name: a run's folder, the settings of its model, and each rank's parameters and loss (`weights_run.save`)."""
    done = {}
    for name, (world, overrides) in WRITTEN.items():
        folder = str(tmp_path_factory.mktemp(name))
        ranks = run_ranks(world, weights_run.save, overrides, folder, timeout=200)
        model = {key: value for key, value in overrides.items() if not key.startswith("parallel.")}
        done[name] = folder, model, ranks
    return done


def test_whole_weights_are_those_that_were_trained(written):
    """A rank's parameters are slices of what is read; on one process they are equal."""
    folder, _, ranks = written["tied-full-one"]
    whole = dict(read_weights(find(folder)))
    assert {name: t.dtype for name, t in whole.items()} == dict.fromkeys(whole, torch.float32)
    trained = ranks[0][0]
    assert set(whole) == set(trained) and "output_layer.weight" not in whole
    for name, tensor in whole.items():
        assert torch.equal(tensor, trained[name]), name

    folder, _, ranks = written["tp2-pp2"]
    whole = dict(read_weights(find(folder)))
    assert set(whole) == set().union(*(part for part, _ in ranks))
    name = "decoder.layers.3.self_attention.linear_qkv.factor_out_q"  # on the second stage, sharded by rows
    shards = [part[name] for part, _ in ranks if name in part]
    assert len(shards) == 2 and torch.equal(whole[name], torch.cat(shards))
    assert len(whole["embedding.word_embeddings.weight"]) == 256


def test_reading_takes_names_and_a_dtype(written):
    found = find(written["tp2-pp2"][0])
    names = ["decoder.final_layernorm.weight", "decoder.layers.2.mlp.linear_fc1.factor_in"]
    whole = dict(read_weights(found))
    some = list(read_weights(found, names, torch.bfloat16))
    assert [name for name, _ in some] == names
    assert all(torch.equal(tensor, whole[name].bfloat16()) for name, tensor in some)
    with pytest.raises(KeyError, match=r"decoder\.layers\.9"):
        next(read_weights(found, ["decoder.layers.9.input_layernorm.weight"]))


def test_reading_needs_neither_engine_nor_groups(written):
    """In a process of its own: no DeepSpeed, no Megatron-core."""
    code = (
        "import sys; from elas.checkpoint.choose import find; from elas.checkpoint.weights import read_weights\n"
        "print(sum(tensor.numel() for _, tensor in read_weights(find(sys.argv[1]))))\n"
        "print({'deepspeed', 'megatron'} & set(sys.modules))"
    )
    folder = written["tp2-pp2"][0]
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=120)
    total = sum(tensor.numel() for _, tensor in read_weights(find(folder)))
    assert done.stdout == f"{total}\nset()\n", done.stderr


def test_any_layout_loads_its_parts(written):
    """Every parameter is the rank's part of the file's weight, to the last bit; the loss is that of the engine."""
    for world, layouts in READ.items():
        cases, losses = [], []
        for folder, model, ranks in written.values():
            cases += [(folder, {**model, **layout}) for layout in layouts]
            losses += [ranks[0][1]] * len(layouts)
        for rank in run_ranks(world, weights_run.load, cases, timeout=200):
            for (folder, overrides), expected, (wrong, loss, error) in zip(cases, losses, rank, strict=True):
                assert (wrong, error) == ([], ""), (folder, overrides)
                if loss is not None:  # bf16 rounds elsewhere on another layout
                    within = 5e-3 if overrides.get("train.dtype") == "bfloat16" else 1e-6
                    assert loss == pytest.approx(expected, rel=within), (folder, overrides)


def test_weights_of_another_model_are_refused(written, tmp_path):
    """By one line, on every rank, whatever rank finds it; so are damaged files."""
    folder, model, _ = written["tp2-pp2"]
    damaged = Path(shutil.copytree(folder, tmp_path / "run"), "checkpoints", "step_00000005")
    content = bytearray((damaged / "__3_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "__3_0.distcp").write_bytes(content)
    other = {**model, "model.num_layers": 6, "parallel.pipeline": 2}  # the second stage has layers that are not there
    cases = [(folder, other), (folder, {**model, "model.vocab_size": 512}), (str(damaged), model)]
    for deeper, wider, broken in run_ranks(2, weights_run.load, cases):
        step = f"{folder}/checkpoints/step_00000005"
        assert deeper[2].startswith(f"{step}: rank 1: RuntimeError: weight.decoder.layers.")
        assert deeper[2].endswith(" is not in the checkpoint; give another checkpoint") and "\n" not in deeper[2]
        assert wider[2].startswith(f"{step}: rank 0: RuntimeError: weight.embedding.word_embeddings.weight has shape")
        assert broken[2] == f"{damaged}: __3_0.distcp is damaged; give another checkpoint"


def test_a_path_without_checkpoint_is_refused(written, tmp_path):
    folder = Path(written["tp2-pp2"][0])
    assert find(folder) == find(str(folder / "checkpoints" / "step_00000005"))
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    step = run / "checkpoints" / "step_00000005"
    shutil.copytree(step, run / "checkpoints" / "step_00000009")
    assert find(run).step == 5 and "is named step_00000009, but holds step 5" in find(run).passed_over[0]
    fix = "give a run's folder, or the folder of an intact checkpoint in it"
    for path, why in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "holds no checkpoint: there is no "),
                      (step / ".metadata", "is a file"), (run / "checkpoints", "is a folder of checkpoints"),
                      (run / "checkpoints" / "step_00000009", "is named step_00000009")):  # fmt: skip
        with pytest.raises(UserError) as caught:
            find(path)
        assert str(caught.value).startswith(f"{path}: {why}") and str(caught.value).endswith(f"; {fix}")
        assert not isinstance(caught.value, ConfigError)
    with pytest.raises(ConfigError, match=r"^evaluate\.from='nowhere': no such folder; give"):
        find("nowhere", "evaluate.from")
    (step / ".metadata").write_bytes(b"x" * (step / ".metadata").stat().st_size)
    with pytest.raises(UserError, match=r"step_00000005: its weights cannot be read \(Unpickl.*elas checkpoint verify"):
        list(read_weights(find(step)))
