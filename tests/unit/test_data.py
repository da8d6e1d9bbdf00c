"""Corpus settings and batches: blends, packing, and who gets which sample."""

import numpy as np
import pytest
import torch
from support.corpora import SMALL, write_corpus

from elas.config import load_config
from elas.data.corpus import parse_blend
from elas.data.token_files import read_token_files
from elas.errors import ConfigError, UserError
from elas.parallel import Layout


def layout(dp: int, dp_rank: int) -> Layout:
    return Layout(1, 1, dp, 1, 0, 0, dp_rank, dp_rank, dp, False)


def settings(tmp_path, **more):
    return load_config(None, {**SMALL, "train.run_dir": str(tmp_path / "run"), "data.split": "90,10,0", **more})


def test_blends_are_read_in_every_spelling():
    assert parse_blend("data.train", "a/text") == (["a/text"], None)
    assert parse_blend("data.train", "0.7 a 0.3 b") == (["a", "b"], [0.7, 0.3])
    assert parse_blend("data.train", ["0.7", "a", "0.3", "b"]) == (["a", "b"], [0.7, 0.3])
    assert parse_blend("data.train", ["a", "b", "c"]) == (["a", "b", "c"], None)
    for bad in ("0.7 a 0.3", ["0.7", "a", "b", "c"], ["-1", "a"], []):
        with pytest.raises(ConfigError):
            parse_blend("data.train", bad)


def test_headers_count_documents_and_tokens(tmp_path):
    files = read_token_files("data.train", write_corpus(tmp_path / "text", documents=7, length=11))
    assert (files.documents, files.tokens) == (7, 77)


def test_ranks_share_each_global_batch_and_resume_by_position(tmp_path):
    from elas.data.batches import build_datasets, micro_batches

    config = settings(tmp_path, **{"data.train": write_corpus(tmp_path / "text")})
    train = build_datasets(config).train

    def batches(dp, rank, consumed=0):
        return [tokens for tokens, _ in micro_batches(train, config, layout(dp, rank), consumed=consumed)]

    whole = torch.cat(batches(1, 0))
    size = config.train.micro_batch_size
    for dp in (2, 4):
        parts = [torch.stack(batches(dp, rank)) for rank in range(dp)]  # [micro-batches, size, s] each
        together = torch.stack(parts, dim=1).flatten(0, 2)
        assert torch.equal(together, whole[: len(together)])
    assert torch.equal(torch.cat(batches(1, 0, consumed=24)), whole[24:])
    assert len(whole) >= config.train.steps * config.train.global_batch_size and size == 2


def test_samples_are_packed_and_labels_are_the_next_token(tmp_path):
    from elas.data.batches import build_datasets

    config = settings(tmp_path, **{"data.train": write_corpus(tmp_path / "text", length=13)})  # shorter than a sample
    train = build_datasets(config).train
    stream = np.fromfile(tmp_path / "text.bin", dtype=np.uint16)
    for index in (0, 3):
        sample = train[index]
        assert sample["tokens"].shape == (config.model.seq_length,)
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        assert sample["loss_mask"].all()
    assert set(torch.unique(train[0]["tokens"]).tolist()) <= set(stream.tolist())


def shift(prefix: str) -> None:
    """Add 200 to every token, to tell two corpora apart."""
    np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r+")[:] += 200


def test_a_blend_draws_by_weight(tmp_path, one_rank):
    from elas.data.batches import build_datasets

    low = write_corpus(tmp_path / "low", vocab=100)
    high = write_corpus(tmp_path / "high", vocab=100, seed=1)
    shift(high)
    config = settings(tmp_path, **{"data.train": ["0.75", low, "0.25", high], "train.steps": 20})
    train = build_datasets(config).train
    from_low = np.mean([bool(train[i]["tokens"].max() < 200) for i in range(160)])
    assert abs(from_low - 0.75) < 0.02  # Megatron's blending is exact to a sample


def test_validation_can_come_from_its_own_files(tmp_path):
    from elas.data.batches import build_datasets

    text, held_out = write_corpus(tmp_path / "text", vocab=100), write_corpus(tmp_path / "held", vocab=100)
    shift(held_out)
    datasets = build_datasets(settings(tmp_path, **{"data.train": text, "data.valid": held_out}))
    assert datasets.train[0]["tokens"].max() < 200 <= datasets.valid[0]["tokens"].min()
    assert build_datasets(settings(tmp_path, **{"data.train": text, "train.eval_batches": 0})).valid is None


def orders(config, count: int) -> list[bytes]:
    from elas.data.batches import build_datasets

    train = build_datasets(config).train
    return [train[i]["tokens"].numpy().tobytes() for i in range(count)]


@pytest.mark.parametrize("blend", (False, True))
def test_sample_order_does_not_depend_on_the_number_of_steps(tmp_path, one_rank, blend):
    """45 × 8 samples are more than one epoch (225) of the first corpus, 90 × 8 more than three."""
    text, other = write_corpus(tmp_path / "text"), write_corpus(tmp_path / "other", seed=1)
    train = ["0.7", text, "0.3", other] if blend else text
    short, long = (settings(tmp_path, **{"data.train": train, "train.steps": steps}) for steps in (45, 90))
    few, many = orders(short, 360), orders(long, 720)
    assert few == many[:360] and len(set(many)) < 720


def test_epochs_hold_every_sample_once_in_their_own_order(tmp_path):
    config = settings(tmp_path, **{"data.train": write_corpus(tmp_path / "text"), "train.steps": 100})
    from elas.data.batches import build_datasets

    epoch = len(build_datasets(config).train.dataset)
    seen = orders(config, 3 * epoch)
    epochs = [seen[i * epoch : (i + 1) * epoch] for i in range(3)]
    assert len({tuple(e) for e in epochs}) == 3
    assert all(sorted(e) == sorted(epochs[0]) for e in epochs)


def test_an_id_without_an_embedding_is_an_error_that_says_so(tmp_path):
    from elas.data.batches import build_datasets, micro_batches

    config = settings(tmp_path, **{"data.train": write_corpus(tmp_path / "text"), "model.vocab_size": 300})
    with pytest.raises(UserError, match=r"token id \d+ near sample \d+ is outside model.vocab_size=300"):
        list(micro_batches(build_datasets(config).train, config, layout(1, 0)))


@pytest.mark.parametrize("content", (b"", b"garbage"))
@pytest.mark.parametrize("of", ("PackedDocuments", "BlendedDataset"))
def test_a_damaged_sample_index_is_named(tmp_path, one_rank, of, content):
    from elas.data.batches import build_datasets

    corpora = [write_corpus(tmp_path / name) for name in "ab"]
    config = settings(tmp_path, **{"data.train": corpora})
    build_datasets(config)
    files = list((tmp_path / "run" / "index-cache").glob(f"*{of}*.npy"))
    for file in files:
        file.write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"^data.cache='.*/run/index-cache': holds a damaged sample index .*; remove it"
    ):
        build_datasets(config)
    assert files


def test_a_corpus_of_another_tokenizer_is_refused(tmp_path):
    import json

    from elas.data.corpus import check_corpus
    from elas.data_prep.sources import Corpus
    from elas.data_prep.tokenize_corpus import tokenize_corpus
    from elas.data_prep.tokenizer_training import train_tokenizer

    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"words {i * i} of text {i**3}\n" * 40)
    corpus = Corpus([f"{tmp_path}/*.txt"])
    train_tokenizer(corpus, tmp_path / "tokenizer", vocab_size=320)
    tokenize_corpus(corpus, tmp_path / "tokenizer", tmp_path / "text")
    config = settings(tmp_path, **{"data.train": str(tmp_path / "text"), "data.tokenizer": str(tmp_path / "tokenizer")})
    check_corpus(config)
    manifest = tmp_path / "text.manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"tokenizer_sha256": "of another"}))
    own = rf"{tmp_path}/text was made with another tokenizer \({tmp_path}/tokenizer, 320 tokens, sha256 of another…"
    with pytest.raises(
        ConfigError, match=own + rf"; this one has 320 tokens\); set data.tokenizer to {tmp_path}/tokenizer"
    ):
        check_corpus(config)

    # Another, larger tokenizer: not the model's vocabulary is wrong, though that is too small for it.
    train_tokenizer(corpus, tmp_path / "larger", vocab_size=340)
    tokenize_corpus(corpus, tmp_path / "tokenizer", tmp_path / "again")
    wrong = {"data.train": str(tmp_path / "again"), "data.tokenizer": str(tmp_path / "larger"), "model.vocab_size": 320}
    with pytest.raises(ConfigError, match=r"^data.tokenizer=.*this one has 340 tokens"):
        check_corpus(settings(tmp_path, **wrong))
    small = {"data.train": str(tmp_path / "again"), "data.tokenizer": None, "model.vocab_size": 300}
    made_with = f"made with {tmp_path}/tokenizer; set it to 320$"
    with pytest.raises(
        ConfigError, match=f"^model.vocab_size=300: smaller than the 320 tokens of .*again, {made_with}"
    ):
        check_corpus(settings(tmp_path, **small))


@pytest.mark.parametrize(
    "vocab_size, tied, wasted",
    [(512, False, None), (1664, False, None), (1665, False, "0.1 M"), (32000, False, "4.0 M"), (32000, True, "2.0 M")],
)
def test_a_vocabulary_far_larger_than_the_corpus_s_is_named(tmp_path, vocab_size, tied, wasted):
    """Up to 1.25 times and 1,024 tokens more are padding; 512 tokens, 64 wide, in one table or two."""
    from elas.data.corpus import unused_vocabulary

    corpus = write_corpus(tmp_path / "text")
    config = settings(tmp_path, **{"data.train": corpus, "model.vocab_size": vocab_size, "model.tie_embeddings": tied})
    why = f"the tokenizer has 512 tokens, so {wasted} parameters are never used; give about 512"
    assert unused_vocabulary(config) == ([f"model.vocab_size={vocab_size}: {why}"] if wasted else [])


def test_one_truncated_document_a_sample(tmp_path):
    from support.corpora import write_documents

    from elas.data.batches import build_datasets, micro_batches

    lengths = [1, 2, 20, 33, 34, 90] * 4
    documents = [np.arange(length) + 17 * number for number, length in enumerate(lengths)]
    write_documents(tmp_path / "text", documents, np.uint16)
    more = {"data.train": str(tmp_path / "text"), "data.packing": "document", "data.split": "75,25,0"}
    config = settings(tmp_path, **more, **{"train.steps": 3})
    datasets = build_datasets(config)
    seen = []
    for tokens, labels in micro_batches(datasets.train, config, layout(1, 0)):
        for row, label in zip(tokens.tolist(), labels.tolist()):
            counted = [value for value in label if value >= 0]
            assert row[1 : len(counted)] == counted[:-1] and label[len(counted) :] == [-1] * (32 - len(counted))
            seen.append((row[0], len(counted)))
    assert len(seen) == 24 and len(set(seen[:15])) == 15  # 18 documents, three of one token; then a second epoch
    assert {length for _, length in seen} == {1, 19, 32}
    assert len(datasets.valid.dataset) == 5


def test_the_held_out_documents_are_spread_and_exact_in_number():
    from elas.data.split import divide, parse_split

    for documents, split, counts in ((200, "99,1,0", (198, 2)), (1000, "80,15,5", (800, 150)), (9, "5,4", (5, 4))):
        train, valid = divide(documents, parse_split(split))
        assert (len(train), len(valid)) == counts
        assert not set(train) & set(valid) and max(*train, *valid) < documents
        assert list(train) == sorted(set(train)) and list(valid) == sorted(set(valid))
    _, valid = divide(1000, parse_split("90,10,0"))
    assert np.array_equal(valid // 10, np.arange(100))  # one of each ten
    assert len(set((valid % 10).tolist())) == 10  # at no fixed place among them
    train, valid = divide(7, parse_split("1,0,0"))
    assert list(train) == list(range(7)) and not len(valid)
    assert [len(part) for part in divide(4, (0.0, 1.0, 0.0))] == [0, 4]


@pytest.mark.parametrize("packing", ("packed", "document"))
def test_held_out_documents_are_never_trained_on(tmp_path, packing):
    from support.corpora import write_documents

    from elas.data.batches import build_datasets
    from elas.data.split import divide

    write_documents(tmp_path / "text", [np.full(50, number) for number in range(40)], np.uint16)  # an id a document
    more = {"data.train": str(tmp_path / "text"), "data.packing": packing, "data.split": "80,10,10"}
    for steps in (1, 30):
        datasets = build_datasets(settings(tmp_path, **more, **{"train.steps": steps, "train.eval_batches": 9}))
        trained, held_out = divide(40, (0.8, 0.1, 0.1))
        seen = {int(n) for i in range(len(datasets.train.dataset)) for n in datasets.train[i]["tokens"].unique()}
        assert seen <= set(trained.tolist()) | {0} and len(seen) >= 31  # packed: the last sample is cut off
        seen = {int(n) for i in range(len(datasets.valid)) for n in datasets.valid[i]["tokens"].unique()}
        assert seen <= set(held_out.tolist()) | ({0} if packing == "document" else set())


def test_documents_of_several_sequences_stay_on_one_side(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from elas.data.batches import build_datasets
    from elas.data.split import divide

    builder = IndexedDatasetBuilder(f"{tmp_path}/text.bin", dtype=np.uint16)
    for number in range(20):
        builder.add_document(torch.full((60,), number), [20] * 3 if number % 2 else [60])
    builder.finalize(f"{tmp_path}/text.idx")
    config = settings(tmp_path, **{"data.train": str(tmp_path / "text"), "data.split": "75,25", "train.steps": 1})
    datasets = build_datasets(config)
    trained, held_out = divide(20, (0.75, 0.25, 0.0))
    for dataset, allowed in ((datasets.train.dataset, trained), (datasets.valid, held_out)):
        seen = {int(n) for i in range(len(dataset)) for n in dataset[i]["tokens"].unique()}
        assert seen <= set(allowed.tolist()) and len(seen) >= len(allowed) - 1


def rows_of(config, dp: int) -> list[list[int]]:
    """First tokens of the samples that a validation passes, in order, blanks as −1; checks that ranks stay in step."""
    from elas.data.batches import build_datasets, whole_set

    valid = build_datasets(config).valid
    ranks = [list(whole_set(valid, config, layout(dp, rank))) for rank in range(dp)]
    assert len({tuple(len(micro) for micro in rounds) for rounds in ranks}) == 1
    found = []
    for micros in zip(*[[batch for micro in rounds for batch in micro] for rounds in ranks]):
        for tokens, labels in micros:
            assert tokens.shape == labels.shape == (config.train.micro_batch_size, config.model.seq_length)
            found += [t[:4].tolist() if (row >= 0).any() else [-1] for t, row in zip(tokens, labels)]
    return found


@pytest.mark.parametrize("dp", (1, 2, 3, 4))
def test_validation_passes_its_set_once_and_no_more(tmp_path, dp):
    """24 held-out samples where 36 are asked for; then 6, less than a global batch; then 12 of 74."""
    corpus = write_corpus(tmp_path / "text")
    more = {"data.train": corpus, "train.global_batch_size": 12, "train.micro_batch_size": 1, "train.eval_batches": 3}
    for held_out, samples in (("10", 24), ("2.5", 6)):
        config = settings(tmp_path, **more, **{"data.split": f"90,{held_out},0"})
        found = rows_of(config, dp)
        real = [row for row in found if row != [-1]]
        assert len(real) == len({tuple(row) for row in real}) == samples
        assert len(found) == -(-samples // dp) * dp and found[:samples] == real
    config.train.eval_batches, config.data.split = 1, "70,30,0"
    assert len(rows_of(config, dp)) == 12


@pytest.mark.parametrize("packing", ("packed", "document"))
def test_validation_samples_do_not_depend_on_seed_or_steps(tmp_path, packing):
    from elas.data.batches import build_datasets

    more = {"data.train": write_corpus(tmp_path / "text"), "data.packing": packing}
    found = []
    for change in ({}, {"train.seed": 9}, {"train.steps": 99}):
        valid = build_datasets(settings(tmp_path, **more, **change)).valid
        found.append([valid[i]["tokens"].tolist() for i in range(len(valid))])
    assert found[0] == found[1] == found[2] and found[0]


def test_a_validation_blend_ends_with_its_first_source(tmp_path, one_rank):
    from elas.data.batches import build_datasets

    corpus = write_corpus(tmp_path / "text")
    a, b = (write_corpus(tmp_path / name, documents=n, seed=n) for name, n in (("a", 40), ("b", 4)))
    more = {"data.train": corpus, "train.eval_batches": 100}
    datasets = build_datasets(settings(tmp_path, **more, **{"data.valid": [a, b]}))
    sizes = [7999 // 32, 799 // 32]
    assert sum(sizes) - 2 <= len(datasets.valid) <= sum(sizes) and len(datasets.valid) == datasets.valid_available
    datasets = build_datasets(settings(tmp_path, **more, **{"data.valid": ["0.5", a, "0.5", b]}))
    assert abs(len(datasets.valid) - 2 * sizes[1]) <= 1 and datasets.valid_available == len(datasets.valid)
    for dataset in (datasets.valid,):
        samples = [dataset[i]["tokens"].numpy().tobytes() for i in range(len(dataset))]
        assert len(set(samples)) == len(samples)


@pytest.mark.parametrize("packing", ("packed", "document"))
@pytest.mark.parametrize("blend", (False, True))
def test_a_cached_sample_index_serves_one_content(tmp_path, one_rank, packing, blend):
    """Tokenised again under the same name: shorter, longer, or only cut into other documents."""
    from support.corpora import write_documents

    from elas.data.batches import build_datasets

    other = write_corpus(tmp_path / "other", seed=5)
    prefix = str(tmp_path / "text")
    stream = np.arange(6000) % 500
    more = {"data.train": ["0.5", prefix, "0.5", other] if blend else prefix, "data.packing": packing}
    config = settings(tmp_path, **more, **{"data.cache": str(tmp_path / "cache"), "train.steps": 40})
    for lengths in ([150] * 40, [50] * 40, [100] * 60, [150] * 20 + [50] * 60):
        write_documents(prefix, np.split(stream[: sum(lengths)], np.cumsum(lengths)[:-1]), np.uint16)
        train = build_datasets(config).train
        fresh = settings(tmp_path, **more, **{"data.cache": str(tmp_path / f"fresh{len(lengths)}"), "train.steps": 40})
        expected = build_datasets(fresh).train
        assert len(train) == len(expected)
        assert all(torch.equal(train[i]["tokens"], expected[i]["tokens"]) for i in range(320))


def test_a_corpus_named_twice_in_a_blend_is_refused(tmp_path):
    a, b = (write_corpus(tmp_path / name, seed=seed) for seed, name in enumerate("ab"))
    (tmp_path / "link.bin").symlink_to(f"{a}.bin")
    again = f"{tmp_path}/./a"
    for blend in ([a, b, a], ["0.5", a, "0.2", b, "0.3", a], f"0.5 {a} 0.5 {again}", [a, f"{tmp_path}/link"]):
        for key in ("data.train", "data.valid"):
            with pytest.raises(ConfigError, match=f"{key}=.*names one corpus twice .*; name it once"):
                parse_blend(key, blend)


def test_a_blend_counts_its_sources(tmp_path, one_rank):
    from elas.data.batches import build_datasets

    a, b = (write_corpus(tmp_path / name, seed=seed) for seed, name in enumerate("ab"))
    config = settings(tmp_path, **{"data.train": ["0.75", a, "0.25", b]})
    datasets = build_datasets(config)
    counts = datasets.samples_by_source(80)
    assert list(counts) == [a, b] and sum(counts.values()) == 80 and abs(counts[a] - 60) <= 1
    drawn = [int(datasets.train[n]["dataset_id"]) for n in range(33)]
    assert datasets.samples_by_source(33) == {a: drawn.count(0), b: drawn.count(1)}
    assert build_datasets(settings(tmp_path, **{"data.train": a})).samples_by_source(8) == {}


@pytest.mark.parametrize(
    "more, expected",
    [
        ({"train.steps": 4}, ["train.eval_batches=1: a validation has only 256 tokens, so its perplexity is"]),
        ({"train.steps": 4, "train.eval_batches": 0}, []),
        ({"train.steps": 4, "train.eval_batches": 99}, ["data.split=90,10,0: a validation has only 768 tokens"]),
        ({"train.steps": 1120, "train.eval_batches": 0}, []),
        ({"train.steps": 1148, "train.eval_batches": 0}, ["is repeated 41 times, and after about 40 times"]),
    ],
)  # fmt: skip
def test_too_little_text_is_named(tmp_path, more, expected):
    """8 samples of 32 tokens a step; 224 samples to train on."""
    from elas.data.extent import thin_data

    lines = thin_data(settings(tmp_path, **{"data.train": write_corpus(tmp_path / "text"), **more}))
    assert len(lines) == len(expected) and all(part in line for part, line in zip(expected, lines, strict=True)), lines
