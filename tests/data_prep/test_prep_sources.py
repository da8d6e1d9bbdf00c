import gzip
import json

import pytest

from elas.data_prep.sources import Corpus, held_out, stdlib_corpus
from elas.errors import UserError


def texts(corpus):
    return [document.text for document in corpus]


def test_reads_every_kind_and_passes_over_the_rest_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n")
    (tmp_path / "b.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    (tmp_path / "c.jsonl").write_text('{"text": "two"}\n\n{"text": "three"}\n')
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "four"}\n'))
    (tmp_path / "e.md").write_text("five")
    (tmp_path / ".git").mkdir()
    corpus = Corpus([tmp_path])
    assert texts(corpus) == ["one\r\n", "# -*- coding: latin-1 -*-\nx = 'é'\n", "two", "three", "four"]
    assert corpus.ignored == {".md": 1, ".git/": 1}
    assert corpus.skipped.total == 0
    assert texts(Corpus([tmp_path], suffixes=["md"]))[-1] == "five"


def test_bad_input_is_skipped_counted_and_named(tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_bytes(
        b'{"text": "good"}\n{"text": \n{"text": "\xff"}\n{"other": 1}\n[1]\n'
        b'{"text": "\\ud800"}\n{"text": "\\ud83d\\ude00"}\n'
    )
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 9)[:-9])
    (tmp_path / "not.jsonl.gz").write_bytes(b"plain")
    corpus = Corpus([tmp_path])
    assert [t for t in texts(corpus) if t != "x"] == ["good", "😀"]
    reasons = dict(corpus.skipped.reasons)
    expected = {"malformed JSON": 1, "not UTF-8": 2, "no field 'text'": 1, "not a record": 1}
    expected |= {"lone surrogate": 1}
    assert {key: reasons.pop(key) for key in expected} == expected
    assert reasons == {"damaged or truncated from here on": 2}
    warnings = capsys.readouterr().err.splitlines()
    assert warnings[0] == "warning: skipped bad.jsonl:2: malformed JSON"
    assert len(warnings) == 8  # each named
    texts(corpus)
    assert corpus.skipped.total == 8  # a second pass counts afresh


def test_overlapping_inputs_are_read_once_under_the_same_names(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place / "sub").mkdir(parents=True)
        (tmp_path / place / "sub" / "a.txt").write_text(place)
    corpus = Corpus([tmp_path / "here", f"{tmp_path}/here/**/*.txt", tmp_path / "here/sub/a.txt"])
    assert texts(corpus) == ["here"]
    names = [[d.name for d in Corpus([given])] for given in (tmp_path / "here", f"{tmp_path}/there/**/*.txt")]
    assert names == [["sub/a.txt"], ["sub/a.txt"]]


@pytest.mark.parametrize("given", ["missing.txt", "no*match.txt", "folder", "odd.xyz"])
def test_inputs_that_cannot_be_read_are_named(tmp_path, given):
    (tmp_path / "folder").mkdir()
    (tmp_path / "odd.xyz").touch()
    with pytest.raises(UserError, match=r"--input .*" + given.split("*")[-1]):
        Corpus([tmp_path / given])


def test_stdlib_is_sorted_and_without_installed_packages():
    corpus = stdlib_corpus()
    names = [file.name for file in corpus.files]
    assert names == sorted(names)
    assert json.__name__ + "/__init__.py" in names
    assert not any("site-packages" in file.path for file in corpus.files)


def test_held_out_takes_about_its_fraction_and_grows_with_it():
    names = [f"file{i}.py" for i in range(5000)]
    small, large = ({n for n in names if held_out(n, f)} for f in (0.02, 0.1))
    assert small < large
    # 5000 draws at 0.1: mean 500, standard deviation 21; six of those.
    assert abs(len(large) - 500) < 130
    assert not any(held_out(n, 0.0) for n in names)


TEXTS = [f'text {i}, with "quotes", commas\nand lines\t{"é😀" * (i % 3)}' for i in range(700)]


def write_all_kinds(folder):
    import csv

    import pyarrow
    import pyarrow.parquet

    records = "".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(TEXTS)).encode()
    (folder / "a.jsonl").write_bytes(records)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(records))
    half = len(records) // 2  # two frames, as parallel compressors write them
    frames = [pyarrow.compress(part, codec="zstd", asbytes=True) for part in (records[:half], records[half:])]
    (folder / "c.jsonl.zst").write_bytes(b"".join(frames))
    for name, dialect in (("d.csv", "excel"), ("e.tsv", "excel-tab")):
        with open(folder / name, "w", newline="") as file:
            csv.writer(file, dialect).writerows([["id", "body"], *([i, text] for i, text in enumerate(TEXTS))])
    table = pyarrow.table({"id": range(len(TEXTS)), "body": TEXTS})
    pyarrow.parquet.write_table(table, folder / "f.parquet", row_group_size=100)


def test_every_kind_holds_the_same_documents(tmp_path):
    write_all_kinds(tmp_path)
    corpus = Corpus([tmp_path], field="body")
    found = list(corpus)
    assert [document.text for document in found] == TEXTS * 6
    assert found[0].name == "a.jsonl:1"
    assert corpus.skipped.total == 0


@pytest.mark.parametrize("size", [1000, 9000, 10**9])
def test_pieces_are_the_whole_and_none_twice(tmp_path, size):
    write_all_kinds(tmp_path)
    corpus = Corpus([tmp_path], field="body")
    pieces = list(corpus.pieces(size))
    found = [d.text for index, piece, _ in pieces for d in corpus.read(corpus.files[index], piece)]
    assert found == TEXTS * 6
    assert (len(pieces) > 6) == (size < 10**9)


def test_a_dataset_is_streamed_shard_by_shard(tmp_path):
    for shard in range(3):
        rows = [{"text": text} for text in TEXTS[shard * 10 : shard * 10 + 10]]
        (tmp_path / f"{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = Corpus([f"hf://{tmp_path}:train"])
    assert texts(corpus) == TEXTS[:30]
    pieces = list(corpus.pieces(100))
    assert [piece for _, piece, _ in pieces] == [(0, 1), (1, 2), (2, 3)]
    assert [d.text for index, piece, _ in pieces for d in corpus.read(corpus.files[index], piece)] == TEXTS[:30]


def test_what_is_wrong_in_tables_is_named(tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.csv").write_bytes(b'text,id\ngood,1\n\xff,2\nshort\n"open"quote,3\nlast,4\n')
    (tmp_path / "b.csv").write_text("other,id\nx,1\n")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 is no Parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None, "two"]}), tmp_path / "d.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "e.parquet")
    (tmp_path / "f.csv").write_bytes(b"")
    corpus = Corpus([tmp_path])
    assert texts(corpus) == ["good", "last", "one", "two"]
    corpus.skipped.NAMED = 99
    err = capsys.readouterr().err
    assert (
        "a.csv:3: not UTF-8" in err
        and "a.csv:4: wrong number of columns (1 instead of 2)" in err
        and "a.csv:5: malformed CSV" in err
    )
    assert "b.csv:1: no column 'text'" in err
    assert corpus.skipped.reasons["the column holds no text"] == 3
    assert corpus.skipped.reasons["holds no document"] == 1
    assert corpus.skipped.total == 9


def test_lines_longer_than_a_document_may_be_are_passed_over(tmp_path, monkeypatch):
    from elas.data_prep import readers

    monkeypatch.setattr(readers, "MAX_DOCUMENT", 100)
    lines = [{"text": "a"}, {"text": "x" * 500}, {"text": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "b.txt").write_text("y" * 101)
    corpus = Corpus([tmp_path])
    assert texts(corpus) == ["a", "b"]
    assert corpus.skipped.reasons == {"larger than 100 bytes": 2}
    for size in (50, 200):  # cut within the long line, too
        assert [d.text for i, p, _ in corpus.pieces(size) for d in corpus.read(corpus.files[i], p)] == ["a", "b"]
