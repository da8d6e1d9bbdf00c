"""A tokenizer is what decides ids, whatever files it lies in; and what it loses of the text is said."""

import json
import shutil
from pathlib import Path

import pytest

from elas.cli import run
from elas.command import exit_status
from elas.data.tokenizer import load_tokenizer
from elas.data_prep.plan import Plan, Settings
from elas.data_prep.sources import Corpus
from elas.data_prep.tokenize_corpus import Options, merge_work, tokenize_corpus
from elas.errors import Failure, UserError

LINES = ["one two three four five", "the quick brown fox jumps over the lazy dog"] * 20


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory) -> Path:
    """A byte-level BPE as `vocab.json` and `merges.txt`, without a `tokenizer.json`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": alphabet, "show_progress": False}
    fast.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=290, **special))
    folder = tmp_path_factory.mktemp("gpt2")
    fast.model.save(str(folder))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _fewer_merges(folder: Path) -> None:
    lines = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join(lines[:5]) + "\n")


def _edit(change):
    def edit(folder: Path) -> None:
        facts = json.loads((folder / "tokenizer.json").read_text())
        change(facts)
        (folder / "tokenizer.json").write_text(json.dumps(facts))

    return edit


def _save_as_one_file(tokenizer, folder: Path) -> None:
    """`tokenizer.json`, and a class that takes all of it; GPT-2's own takes vocabulary and merges only."""
    tokenizer._hf.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


CHANGES = {
    "normalizer": lambda facts: facts.update(normalizer={"type": "Lowercase"}),
    "pre-tokenizer": lambda facts: facts["pre_tokenizer"].update(add_prefix_space=True),
    "merges": lambda facts: facts["model"]["merges"].reverse(),
    "added token": lambda facts: facts["added_tokens"].append(
        {"id": 300, "content": "fox", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": False}
    ),
}  # fmt: skip


def test_identity_is_all_that_decides_ids(gpt2_folder, tmp_path):
    folder = tmp_path / "t"
    shutil.copytree(gpt2_folder, folder)
    first = load_tokenizer(folder)
    _save_as_one_file(first, tmp_path / "saved")
    for name in ("README.md", "vocab_notes.txt", "my_token_counts.csv"):
        (folder / name).write_text("no part of it")
    assert load_tokenizer(folder).sha256 == first.sha256 == load_tokenizer(tmp_path / "saved").sha256
    assert load_tokenizer(tmp_path / "saved" / "tokenizer.json").sha256 == first.sha256
    _fewer_merges(folder)
    assert load_tokenizer(folder).sha256 != first.sha256
    seen = {first.sha256}
    for what, change in CHANGES.items():
        copy = tmp_path / what
        shutil.copytree(tmp_path / "saved", copy)
        _edit(change)(copy)
        seen.add(load_tokenizer(copy).sha256)
    assert len(seen) == 1 + len(CHANGES)


def test_a_tokenizer_replaced_half_way_is_refused(gpt2_folder, tmp_path, write_jsonl, capsys):
    folder, prefix = tmp_path / "t", tmp_path / "out" / "all"
    shutil.copytree(gpt2_folder, folder)
    data = write_jsonl([{"text": f"the quick fox {n} jumps"} for n in range(200)])
    argv = f"prep tokenize --input {data} --tokenizer {folder} --output {prefix} --task-bytes 500 --workers 1".split()
    assert run([*argv, "--share", "0/2"]) == 0
    _fewer_merges(folder)
    for more in (["--share", "1/2"], []):
        assert exit_status(run, [*argv, *more]) == 2
        (line,) = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error: ")]
        assert "unfinished work here has other tokenizer" in line and not prefix.with_suffix(".bin").exists()
    shutil.copy(gpt2_folder / "merges.txt", folder)
    assert run([*argv, "--share", "1/2"]) == 0
    part = next((prefix.parent / "all.work" / "parts").glob("*.json"))
    whole = part.read_text()
    part.write_text(json.dumps(json.loads(whole) | {"tokenizer_sha256": "0" * 64}))
    with pytest.raises(Failure, match="used another tokenizer"):
        merge_work(prefix)
    part.write_text(whole)
    merge_work(prefix)
    assert run(["prep", "verify", str(prefix)]) == 0
    _fewer_merges(folder)
    assert run(["prep", "verify", str(prefix)]) == 0
    assert "note: " in capsys.readouterr().out
    with pytest.raises(UserError, match="was made with another tokenizer"):
        run(["prep", "info", str(prefix)])


def test_random_ids_and_broken_folders_are_refused(gpt2_folder, tmp_path):
    _save_as_one_file(load_tokenizer(gpt2_folder), tmp_path / "t")
    _edit(lambda facts: facts["model"].update(dropout=0.1))(tmp_path / "t")
    with pytest.raises(UserError, match=r"dropout of 0\.1 makes the ids random; set it to null"):
        load_tokenizer(tmp_path / "t")
    for number, (name, content) in enumerate(
        [("tokenizer_config.json", "[]"), ("tokenizer_config.json", '{"tokenizer_class": 5}'), ("vocab.json", "[1]")]
    ):
        broken = tmp_path / f"broken{number}"
        shutil.copytree(gpt2_folder, broken)
        (broken / name).write_text(content)
        with pytest.raises(UserError, match="AutoTokenizer cannot read it"):
            load_tokenizer(broken)


def test_lost_text_is_counted_with_an_example(tmp_path, write_jsonl, capsys):
    from sentencepiece import SentencePieceTrainer

    (tmp_path / "t").mkdir()
    with open(tmp_path / "t" / "tokenizer.model", "wb") as model:
        options = {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2}
        SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=model, **options)
    texts = ["the fox", "the 日本 fox 語", "one  two", "a\u2581b", *["one two three"] * 500]
    corpus = Corpus([write_jsonl([{"text": text} for text in texts])])
    facts = tokenize_corpus(corpus, tmp_path / "t", tmp_path / "all", Options(workers=1))
    counts = {"checked": 504, "changed": 3, "unknown_documents": 1, "unknown_ids": 2, "respelled": 0}
    assert facts["loss"] == counts
    example = {"place": "corpus.jsonl:2", "text": "the 日本 fox 語", "decoded": "the  ⁇  fox  ⁇ "}
    assert json.loads((tmp_path / "all.manifest.json").read_text())["loss"] == counts | {"example": example}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the tokenizer loses text: 2 unknown ids in 1 of 504 documents")
    assert (
        "3 of 504 decoded documents (all) differ from their text; corpus.jsonl:2: 'the 日本 fox 語' decodes to" in line
    )


def test_the_sample_that_is_decoded_does_not_depend_on_workers(tokenizer_folder, tmp_path, write_jsonl, monkeypatch):
    from elas.data_prep import loss

    monkeypatch.setattr(loss, "CHECKED_CHARS", 200)
    texts = [f"number {n} of some" for n in range(2000)] + ["a\u2581b"]
    corpus = Corpus([write_jsonl([{"text": text} for text in texts])])
    found = []
    for workers in (1, 2):
        options = Options(workers=workers, task_bytes=20_000)
        found.append(tokenize_corpus(corpus, tokenizer_folder, tmp_path / str(workers), options)["loss"])
    assert found[0] == found[1] and 40 < found[0]["checked"] < 300 and found[0]["changed"] == 0


def test_a_space_mark_in_text_survives_models_from_elsewhere(tmp_path):
    """U+2581 between letters must not gain a space where the model has byte pieces and puts a space before texts."""
    from sentencepiece import SentencePieceTrainer

    (tmp_path / "t").mkdir()
    with open(tmp_path / "t" / "tokenizer.model", "wb") as model:
        options = {"vocab_size": 320, "hard_vocab_limit": False, "minloglevel": 2, "byte_fallback": True}
        options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
        SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=model, **options)
    tokenizer = load_tokenizer(tmp_path / "t")
    for text in ("a\u2581b", "\u2581a", "a\u2581", "one \u2581 two", "\u2581\u2581", " one\u2581 two"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("content", ["\0" * 5000, " \n\t" * 3000, "hi", "\u2585\u2585", "\u3000 \u00a0\n", "\0a\0"])
def test_training_on_next_to_nothing_is_refused_in_a_line(content, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(content)
    for kind in ("bpe", "unigram"):
        argv = f"prep tokenizer --input {tmp_path}/a.txt --vocab-size 400 --model-type {kind} --output {tmp_path}/t"
        assert exit_status(run, argv.split()) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1 and ("no text to train" in lines[0] or "give more text" in lines[0]), lines
    assert not (tmp_path / "t").exists()


def test_settings_digest_is_that_of_earlier_plans():
    """Finished tasks and corpora are found again by this digest, which depends on the order of the fields."""
    settings = Settings("text", "/t", "s", 5, "uint16", 1, valid_fraction=0.1, filters=[["a", {}]], deduplicate=True)
    assert Plan(settings, [], [], ["/x"], {}).identity["settings"] == "05c1d7840ef21fab"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tasks": 3}', "\udcff"])
def test_a_damaged_plan_is_refused_in_one_line(text, tmp_path, capsys):
    work = tmp_path / "all.work"
    work.mkdir()
    (work / "plan.json").write_bytes(text.encode(errors="surrogateescape"))
    assert exit_status(run, ["prep", "merge", str(tmp_path / "all")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {work}/plan.json: cannot be read (") and error.count("\n") == 1
    assert "remove the folder and start over" in error
