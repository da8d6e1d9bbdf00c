"""Hostile input: counted or refused, with file, line and reason; nothing lost in silence."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from elas.cli import run
from elas.command import exit_status
from elas.data.tokenizer import load_tokenizer
from elas.data_prep import encoder
from elas.data_prep.sources import Corpus
from elas.data_prep.tokenize_corpus import Options, tokenize_corpus
from elas.errors import UserError


def tokenize(tokenizer, inputs, output, *more) -> tuple[dict, list[dict]]:
    """Facts of the run, and the lines of what it skipped."""
    argv = ["prep", "tokenize", "--input", str(inputs), "--tokenizer", str(tokenizer), "--output", str(output), *more]
    assert run([*argv, "--json", f"{output}.json"]) == 0
    skipped = Path(f"{output}.skipped.jsonl").read_text().splitlines()
    return json.loads(Path(f"{output}.json").read_text()), [json.loads(line) for line in skipped]


def test_every_bad_line_is_listed_with_file_line_and_reason(tokenizer_folder, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [
        b'{"text": "first"}', b"{not json", b'{"other": 1}', b'{"text": 5}', b'{"text": ""}', b'{"text": "\xff\xfe"}',
        b'{"text": "\\ud800"}', b"[]", b"", b'{"text": "nul \\u0000 inside"}', b'{"text": "last"}',
    ]  # fmt: skip
    (folder / "bad.jsonl").write_bytes(b"\n".join(lines))  # no line end at the end, either
    (folder / "empty.jsonl").write_bytes(b"")
    packed = gzip.compress(b"".join(b'{"text": "number %d"}\n' % n for n in range(20000)))
    (folder / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "cut.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\x04\x58")
    (folder / "gone.jsonl").symlink_to("nowhere")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "utf16.txt").write_bytes("café".encode("utf-16"))
    facts, skipped = tokenize(tokenizer_folder, folder, tmp_path / "all", "--workers", "2")
    found = {(row["file"], row["line"]): row["reason"] for row in skipped}
    bad = {line: reason for (file, line), reason in found.items() if file == "bad.jsonl" and line != 5}
    assert bad == {
        2: "malformed JSON", 3: "no field 'text' (it has other)", 4: "field 'text' is not text", 6: "not UTF-8",
        7: "lone surrogate", 8: "not a record",
    }  # fmt: skip
    assert found["bad.jsonl", 5] == "empty"
    assert found["empty.jsonl", None] == "holds no document"
    assert found["latin.txt", None] == "not UTF-8"
    assert found["utf16.txt", None] == "not UTF-8 text (it contains NUL bytes)"
    assert "unreadable (No such file" in found["gone.jsonl", None]
    assert "Truncated" in found["cut.jsonl.zst", None]
    (line,) = [line for file, line in found if file == "cut.jsonl.gz"]
    assert "truncated" in found["cut.jsonl.gz", line] and 5000 < line < 20000
    assert facts["documents"] == 3 + line  # what came before the cut is there
    assert facts["skipped"] == len(skipped) == sum(facts["skip_reasons"].values())


def test_an_unreadable_file_is_skipped_or_names_itself(tokenizer_folder, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "b.jsonl").chmod(0)
    facts, skipped = tokenize(tokenizer_folder, tmp_path / "*.jsonl", tmp_path / "all")
    assert facts["documents"] == 1 and "unreadable (Permission denied)" in skipped[0]["reason"]


def test_one_huge_document_stays_whole(tokenizer_folder, tmp_path):
    """200 MB in the long study; here 12 MB, past the length at which documents are cut for the tokenizer."""
    text = "".join(f"line {n} of a document without an end\n" for n in range(320_000))
    (tmp_path / "huge.jsonl").write_text(json.dumps({"text": text}) + '\n{"text": "small"}\n')
    assert len(text) > 12 * encoder.LONG_CHARS
    facts, _ = tokenize(tokenizer_folder, tmp_path / "huge.jsonl", tmp_path / "all")
    assert facts["documents"] == 2
    ids = np.fromfile(tmp_path / "all.bin", np.uint16)
    tokenizer = load_tokenizer(tokenizer_folder)
    end = int(np.flatnonzero(ids == tokenizer.eod)[0])
    assert tokenizer.decode(ids[:end].tolist()) == text


def test_a_tokenizer_without_an_end_is_refused_before_any_work(tmp_path, write_jsonl, capsys):
    from tokenizers import Tokenizer, models

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    Tokenizer(models.WordLevel({"[UNK]": 0, "word": 1}, "[UNK]")).save(str(folder / "tokenizer.json"))
    data = write_jsonl([{"text": "word"}])
    argv = f"prep tokenize --input {data} --tokenizer {folder} --output {tmp_path}/all"
    assert exit_status(run, argv.split()) == 2
    assert "no end-of-sequence token" in capsys.readouterr().err
    assert not (tmp_path / "all.work").exists()
    assert run([*argv.split(), "--append-eod", "no"]) == 0


def test_ids_outside_the_vocabulary_are_refused(tokenizer_folder, tmp_path, write_jsonl, monkeypatch):
    corpus = Corpus([write_jsonl([{"text": "some words"}])])
    from elas.data import tokenizer

    monkeypatch.setattr(tokenizer.SentencePieceTokenizer, "encode_batch", lambda self, texts: [[1, 600]])
    with pytest.raises(
        UserError, match=r"produces id 600 between corpus.jsonl:1 and corpus.jsonl:1, outside .* of 600"
    ):
        tokenize_corpus(corpus, tokenizer_folder, tmp_path / "all", Options(workers=1))


@pytest.fixture
def tokens(tokenizer_folder, tmp_path, write_jsonl) -> Path:
    corpus = Corpus([write_jsonl([{"text": f"number {n}"} for n in range(50)])])
    tokenize_corpus(corpus, tokenizer_folder, tmp_path / "all", Options(workers=1))
    return tmp_path / "all"


def verified(prefix) -> dict:
    status = run(["prep", "verify", str(prefix), "--json", f"{prefix}.report.json"])
    report = json.loads(Path(f"{prefix}.report.json").read_text())
    assert report["ok"] == (status == 0)
    return report


def test_verify_finds_every_flipped_or_lost_byte(tokens):
    report = verified(tokens)
    assert report["ok"] and report["files"] == 2 and report["bad"] == []
    for end in (".bin", ".idx"):
        path = Path(f"{tokens}{end}")
        whole = path.read_bytes()
        for position in (0, 9, 20, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
            assert not verified(tokens)["ok"], (end, position)
        for kept in (0, 10, len(whole) - 1):
            path.write_bytes(whole[:kept])
            assert not verified(tokens)["ok"], (end, kept)
        path.unlink()
        assert not verified(tokens)["ok"]
        path.write_bytes(whole)
    assert verified(tokens)["ok"]
    Path(f"{tokens}.manifest.json").write_text("{")
    assert "manifest.json" in verified(tokens)["bad"][0]["why"]


def test_verify_reads_the_files_that_it_is_given(tokenizer_folder, tmp_path, write_jsonl):
    """Copies and renamed corpora, of the trained-on and the held-out side: neither vouched for by the original."""
    corpus = Corpus([write_jsonl([{"text": f"number {n}"} for n in range(50)])])
    (tmp_path / "made").mkdir()
    made = [tmp_path / "made" / side for side in ("train", "valid")]
    tokenize_corpus(corpus, tokenizer_folder, made[0], Options(workers=1, valid_output=made[1], valid_fraction=0.3))
    ends = (".bin", ".idx", ".manifest.json")
    for source in made:
        for copy in (tmp_path / "made" / f"{source.name}-copy", tmp_path / "other.v1"):
            for end in ends:
                shutil.copy(f"{source}{end}", f"{copy}{end}")
            assert verified(copy)["ok"], "a good copy"
            for end in (".bin", ".idx"):
                whole = Path(f"{copy}{end}").read_bytes()
                Path(f"{copy}{end}").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
                (bad,) = [row["why"] for row in verified(copy)["bad"] if "SHA-256" in row["why"]]
                assert bad.startswith(f"{copy}{end}: "), "the damaged copy by its own name"
                assert verified(source)["ok"]
                Path(f"{copy}{end}").write_bytes(whole)
    for end in ends:  # renamed, and the original gone
        Path(f"{made[0]}{end}").rename(f"{tmp_path / 'renamed'}{end}")
    assert verified(tmp_path / "renamed")["ok"] and not verified(made[0])["ok"]


def test_verify_looks_at_the_tokens_themselves(tokens):
    """Where a manifest fits the files, but the files do not hold what they should."""
    import hashlib

    ids = np.fromfile(f"{tokens}.bin", np.uint16)
    ends = np.flatnonzero(ids == ids[-1])
    ids[0], ids[ends[3]] = 700, 5
    ids.tofile(f"{tokens}.bin")
    manifest = json.loads(Path(f"{tokens}.manifest.json").read_text())
    manifest["files"]["all.bin"]["sha256"] = hashlib.sha256(ids.tobytes()).hexdigest()
    Path(f"{tokens}.manifest.json").write_text(json.dumps(manifest | {"tokens": 1}))
    why = " ".join(row["why"] for row in verified(tokens)["bad"])
    assert "1 ids outside the vocabulary" in why and "1 documents do not end" in why and "the manifest says 1" in why


def test_info_tells_lengths_sources_and_documents(tokens, capsys):
    assert run(["prep", "info", str(tokens), "--documents", "2", "--json", f"{tokens}.info.json"]) == 0
    facts = json.loads(Path(f"{tokens}.info.json").read_text())
    assert facts["documents"] == 50 and sum(count for *_, count in facts["histogram"]) == 50
    assert [text for *_, text in facts["samples"]] == ["number 0", "number 25"]
    (source,) = facts["sources"].values()
    assert source["documents"] == 50 and source["tokens"] == facts["tokens"]
    out = capsys.readouterr().out
    assert "50 documents" in out and "number 25" in out


def test_help_of_every_command(capsys):
    for name in ("verify", "info", "merge"):
        done = subprocess.run(
            [sys.executable, "-m", "elas.cli", "prep", name, "--help"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 and f"elas prep {name} data/train" in done.stdout.split("example:")[1]


@pytest.mark.parametrize("change", ["emptied", "removed", "rewritten"])
def test_an_input_that_changes_during_the_run_ends_it_by_name(tokenizer_folder, tmp_path, monkeypatch, change):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(50)))
    corpus, last = Corpus([folder]), folder / "b.jsonl"
    if change == "removed":
        last.unlink()
    else:
        last.write_text("" if change == "emptied" else last.read_text().replace("b", "c"))
        os.utime(last, ns=(1, 1))
    with pytest.raises(UserError, match=r"b\.jsonl: changed since the work was planned"):
        tokenize_corpus(corpus, tokenizer_folder, tmp_path / "out" / "all", Options(workers=1, task_bytes=500))
    assert not (tmp_path / "out" / "all.bin").exists()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:10])])
def test_finished_work_without_its_files_is_not_complete(tokenizer_folder, tmp_path, write_jsonl, damage):
    corpus = Corpus([write_jsonl([{"text": "some text"}] * 9)])
    tokenize_corpus(corpus, tokenizer_folder, tmp_path / "all")
    assert tokenize_corpus(corpus, tokenizer_folder, tmp_path / "all")["already_done"]
    damage(tmp_path / "all.bin")
    with pytest.raises(UserError, match=r"all\.bin is missing or truncated; give --overwrite"):
        tokenize_corpus(corpus, tokenizer_folder, tmp_path / "all")
    tokenize_corpus(corpus, tokenizer_folder, tmp_path / "all", Options(overwrite=True))


def test_links_are_followed_once_and_pipes_are_passed_over(tmp_path, write_jsonl):
    (tmp_path / "other").mkdir()
    write_jsonl([{"text": "one"}], "other/a.jsonl")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "more").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(folder)
    os.mkfifo(folder / "pipe.jsonl")
    corpus = Corpus([folder])
    assert [file.name for file in corpus.files] == ["more/a.jsonl"] and corpus.ignored["not a regular file"] == 1
    with pytest.raises(UserError, match="not a regular file"):
        Corpus([folder / "pipe.jsonl"])
    (folder / "b.parquet.zst").write_bytes(b"")
    assert len(Corpus([folder]).files) == 1
    with pytest.raises(UserError, match="decompress it first"):
        Corpus([folder / "b.parquet.zst"])


def test_a_cut_file_is_named_among_many_empty_documents(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"other": 1}\n' * 50)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 9999)[:50])
    assert list(Corpus([tmp_path])) is not None
    printed = capsys.readouterr().err
    assert "b.jsonl.gz" in printed and "are only counted" in printed and len(printed.splitlines()) < 12


def test_a_tokenizer_is_not_replaced_by_chance(tokenizer_folder, tmp_path, sources, capsys):
    argv = ["prep", "tokenizer", "--input", *sources, "--vocab-size", "400", "--output", str(tmp_path)]
    assert exit_status(run, argv) == 0
    assert exit_status(run, argv) == 2 and "--overwrite" in capsys.readouterr().err
    assert exit_status(run, [*argv, "--overwrite"]) == 0


def test_a_ray_that_is_not_there_is_told_at_once(tokenizer_folder, tmp_path, write_jsonl, monkeypatch):
    pytest.importorskip("ray")
    corpus = Corpus([write_jsonl([{"text": "x"}])])
    for address, expected in (("garbage", "not an address"), ("127.0.0.1:9", "no connection")):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UserError, match=expected):
            tokenize_corpus(corpus, tokenizer_folder, tmp_path / "all", Options(executor="ray"))
