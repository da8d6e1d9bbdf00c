"""Validation loss is the mean over the tokens of a set that is passed once, on every layout and in batches of any size.

fp32 throughout: layouts differ in the order in which some thousand losses of about 6 nats are summed, 1e-6 relative.
"""

import numpy as np
import pytest
import validation_run
from support.corpora import SMALL, write_corpus
from support.ranks import run_ranks

pytestmark = pytest.mark.timeout(600)

LAYOUTS = [
    (1, {"train.micro_batch_size": 4, "train.global_batch_size": 4}),
    (1, {"train.micro_batch_size": 1, "train.global_batch_size": 64}),
    (2, {"parallel.zero": 1}),
    (2, {"parallel.zero": 3}),
    (2, {"parallel.tensor": 2}),
    (2, {"parallel.pipeline": 2, "train.global_batch_size": 6}),
    (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "train.micro_batch_size": 1}),
]


def write_uneven(prefix, documents: int = 64) -> str:
    """Documents of 2 to 60 tokens, and of ids that a fresh model finds unequally likely."""
    from support.corpora import write_documents

    random = np.random.default_rng(3)
    write_documents(prefix, [random.integers(1, 8 * n + 8, size=n) % 512 for n in range(2, documents + 2)], np.uint16)
    return str(prefix)


@pytest.mark.parametrize("packing", ("document", "packed"))
def test_validation_is_the_mean_over_tokens(tmp_path, packing):
    more = {"data.train": write_corpus(tmp_path / "text"), "data.valid": write_uneven(tmp_path / "held-out")}
    more |= {"data.packing": packing, "train.steps": 1, "train.eval_batches": 50, "model.num_layers": 4}
    settings = {**SMALL, **more, "log.sparsity_tokens": 0}
    samples = 64 if packing == "document" else (sum(range(2, 66)) - 1) // 32
    truth, tokens = run_ranks(
        1, validation_run.by_hand, {**settings, "train.run_dir": str(tmp_path / "hand")}, samples
    )[0]
    for number, (world, layout) in enumerate(LAYOUTS if packing == "document" else LAYOUTS[2:4]):
        settings["train.run_dir"] = str(tmp_path / f"run{number}")
        validation, _ = run_ranks(world, validation_run.validate, {**settings, **layout}, timeout=200)[0]
        first = validation[0]
        assert (first["step"], first["tokens"], first["samples"], first["share"]) == (0, tokens, samples, 1.0)
        assert first["loss"] == pytest.approx(truth, rel=1e-6)
    assert [row["step"] for row in validation] == [0, 1]


def test_trained_tokens_are_labels_that_count(tmp_path):
    """Two epochs of 32 documents of 2 to 33 tokens in batches of 8: what fills a sample up is no token."""
    from support.corpora import write_documents

    write_documents(tmp_path / "text", [np.arange(n) + n for n in range(2, 34)], np.uint16)
    more = {"data.train": str(tmp_path / "text"), "data.valid": write_corpus(tmp_path / "held-out")}
    more |= {"data.packing": "document", "train.steps": 8, "train.run_dir": str(tmp_path / "run")}
    for world in (2, 1):
        settings = {**SMALL, **more, "train.run_dir": str(tmp_path / f"run{world}"), "train.eval_batches": 2}
        validation, metrics = run_ranks(world, validation_run.validate, settings, timeout=200)[0]
        tokens = [row["tokens"] for row in metrics]
        assert tokens[3] == sum(range(1, 33)) and tokens[7] == 2 * tokens[3]
        rates = [row["tokens_per_s"] * row["step_s"] for row in metrics]
        assert rates == pytest.approx(np.diff([0, *tokens]).tolist(), rel=1e-9)
        assert [row["tokens"] for row in validation] == [16 * 32, 16 * 32]
        assert validation[0]["share"] == 16 / 40


def test_validation_reports_bits_per_byte(tmp_path):
    """Of the bytes of the text itself, whose tokens but the last few, which fill no sample, are all predicted."""
    from elas.data_prep.sources import Corpus
    from elas.data_prep.tokenize_corpus import tokenize_corpus
    from elas.data_prep.tokenizer_training import train_tokenizer

    (tmp_path / "a.txt").write_text("".join(f"words {i * i} of text {i**3} é\n" for i in range(400)))
    corpus = Corpus([str(tmp_path / "a.txt")])
    train_tokenizer(corpus, tmp_path / "tokenizer", vocab_size=320)
    tokenize_corpus(corpus, tmp_path / "tokenizer", tmp_path / "text")
    more = {"data.train": str(tmp_path / "text"), "data.valid": str(tmp_path / "text"), "train.steps": 1}
    settings = {**SMALL, **more, "train.eval_batches": 100, "train.run_dir": str(tmp_path / "run")}
    row = run_ranks(2, validation_run.validate, settings, timeout=200)[0][0][-1]
    size = (tmp_path / "a.txt").stat().st_size
    assert row["bits_per_byte"] == pytest.approx(row["loss"] * row["tokens"] / np.log(2) / size, rel=33 / row["tokens"])
