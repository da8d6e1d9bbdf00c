import hashlib
import json

import numpy as np
import pytest

from elas.cli import exit_status, run
from elas.data_prep import encoding_pool
from elas.data_prep.sources import Corpus, Document, held_out
from elas.data_prep.tokenize_corpus import tokenize_corpus
from elas.data_prep.tokenizer import load_tokenizer


def documents(count=60) -> list[Document]:
    return [Document(f"d{i}", f"def f{i}(x):\n\treturn x  * {i}\n" * (i % 7 + 1)) for i in range(count)]


def test_read_back_is_the_input(tokenizer_folder, tmp_path, read_back):
    facts = tokenize_corpus(documents(), tokenizer_folder, tmp_path / "new" / "all", workers=1)
    tokenizer = load_tokenizer(tokenizer_folder)
    stored = read_back(tmp_path / "new" / "all")
    assert [tokenizer.decode(ids) for ids in stored] == [d.text for d in documents()]
    assert all(ids[-1] == tokenizer.eod and tokenizer.eod not in ids[:-1] for ids in stored)
    assert facts["documents"] == 60
    assert facts["tokens"] == sum(map(len, stored))
    assert facts["bytes_in"] == sum(len(d.text.encode()) for d in documents())
    assert facts["mb_per_s"] > 0 and facts["peak_rss_mb"] > 10


def test_manifest_fits_the_files(tokenizer_folder, tmp_path):
    tokenize_corpus(documents(), tokenizer_folder, tmp_path / "all", workers=1)
    manifest = json.loads((tmp_path / "all.manifest.json").read_text())
    assert sorted(manifest["files"]) == ["all.bin", "all.idx"]
    for name, file in manifest["files"].items():
        data = (tmp_path / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    assert manifest["dtype"] == "uint16" and manifest["tokens"] * 2 == manifest["files"]["all.bin"]["bytes"]
    assert manifest["tokenizer_sha256"] == load_tokenizer(tokenizer_folder).sha256


def test_without_eod(tokenizer_folder, tmp_path, read_back):
    tokenize_corpus(documents(5), tokenizer_folder, tmp_path / "all", workers=1, append_eod=False)
    eod = load_tokenizer(tokenizer_folder).eod
    assert all(eod not in ids for ids in read_back(tmp_path / "all"))


def test_same_files_for_any_number_of_workers(tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding_pool, "BATCH_DOCUMENTS", 2)  # many more batches than the window holds
    for workers in (1, 2):
        tokenize_corpus(documents(), tokenizer_folder, tmp_path / str(workers), workers=workers)
    for end in ("bin", "idx"):
        assert (tmp_path / f"1.{end}").read_bytes() == (tmp_path / f"2.{end}").read_bytes()


def test_a_reader_that_fails_leaves_nothing_and_no_process(tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding_pool, "BATCH_DOCUMENTS", 1)

    def failing():
        yield from documents(40)
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        tokenize_corpus(failing(), tokenizer_folder, tmp_path / "all", workers=2)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_rerun_leaves_the_former_files_whole(tokenizer_folder, tmp_path, read_back):
    tokenize_corpus(documents(5), tokenizer_folder, tmp_path / "all", workers=1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def failing():
        yield from documents(1200)
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        tokenize_corpus(failing(), tokenizer_folder, tmp_path / "all", workers=1)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    tokenize_corpus(documents(6), tokenizer_folder, tmp_path / "all", workers=1)
    assert len(read_back(tmp_path / "all")) == 6


def test_held_out_split_is_disjoint_and_complete(tokenizer_folder, tmp_path, read_back):
    paths = {"valid_prefix": tmp_path / "valid", "valid_fraction": 0.25}
    facts = tokenize_corpus(documents(), tokenizer_folder, tmp_path / "train", workers=1, **paths)
    decode = load_tokenizer(tokenizer_folder).decode
    train, valid = ([decode(ids) for ids in read_back(tmp_path / side)] for side in ("train", "valid"))
    assert train == [d.text for d in documents() if not held_out(d.name, 0.25)]
    assert valid == [d.text for d in documents() if held_out(d.name, 0.25)]
    assert (facts["documents"], facts["valid_documents"]) == (len(train), len(valid))
    assert facts["documents"] + facts["valid_documents"] == 60


def test_vocabulary_decides_the_dtype(tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("elas.data_prep.tokenize_corpus.UINT16_VOCAB", 600)
    facts = tokenize_corpus(documents(3), tokenizer_folder, tmp_path / "all", workers=1)
    assert facts["dtype"] == "int32"
    assert (tmp_path / "all.bin").stat().st_size == 4 * facts["tokens"]
    assert np.fromfile(tmp_path / "all.bin", np.int32).max() < 600


def test_command_counts_what_it_skips(tokenizer_folder, tmp_path, write_jsonl, capsys):
    data = write_jsonl([{"body": "kept\n"}, {"body": ""}, b"{", b'{"body": "\xff"}', {"body": 3}])
    argv = f"prep tokenize --input {data} --field body --tokenizer {tokenizer_folder} --output {tmp_path}/all"
    assert run([*argv.split(), "--json", str(tmp_path / "facts.json")]) == 0
    facts = json.loads((tmp_path / "facts.json").read_text())
    reasons = {"malformed JSON": 1, "not UTF-8": 1, "no text in field 'body'": 1, "empty": 1}
    assert (facts["documents"], facts["skipped"], facts["skip_reasons"]) == (1, 4, reasons)
    assert json.loads((tmp_path / "all.manifest.json").read_text())["skip_reasons"] == reasons
    out = capsys.readouterr().out
    assert "documents" in out and "4" in out


def test_tokenizer_command(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some words to learn from, and some more words\n" * 20)
    argv = f"prep tokenizer --input {tmp_path}/a.txt --vocab-size 300 --output {tmp_path}/t --json {tmp_path}/f.json"
    assert run(argv.split()) == 0
    assert json.loads((tmp_path / "f.json").read_text())["vocab_size"] == 300
    assert load_tokenizer(tmp_path / "t").vocab_size == 300


MISTAKES = {
    "prep tokenise": "did you mean 'tokenize'?",
    "prep nonsense": "see elas prep --help",
    "prep tokenize --input IN --output OUT": "--tokenizer",
    "prep tokenize --input NONE --tokenizer TOK --output OUT": "no such file",
    "prep tokenize --input EMPTY --tokenizer TOK --output OUT": "no document with text",
    "prep tokenize --input IN --field body --tokenizer TOK --output OUT": "no text in field 'body'",
    "prep tokenize --input IN --tokenizer NONE --output OUT": "no tokenizer.model",
    "prep tokenize --input IN --tokenizer TOK --output OUT --workers 0": "--workers=0",
    "prep tokenize --input IN --tokenizer TOK --output OUT --workers two": "--workers",
    "prep tokenize --input IN --tokenizer TOK --output OUT --append-eod maybe": "--append-eod",
    "prep tokenize --input IN --tokenizer TOK --output OUT --valid-fraction 0.1": "--valid-output",
    "prep tokenize --input IN --tokenizer TOK --output OUT --valid-output V": "--valid-fraction",
    "prep tokenize --input IN --tokenizer TOK --output OUT --valid-output V --valid-fraction 2": "--valid-fraction=2.0",
    "prep tokenize --input IN --tokenizer TOK --output OUT --valid-output OUT --valid-fraction .1": "another prefix",
    "prep tokenize --input IN --tokenizer TOK --output OUT --valid-output OUT2 --valid-fraction 1e-9": "no document",
    "prep tokenize --input IN --tokenizer TOK --output OUT.bin": "not a file prefix",
    "prep tokenize --input IN --tokenizer TOK --output IN/under": "--output",
    "prep tokenizer --input IN --output OUT": "--vocab-size",
    "prep tokenizer --input IN --output OUT --vocab-size 999999": "give at most",
    "prep tokenizer --input IN --output IN --vocab-size 400": "cannot be made a folder",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_exit_2_with_one_line_and_write_nothing(command, tokenizer_folder, tmp_path, write_jsonl, capsys):
    out = tmp_path / "out" / "all"
    names = {"IN": write_jsonl([{"text": "words\n"}]), "EMPTY": write_jsonl([{"text": " "}], "empty.jsonl")}
    names |= {"OUT": out, "OUT2": f"{out}2", "V": f"{out}v", "NONE": tmp_path / "none", "TOK": tokenizer_folder}
    argv = command.split()
    for name in sorted(names, key=len, reverse=True):
        argv = [a.replace(name, str(names[name]), 1) if a.startswith(name) else a for a in argv]
    assert exit_status(run, argv) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: skipped")]
    assert len(error) == 1 and error[0].startswith("error: ")
    assert MISTAKES[command] in error[0]
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".jsonl"]


@pytest.mark.parametrize("command", ["prep --help", "prep tokenizer --help", "prep tokenize --help"])
def test_help_ends_in_an_example(command, capsys):
    try:
        assert run(command.split()) == 0
    except SystemExit as done:
        assert done.code == 0
    assert "elas prep toke" in capsys.readouterr().out.split("example:")[1]


def test_corpus_facts_name_the_inputs(tokenizer_folder, tmp_path, write_jsonl):
    data = write_jsonl([{"text": "a"}])
    tokenize_corpus(Corpus([data]), tokenizer_folder, tmp_path / "all", workers=1)
    source = json.loads((tmp_path / "all.manifest.json").read_text())["source"]
    assert source["inputs"] == [str(data)] and source["tokenizer"] == str(tokenizer_folder)
