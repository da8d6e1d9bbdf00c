"""What `elas import hf` refuses, in one line, leaving nothing behind; and how settings choose the form."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ArceeConfig, ArceeForCausalLM, LlamaConfig, LlamaForCausalLM

from elas.checkpoint.choose import find
from elas.checkpoint.identity import written_config
from elas.config import load_config
from elas.console import Console
from elas.errors import UserError
from elas.export.from_hf import Request, import_hf
from elas.hf.configuration_elas import ElasConfig
from elas.hf.modeling_elas import ElasForCausalLM

SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ONE_FILE = "model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """`llama`, tied; `arcee`, in shards; `elas`, low rank and 2:4; `cola`."""
    folder = tmp_path_factory.mktemp("folders")
    LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)).save_pretrained(folder / "llama")
    ArceeForCausalLM(ArceeConfig(**SHAPE)).save_pretrained(folder / "arcee", max_shard_size="20KB")
    ElasForCausalLM(ElasConfig(**SHAPE, rank=8, sparsity_method="soft_threshold")).save_pretrained(folder / "elas")
    ElasForCausalLM(ElasConfig(**SHAPE, rank=8, low_rank="cola")).save_pretrained(folder / "cola")
    return folder


def refusal(source: Path, out: Path, **more) -> str:
    """The line, with the folder as D; nothing must be left of the run."""
    with pytest.raises(UserError) as caught:
        import_hf(Request(source, out, **more), Console())
    assert not out.with_name(out.name + ".partial").exists() and "\n" not in str(caught.value)
    return str(caught.value).replace(str(source), "D")


CONFIGS = [
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type='yarn' cannot be"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear' cannot be"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.5}}, "rope_theta=10000.5 cannot be imported: "),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ({"attention_bias": True}, "attention_bias=True cannot be imported: our linears have no biases"),
    ({"mlp_bias": True}, "mlp_bias=True cannot be imported: our linears have no biases"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' cannot be imported: its FFN must have silu"),
    ({"hidden_act": "relu2"}, "hidden_act='relu2' cannot be imported"),
    ({"head_dim": 16}, "head_dim=16 cannot be imported: heads must be hidden_size / num_attention_heads = 8 wide"),
    ({"sliding_window": 16}, "sliding_window=16 cannot be imported"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config={'quant_method': 'gptq'} cannot be"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures=['LlamaForSequenceClassification'] cannot"),
    ({"hidden_size": "wide"}, "is no configuration of LlamaForCausalLM (Validation error"),
    ({"num_attention_heads": 0}, "is no configuration of LlamaForCausalLM ("),
]


def test_what_our_model_does_not_compute_is_refused(folders, tmp_path):
    source = Path(shutil.copytree(folders / "llama", tmp_path / "source"))
    facts = json.loads((source / "config.json").read_text())
    for change, expected in CONFIGS:
        (source / "config.json").write_text(json.dumps(facts | change))
        assert refusal(source, tmp_path / "run").startswith(f"D/config.json: {expected}"), change
    (source / "config.json").write_text(json.dumps(facts | {"model_type": "mistral"}))
    names = "ElasForCausalLM, LlamaForCausalLM, ArceeForCausalLM"
    assert refusal(source, tmp_path / "run") == f"D: model_type='mistral' cannot be imported; give a folder of {names}"
    (source / "config.json").write_text("{")
    assert refusal(source, tmp_path / "run").startswith("D/config.json: is not JSON")
    assert refusal(tmp_path, tmp_path / "run").startswith("D: is no Hugging Face model: no readable config.json")


def test_files_that_do_not_hold_the_model_are_refused(folders, tmp_path):
    def changed(change) -> str:
        source = Path(shutil.copytree(folders / "llama", tmp_path / "source"))
        tensors = load_file(source / ONE_FILE)
        change(tensors)
        save_file(tensors, source / ONE_FILE)
        line = refusal(source, tmp_path / "run")
        shutil.rmtree(source)
        return line

    norm, embedding = "model.norm.weight", "model.embed_tokens.weight"
    bias, query = "model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_proj.weight"
    for change, expected in (
        (lambda t: t.pop(norm), f"D: has no {norm}, which config.json asks for"),
        (lambda t: t.update({bias: torch.zeros(32)}), f"D: has {bias}, which our model does not have"),
        (lambda t: t.update({query: torch.zeros(32, 16)}), f"D: {query} is [32, 16], and [32, 32] by config.json"),
        (lambda t: t.update({embedding: torch.zeros(90, 32)}), f"D: {embedding} is [90, 32], and [96, 32] by"),
        (lambda t: t[norm].fill_(torch.nan), f"D/{ONE_FILE}: {norm} has values that are not finite"),
        (lambda t: t.update({norm: t[norm].to(torch.int8)}), f"D/{ONE_FILE}: {norm} is I8, and quantised weights"),
        (lambda t: t.update({"lm_head.weight": t[embedding] + 1}), "D: config.json says tie_word_embeddings, but lm"),
    ):
        assert changed(change).startswith(expected)


def test_files_that_cannot_be_read_are_refused(folders, tmp_path):
    source = Path(shutil.copytree(folders / "llama", tmp_path / "llama"))
    file = source / ONE_FILE
    content = file.read_bytes()
    for bad in (content[:-100], content[:20], b"junk" * 10):
        file.write_bytes(bad)
        assert refusal(source, tmp_path / "run").startswith(f"D/{ONE_FILE}: cannot be read as safetensors (")
    file.rename(source / "pytorch_model.bin")
    line = refusal(source, tmp_path / "run")
    assert line.startswith("D: its weights are pickles, which can run code when they are read; if you trust it, ")
    (source / "pytorch_model.bin").unlink()
    assert refusal(source, tmp_path / "run").startswith("D: holds no safetensors; give a folder with")
    source = Path(shutil.copytree(folders / "arcee", tmp_path / "arcee"))
    last = max(source.glob("*.safetensors"))
    last.unlink()
    assert refusal(source, tmp_path / "run").startswith(f"D/{last.name}: is missing, but model.safetensors.index.json")
    (source / "model.safetensors.index.json").write_text("{}")
    assert refusal(source, tmp_path / "run").startswith("D/model.safetensors.index.json: is no index of weights")


def test_settings_of_another_model_are_refused(folders, tmp_path):
    (tmp_path / "there").mkdir()
    for name, more, expected in (
        ("llama", {"rank": 17}, "low_rank.rank=17: larger than the smallest dimension it factors (the key/value"),
        ("llama", {"rank": 0}, "low_rank.rank=0: out of range; give 1 or more"),
        ("llama", {"rank": 8, "low_rank": "none"}, "low_rank.rank=8: with low_rank.kind=none there are no factors"),
        ("llama", {"low_rank": "lowrank"}, "low_rank.rank=None: the weights are to be factored; give --rank R"),
        ("llama", {"rank": 8, "overrides": {"low_rank.rank": 4}}, "low_rank.rank=4: --rank sets it; leave one out"),
        ("llama", {"overrides": {"low_rank.kind": "cola"}}, "low_rank.kind='cola': D has low_rank.kind=none, and"),
        ("cola", {"low_rank": "none"}, "low_rank.kind='none': D has low_rank.kind=cola, and CoLA's non-linearity"),
        ("cola", {"rank": 4}, "low_rank.rank=4: D has 8, and CoLA's factors have no product to factor again"),
        ("cola", {"overrides": {"low_rank.activation": "relu2"}}, "low_rank.activation='relu2': D has 'silu'"),
        ("llama", {"config": "60m"}, "model.hidden_size=512: D has 32; leave it out, or give settings of that"),
        ("llama", {"overrides": {"model.vocab_size": 128}}, "model.vocab_size=128: D has 96"),
        ("llama", {"overrides": {"model.norm_eps": 1e-5}}, "model.norm_eps=1e-05: D has 1e-06"),
        ("llama", {"overrides": {"sparsity.kind": "2:4"}}, "model.activation='swiglu': 2:4 sparsity requires a"),
        ("llama", {"overrides": {"model.seq_length": 65}}, "model.max_position_embeddings=64: shorter than"),
        ("llama", {"overrides": {"train.run_dir": "x"}}, "train.run_dir='x': is made by the import; leave it out"),
        ("llama", {"overrides": {"checkpoint.init_from": "x"}}, "checkpoint.init_from='x': is made by the import"),
        ("llama", {"overrides": {"data.tokenizer": "/no"}}, "data.tokenizer='/no': cannot be opened (no tokenizer"),
    ):
        assert refusal(folders / name, tmp_path / "run", **more).startswith(expected), more
    assert refusal(folders / "llama", tmp_path / "there").endswith("there: exists; give a folder that does not")


def test_a_tokenizer_comes_along_if_it_fits(folders, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def with_tokenizer(size: int) -> Path:
        source = Path(shutil.copytree(folders / "llama", tmp_path / f"source{size}"))
        words = {f"w{n}": n for n in range(size - 1)} | {"</s>": size - 1}
        made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), eos_token="</s>")
        made.save_pretrained(source)
        return source

    source = with_tokenizer(96)
    from elas.data.tokenizer import load_tokenizer

    facts = {"sha256": load_tokenizer(source).sha256, "source_sha256": "a" * 64}  # as an export writes it
    (source / "elas_tokenizer.json").write_text(json.dumps(facts))
    facts = import_hf(Request(source, tmp_path / "run"), Console())
    assert facts["tokenizer"] == str(tmp_path / "run" / "tokenizer")
    assert load_tokenizer(facts["tokenizer"]).sha256 == load_tokenizer(source).sha256
    assert "a" * 64 in load_tokenizer(facts["tokenizer"]).identities  # of corpora that the model was trained on
    assert load_config(tmp_path / "run" / "config.yaml").train.dtype == "float32"
    large = with_tokenizer(97)
    line = refusal(large, tmp_path / "other")
    assert line.startswith("data.tokenizer='D': has 97 tokens, and the model an embedding of 96; give --data.tokenizer")
    facts = import_hf(Request(large, tmp_path / "other", overrides={"data.tokenizer": None}), Console())
    assert facts["tokenizer"] is None and not (tmp_path / "other" / "tokenizer").exists()


def test_the_form_is_that_of_the_folder_or_as_asked_for(folders, tmp_path):
    """Kind and rank of the linears, and 2:4, by folder and options."""
    for number, (name, more, kind, rank, sparsity) in enumerate(
        (
            ("arcee", {}, "none", None, "none"),
            ("arcee", {"rank": 4}, "lowrank", 4, "none"),
            ("arcee", {"overrides": {"low_rank.rank": 4, "sparsity.kind": "2:4"}}, "lowrank", 4, "2:4"),
            ("elas", {}, "lowrank", 8, "2:4"),
            ("elas", {"rank": 8}, "lowrank", 8, "2:4"),
            ("elas", {"rank": 6}, "lowrank", 6, "2:4"),
            ("elas", {"low_rank": "none"}, "none", None, "2:4"),
            ("cola", {}, "cola", 8, "2:4"),
        )
    ):
        facts = import_hf(Request(folders / name, tmp_path / str(number), **more), Console())
        config = written_config(find(tmp_path / str(number)))
        assert config.low_rank.kind == kind and (rank is None or config.low_rank.rank == rank)
        assert config.sparsity.kind == sparsity
        if name == "elas":
            assert (config.sparsity.method, config.sparsity.dense_steps) == ("soft_threshold", 0)
        assert bool(facts["energy_kept"]) == (
            more.get("rank") in (4, 6) or "low_rank.rank" in more.get("overrides", {})
        )
        assert config.model.seq_length == 64
