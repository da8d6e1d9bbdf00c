"""A corpus, its tokenizer, and a checkpoint trained on two ranks, of which the last step was sparse."""

import pytest
from support.ranks import run_ranks

VOCAB = 320


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with `text/*.txt`, `tokenizer`, `train.*`, `valid.*`, `other` (a tokenizer), and the run `run`."""
    from elas.data_prep.sources import Corpus
    from elas.data_prep.tokenize_corpus import tokenize_corpus
    from elas.data_prep.tokenizer_training import train_tokenizer

    folder = tmp_path_factory.mktemp("trained")
    (folder / "text").mkdir()
    for i in range(60):
        (folder / "text" / f"{i:02}.txt").write_text(f"words {i * i} of text {i**3} é\n" * (1 + i % 7 * 4))
    corpus = Corpus([f"{folder}/text/*.txt"])
    train_tokenizer(corpus, folder / "tokenizer", vocab_size=VOCAB)
    train_tokenizer(corpus, folder / "other", vocab_size=VOCAB, model_type="unigram")
    tokenize_corpus(corpus, folder / "tokenizer", folder / "train")
    tokenize_corpus(Corpus([f"{folder}/text/*[37].txt"]), folder / "tokenizer", folder / "valid")
    settings = {"model.vocab_size": VOCAB, "data.train": str(folder / "train"), "data.valid": str(folder / "valid")}
    run_ranks(2, "evaluated:save", settings, str(folder / "run"), timeout=200)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A folder with a small Llama of transformers, and no tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=40, initializer_range=0.2, **sizes)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
