"""Runs that start from Hugging Face folders: of our own exports, of transformers' models, factored or not."""

import contextlib
from pathlib import Path

import pytest
import torch
import trained_exports
from safetensors.torch import load_file
from support.corpora import arguments, write_corpus
from support.ranks import run_ranks
from support.training_processes import rows as rows_of
from transformers import ArceeConfig, ArceeForCausalLM, LlamaConfig, LlamaForCausalLM

from elas import cli
from elas.checkpoint.choose import find
from elas.checkpoint.weights import read_weights
from elas.config import load_config
from elas.console import Console
from elas.export.from_hf import Request, import_hf
from elas.export.svd import truncated
from elas.hf.build import open_folder
from elas.hf.configuration_elas import ElasConfig
from elas.hf.modeling_elas import ElasForCausalLM

pytestmark = pytest.mark.timeout(900)  # models are trained before the first test

ONE = {"parallel.zero": 0, "train.micro_batch_size": 8}
SAME = 1e-4  # of a logit, fp32: both sum hundreds of products, in another order
SHAPE = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def bring(source: Path, out: Path, **more) -> dict:
    return import_hf(Request(source, out, **more), Console())


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> dict[str, Path]:
    """Random models as others publish them: Llama, Arcee."""
    folder = tmp_path_factory.mktemp("public")
    torch.manual_seed(0)
    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rms_norm_eps": 1e-5}
    llama = LlamaConfig(**SHAPE, **theta, num_key_value_heads=2, tie_word_embeddings=True)
    made = {"llama": LlamaForCausalLM(llama), "arcee": ArceeForCausalLM(ArceeConfig(**SHAPE))}
    for name, model in made.items():
        model.save_pretrained(folder / name, max_shard_size="100KB")
    return {name: folder / name for name in made}


@pytest.fixture(scope="module")
def ours(public, tmp_path_factory, rows) -> dict[str, torch.Tensor]:
    """Logits of what was imported: as it is, and at its full rank by factors."""
    folder = tmp_path_factory.mktemp("imported")
    bring(public["llama"], folder / "llama")
    bring(public["arcee"], folder / "arcee")
    facts = bring(public["arcee"], folder / "factored", rank=64)
    assert min(facts["energy_kept"].values()) == pytest.approx(1.0, abs=1e-12) and len(facts["energy_kept"]) == 12
    names = ["llama", "arcee", "factored"]
    (found,) = run_ranks(1, trained_exports.logits, [str(folder / name) for name in names], rows[:, :128], timeout=200)
    return dict(zip(names, found))


@pytest.mark.parametrize("name, source", [("llama", "llama"), ("arcee", "arcee"), ("factored", "arcee")])
def test_public_models_compute_the_same_here(public, ours, rows, name, source):
    """With grouped queries, a tied embedding, another rotary base and epsilon; or factored at the full rank."""
    with torch.no_grad():
        theirs = open_folder(public[source], torch.float32)(rows[:, :128]).logits
    assert (ours[name] - theirs).abs().max() <= SAME and theirs.std() > 0.5


def test_factors_are_the_best_of_their_rank_and_balanced(public, tmp_path):
    """Against torch's own decomposition; products within 1e-6, which is fp32's rounding."""
    facts = bring(public["llama"], tmp_path / "run", rank=8)
    found = dict(read_weights(find(tmp_path / "run")))
    weight = load_all(public["llama"])["model.layers.1.self_attn.k_proj.weight"]
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    factor_in = found["decoder.layers.1.self_attention.linear_qkv.factor_in"][8:16]
    factor_out = found["decoder.layers.1.self_attention.linear_qkv.factor_out_k"]
    assert ((factor_out @ factor_in) - (u[:, :8] * s[:8]) @ v[:8]).abs().max() <= 1e-6
    assert torch.allclose(factor_in.norm(dim=1), factor_out.norm(dim=0), rtol=1e-5)
    kept = float(s[:8].square().sum() / s.square().sum())
    assert facts["energy_kept"]["model.layers.1.self_attn.k_proj"] == pytest.approx(kept, rel=1e-9)
    assert facts["parameters"] == sum(tensor.numel() for tensor in found.values())


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_any_shape_and_a_poor_rank_are_factored(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1], generator=generator)
    factor_in, factor_out, kept = truncated(weight, 5)
    assert factor_in.shape == (5, shape[1]) and factor_out.shape == (shape[0], 5)
    assert kept == pytest.approx(1.0) and torch.allclose(factor_out @ factor_in, weight, atol=1e-5)
    assert factor_in.isfinite().all()
    assert truncated(torch.zeros(shape), 2)[2] == 1.0


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


ROUND_TRIPS = {
    "elas-grouped": "elas", "elas-soft": "elas", "elas-tied": "elas", "cola-relu2": "elas", "lowrank-swiglu": "elas",
    "lowrank-relu2": "dense", "full-swiglu": "dense",
}  # fmt: skip


def test_the_next_step_is_that_of_the_run_that_went_on(models, tmp_path):
    """Exported and imported, the loss of the next step is within 1e-6 of the run's own; moments start anew.

    An update with those follows, after which the loss on the same tokens is lower; and back at the start, as after a
    rollback, moments are zero again and both losses the same.
    """
    runs = {name: tmp_path / name for name in ROUND_TRIPS}
    for name, form in ROUND_TRIPS.items():
        facts = bring(models[name].folder(form), runs[name])
        assert facts["energy_kept"] == {}
    later = bring(
        models["not-yet-sparse"].folder(),
        tmp_path / "later",
        overrides={"sparsity.kind": "2:4", "sparsity.dense_steps": 0},
    )
    runs["not-yet-sparse"] = Path(later["checkpoint"]).parents[1]
    (losses,) = run_ranks(1, trained_exports.resumed, {str(run): ONE for run in runs.values()}, 51, timeout=200)
    for name, run in runs.items():
        first, second, *again = losses[str(run)]
        assert first == pytest.approx(models[name].loss, abs=1e-6), name
        assert second < first and again == [first, second], name


PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"


def test_the_commands_of_the_page_import_and_train(public, tmp_path, monkeypatch):
    """As written in docs/export.md, but for the rank; training on two tensor-parallel ranks, stopped and resumed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(public["llama"].parent)
    torch.manual_seed(0)
    ElasForCausalLM(ElasConfig(**SHAPE, rank=8)).save_pretrained(tmp_path / "exports" / "60m")
    for name in ("text", "held-out"):
        write_corpus(tmp_path / "data" / name, vocab=256)
    commands = [line.partition("#")[0].split() for line in PAGE.read_text().splitlines() if line.startswith("elas ")]
    imports = [command for command in commands if command[:3] == ["elas", "import", "hf"]]
    (training,) = (command for command in commands if command[:2] == ["elas", "train"])
    assert len(imports) == 3
    for command in imports:
        assert cli.run(["16" if word == "192" else word for word in command[1:]]) == 0
    settings = {"parallel.tensor": 2, "parallel.sequence": True, "data.valid": "data/held-out", "model.seq_length": 32}
    settings |= {"train.micro_batch_size": 2, "train.global_batch_size": 8, "train.dtype": "float32"}
    settings |= {"schedule.warmup_steps": 1, "train.eval_batches": 1, "checkpoint.every_steps": 2, "log.every_steps": 1}
    settings |= {"train.timeout_seconds": None, "log.trackers": []}
    folder = tmp_path / Path(training[3]).parent
    other = {**settings, "train.steps": 1, "train.run_dir": "runs/other", "checkpoint.init_from": folder}
    shown = run_ranks(2, f"{__name__}:train_in", str(tmp_path), [*training[2:], *arguments(other)], timeout=200)[0]
    assert "starting with the weights of" in shown and "step_00000000 (step 0)" in shown
    for steps, begins in ((2, "step_00000000 at step 0"), (3, "step_00000002 at step 2")):
        argv = [*training[2:], *arguments({**settings, "train.steps": steps})]
        shown = run_ranks(2, f"{__name__}:train_in", str(tmp_path), argv, timeout=200)[0]
        assert begins in shown
        assert f"changed from step {1 if steps == 2 else 3} on: " in shown
    assert [row["step"] for row in rows_of(folder)] == [1, 2, 3]
    assert rows_of(tmp_path / "runs/other")[0]["loss"] == pytest.approx(rows_of(folder)[0]["loss"], abs=1e-6)
    began = rows_of(folder, "validation")[0]["loss"]
    (model,) = run_ranks(1, trained_exports.logits, [str(folder)], torch.zeros(1, 8, dtype=torch.long), timeout=200)
    assert began > rows_of(folder, "validation")[-1]["loss"] and model[0].isfinite().all()


def train_in(folder: str, argv: list[str]) -> str:
    """Train in a folder, as paths of the page are relative."""
    with contextlib.chdir(folder):
        return trained_exports.run_training(argv)


def test_an_import_can_be_trained_from_any_folder(public, tmp_path, monkeypatch):
    """Its settings name its folder from the root; otherwise a run elsewhere would begin with random weights."""
    monkeypatch.chdir(tmp_path)
    bring(public["llama"], Path("run"))
    assert load_config("run/config.yaml").train.run_dir == str(tmp_path / "run")
