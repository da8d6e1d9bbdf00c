"""Exported folders in an environment without ELAS: torch and transformers alone, and with accelerate and PEFT."""

import json
from pathlib import Path

import alone
import pytest
import torch

pytestmark = pytest.mark.timeout(900)  # models are trained before the first test

SCRIPT = Path(__file__).with_name("stranger.py")
SAME = 1e-4


@pytest.fixture(scope="module")
def used(models, tmp_path_factory) -> dict:
    """What a user of torch and transformers gets from one model (`stranger.use`)."""
    folder = tmp_path_factory.mktemp("alone")
    environment = alone.make(folder / "packages", "torch", "transformers")
    model = models["elas-grouped"]
    alone.run(environment, SCRIPT, "use", folder / "facts.json", model.folder(), model.folder("dense"), timeout=400)
    return json.loads((folder / "facts.json").read_text())


def test_it_loads_and_generates(models, used):
    from elas.hf.build import open_folder

    assert (used["class"], used["module"]) == ("ElasForCausalLM", "transformers_modules")
    assert (used["dense"], used["base"], used["config"]) == ("ArceeForCausalLM", "ElasModel", "lowrank")
    model = open_folder(models["elas-grouped"].folder(), torch.float32)
    tokens = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert (model(tokens).logits - torch.tensor(used["logits"])).abs().max() <= SAME
    text = model.generate(tokens[:1, :8], max_new_tokens=12, do_sample=False)
    assert used["text"] == text[:, 8:].tolist()


def test_it_is_saved_and_loaded_again(used):
    assert used["whole"] == used["shards"] == 0.0


def test_every_way_to_run_it_computes_the_same(used):
    """Attention in other operations, compiled as one graph, recomputed in backward."""
    assert max(used["attention"].values()) <= SAME
    assert used["compiled"] <= SAME and used["recomputed"] <= 1e-6


def test_padding_on_the_left_changes_no_text(used):
    assert used["padded"]


def test_trainer_and_adapters_fine_tune_it(models, tmp_path):
    """The loss on two rows falls in 10 steps; adapters are saved, loaded and merged."""
    pytest.importorskip("peft")
    environment = alone.make(tmp_path / "packages", "torch", "transformers", "accelerate", "peft")
    facts_file = tmp_path / "facts.json"
    alone.run(environment, SCRIPT, "tune", facts_file, models["elas-grouped"].folder(), timeout=400)
    facts = json.loads(facts_file.read_text())
    for kind in ("trainer", "factors", "all"):
        assert len(facts[kind]) == 10 and facts[kind][-1] < facts[kind][0] - 0.05, kind
    assert facts["auto"] == "cpu"
    assert max(facts["factors again"], facts["all again"]) <= 1e-5
    assert max(facts["factors merged"], facts["all merged"]) <= SAME
