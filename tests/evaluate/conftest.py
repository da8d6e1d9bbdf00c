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
