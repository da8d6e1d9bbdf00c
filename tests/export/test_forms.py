"""Exported folders compute what the trained checkpoints do, and continue a text in the same way."""

import json

import pytest
import torch

from elas.hf.build import open_folder

pytestmark = pytest.mark.timeout(900)  # models are trained before the first test

SAME = 1e-4  # of a logit, fp32: both sum hundreds of products, in another order
FLOAT32 = [
    "elas-grouped", "elas-soft", "lowrank-relu2", "lowrank-swiglu", "elas-tied", "cola-silu", "cola-relu2",
    "full-relu2", "full-swiglu", "not-yet-sparse",
]  # fmt: skip
UNCHANGED = {"lowrank-relu2": "Arcee", "not-yet-sparse": "Arcee", "lowrank-swiglu": "Llama", "full-swiglu": "Llama"}
"""Models without 2:4 that have a dense form, and its architecture."""


@torch.no_grad()
def logits(folder, rows) -> torch.Tensor:
    model = open_folder(folder, torch.float32)
    return torch.cat([model(row[None]).logits for row in rows])


@pytest.mark.parametrize("name", FLOAT32)
def test_the_elas_form_gives_the_same_logits(models, rows, name):
    model = models[name]
    ours = model.logits
    assert (ours - logits(model.folder(), rows)).abs().max() <= SAME
    assert ours.std() > 0.3  # trained: there is something to differ in


def test_bf16_weights_differ_by_their_rounding_alone(models, rows):
    model = models["elas-bf16"]
    assert model.forms["elas"]["max_logit_diff"] <= SAME
    config = json.loads((model.folder() / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["sparsity"] == "2:4"
    assert SAME < (model.logits - logits(model.folder(), rows)).abs().max() < 0.3


def test_the_elas_form_is_sparse_as_its_last_step_was(models):
    sparse = {name: json.loads((m.folder() / "config.json").read_text())["sparsity"] for name, m in models.items()}
    dense = {"lowrank-relu2", "lowrank-swiglu", "cola-silu", "full-swiglu", "not-yet-sparse"}
    assert {name for name, kind in sparse.items() if kind == "none"} == dense


@pytest.mark.parametrize("name", FLOAT32)
@torch.no_grad()
def test_greedy_text_is_the_same_with_either_cache(models, prompt, name):
    """transformers' generate with its cache, against whole passes of ours."""
    model, expected = open_folder(models[name].folder(), torch.float32), models[name].text
    for cache in ("full", "latent") if model.config.low_rank != "none" else ("full",):
        model.config.value_cache = cache
        text = model.generate(prompt, max_length=expected.shape[1], do_sample=False, eos_token_id=None)
        assert torch.equal(text, expected), cache


@pytest.mark.parametrize("name", UNCHANGED)
def test_the_dense_form_gives_the_same_logits(models, rows, name):
    model = models[name]
    config = json.loads((model.folder("dense") / "config.json").read_text())
    assert config["architectures"] == [f"{UNCHANGED[name]}ForCausalLM"] and "auto_map" not in config
    assert (model.logits - logits(model.folder("dense"), rows)).abs().max() <= SAME


def test_what_the_dense_form_cannot_keep_is_said(models):
    for name in ("cola-silu", "cola-relu2"):
        assert models[name].forms["dense"].startswith("--form dense: low_rank.kind=cola has a non-linearity")
        assert not models[name].folder("dense").exists()
    facts = models["elas-grouped"].forms["dense"]
    assert facts["ppl_exported"] != pytest.approx(facts["ppl_ours"], rel=1e-4)
    assert models["elas-grouped"].forms["elas"]["max_logit_diff"] <= SAME


def test_weights_are_in_shards_of_the_size_asked_for(models):
    """Of 0.1 MB; a tensor is never cut."""
    folder = models["elas-grouped"].folder()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 1 and set(index["weight_map"].values()) == set(files)
    assert files == [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    assert index["metadata"]["total_size"] == 4 * models["elas-grouped"].forms["elas"]["parameters"]
    assert max((folder / name).stat().st_size for name in files) < 1.1e5
