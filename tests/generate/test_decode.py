"""Decoding with our cache gives what full forward passes and transformers' own `generate` give."""

import copy

import pytest
import torch
from support.folders import write_model

from elas.generate.cache import growing_cache
from elas.generate.decode import Sampling, decode
from elas.generate.few_tokens import prepare_for_few_tokens
from elas.hf.build import open_folder

PROMPTS = [[5, 9, 30], [7], [12, 40, 41, 42, 43, 44, 45, 60, 61]]
KINDS = {
    "lowrank": {},
    "grouped": {"num_key_value_heads": 2},
    "cola": {"low_rank": "cola"},
    "full rank": {"low_rank": "none"},
    "swiglu": {"hidden_act": "silu", "sparsity": "none"},
}


@pytest.fixture(scope="module", params=KINDS, ids=lambda name: name.replace(" ", "_"))
def model(request, tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model") / "m", **KINDS[request.param])
    return open_folder(folder, torch.float32)


def greedy_by_full_passes(model, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_is_that_of_full_passes(model):
    found, timing = decode(model, [PROMPTS[0]], max_new_tokens=80, context=96)
    assert found[0].tokens == greedy_by_full_passes(model, PROMPTS[0], 80)
    assert found[0].reason == "length"
    assert (timing.tokens, timing.steps) == (80, 80)


def test_a_batch_of_uneven_prompts_is_the_same_as_each_alone(model):
    together, _ = decode(model, PROMPTS, max_new_tokens=30, context=96)
    alone = [decode(model, [prompt], max_new_tokens=30, context=96)[0][0] for prompt in PROMPTS]
    assert [one.tokens for one in together] == [one.tokens for one in alone]


def test_sampling_does_not_depend_on_the_batch(model):
    sampling = Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=7)
    together, _ = decode(model, PROMPTS, max_new_tokens=20, context=96, sampling=sampling)
    alone = [
        decode(model, [prompt], max_new_tokens=20, context=96, sampling=sampling, first=number)[0][0]
        for number, prompt in enumerate(PROMPTS)
    ]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    other, _ = decode(model, PROMPTS, max_new_tokens=20, context=96, sampling=Sampling(0.9, 40, 0.95, seed=8))
    assert [one.tokens for one in together] != [one.tokens for one in other]


def test_greedy_is_that_of_transformers(model):
    ours, _ = decode(model, [PROMPTS[2]], max_new_tokens=60, context=96)
    theirs = model.generate(torch.tensor([PROMPTS[2]]), max_new_tokens=60, do_sample=False, eos_token_id=None)
    assert ours[0].tokens == theirs[0, len(PROMPTS[2]) :].tolist()


def test_a_latent_value_cache_gives_the_same_tokens(model):
    if model.config.low_rank == "none":
        pytest.skip("full-rank values have no latent")
    full, _ = decode(model, PROMPTS, max_new_tokens=40, context=96)
    model.config.value_cache = "latent"
    try:
        latent, _ = decode(model, PROMPTS, max_new_tokens=40, context=96)
    finally:
        model.config.value_cache = "full"
    assert [one.tokens for one in latent] == [one.tokens for one in full]


def test_the_end_the_length_the_context_and_the_caller_end_a_text(model):
    tokens = greedy_by_full_passes(model, PROMPTS[0], 10)
    end = next(i for i, token in enumerate(tokens) if token not in tokens[:i] and i)
    found, _ = decode(model, [PROMPTS[0]], max_new_tokens=50, context=96, eos=[tokens[end]])
    assert (found[0].tokens, found[0].reason) == (tokens[:end], "eos")
    found, _ = decode(model, [PROMPTS[0]], max_new_tokens=50, context=8)
    assert (found[0].tokens, found[0].reason) == (tokens[:5], "context")
    found, _ = decode(model, [PROMPTS[0]], max_new_tokens=50, context=96, on_token=lambda _, one: len(one.tokens) == 3)
    assert (found[0].tokens, found[0].reason) == (tokens[:3], "stop")


def test_our_cache_survives_what_transformers_does_to_caches(model):
    beams = {}
    for name, cache in (("ours", growing_cache()), ("theirs", None)):
        given = torch.tensor([PROMPTS[2]])
        beams[name] = model.generate(
            given, max_new_tokens=20, num_beams=3, do_sample=False, past_key_values=cache, eos_token_id=None
        ).tolist()
    assert beams["ours"] == beams["theirs"]


def test_products_of_few_tokens_give_the_same_text(model):
    plain, _ = decode(model, [PROMPTS[2]], max_new_tokens=40, context=96)
    other = copy.deepcopy(model)
    assert prepare_for_few_tokens(other)
    live, _ = decode(other, [PROMPTS[2]], max_new_tokens=40, context=96)
    assert live[0].tokens == plain[0].tokens
