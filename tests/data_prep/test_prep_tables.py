"""CSV, TSV and Parquet as their users write them: rows whole, mistakes by their first line, memory by bytes."""

import json
import os
import subprocess
import sys

import pytest

from elas.cli import run
from elas.command import exit_status
from elas.data_prep import delimited
from elas.data_prep.sources import Corpus

BROKEN = {
    "unclosed to the end": (
        'id,text\n1,one\n2,"open\n3,three\n4,four\n',
        [(2, "one"), (4, "three"), (5, "four")],
        {3: "a quote that is never closed"},
    ),
    "closed by the next row's quote": (
        'id,text\n2,"open\n3,"three"\n4,four\n',
        [(3, "three"), (4, "four")],
        {2: "',' expected after '\"'"},
    ),
    "lines of a broken record are no rows": (
        'id,text\n5,"with "bad" quotes\nsecond line, more\nthird"\n6,six\n7,seven\n',
        [(5, "six"), (6, "seven")],
        {2: "',' expected after '\"', lines 2 to 4"},
    ),
    "cut off within a record": (
        'id,text\r\n1,"a\r\nb"\r\n2,"a long text\r\nof several lines\r\nand no end',
        [(2, "a\r\nb")],
        {4: "a quote that is never closed, lines 4 to 6"},
    ),
    "every other row": (
        'id,text\n1,"a "b" c"\n2,two\n3,"a "b" c"\n4,four\n5,"a "b" c"\n',
        [(3, "two"), (5, "four")],
        dict.fromkeys((2, 4, 6), "',' expected after '\"'"),
    ),
    "in the header": ('"id"x,text\n1,one\n', [], {1: "',' expected after '\"', lines 1 to 2"}),
}


def read(path, field="text", form=None) -> tuple[list, dict]:
    skipped = {}
    (file,) = Corpus([path], field=field, form=form).files
    rows = delimited.read_table(str(path), file.kind, field, lambda why, line: skipped.update({line: why}), 10**6)
    return list(rows), skipped


@pytest.mark.parametrize("case", BROKEN)
def test_broken_csv_rows_are_named_and_later_ones_read(tmp_path, case):
    data, rows, skipped = BROKEN[case]
    (tmp_path / "a.csv").write_bytes(data.encode())
    found = read(tmp_path / "a.csv")
    assert found == (rows, {line: f"malformed CSV ({why})" for line, why in skipped.items()})


def test_csv_text_with_line_ends_is_whole_in_any_task_size(tmp_path):
    texts = [f'row {n}:\n"quoted", and\n\n{n},more\n' for n in range(200)]
    quoted = "".join('{},"{}"\n'.format(n, text.replace('"', '""')) for n, text in enumerate(texts))
    (tmp_path / "a.csv").write_text("id,text\n" + quoted)
    corpus = Corpus([tmp_path])
    for size in (10, 1000, 10**6):
        documents = [d for i, piece, _ in corpus.pieces(size) for d in corpus.read(corpus.files[i], piece)]
        assert [document.text for document in documents] == texts
    assert [document.name for document in documents[:3]] == ["a.csv:2", "a.csv:7", "a.csv:12"]  # first lines


TSV = {
    "quotes are text": ('id\ttext\n1\t"Start\n2\ttwo\n', "tsv", ['"Start', "two"]),
    "both ends too": (
        'id\ttext\r\n1\t"He said"\r\n2\t5" disk\r\n3\t"a\r\n4\tb"\r\n',
        "tsv",
        ['"He said"', '5" disk', '"a', 'b"'],
    ),
    "lone returns are text": ("id\ttext\n1\ta\rb\n", "tsv", ["a\rb"]),
    "as Excel quotes lines": ('id\ttext\n1\t"a\nb"\n2\ttwo\n', "tsv-quoted", ["a\nb", "two"]),
    "as pandas quotes quotes": ('id\ttext\n1\t"He said ""x"""\n2\ttwo\n', "tsv-quoted", ['He said "x"', "two"]),
}


@pytest.mark.parametrize("case", TSV)
def test_tsv_is_lines_unless_it_is_quoted_throughout(tmp_path, case):
    data, kind, expected = TSV[case]
    (tmp_path / "a.tsv").write_bytes(data.encode())
    corpus = Corpus([tmp_path])
    assert corpus.files[0].kind == kind and bool(corpus.notes) == (kind != "tsv")
    assert [text for _, text in read(tmp_path / "a.tsv")[0]] == expected
    rows, _ = read(tmp_path / "a.tsv", form="tsv")
    assert rows[0][1] == data.splitlines()[1].split("\t")[1] or "\r" in data


def test_a_row_that_is_too_large_is_passed_over(tmp_path):
    skipped = []
    (tmp_path / "a.csv").write_text("id,text\n1,one\n2," + "x" * 5000 + "\n3,three\n4,four\n")
    rows = delimited.read_table(str(tmp_path / "a.csv"), "csv", "text", lambda *why: skipped.append(why), 1000)
    assert list(rows) == [(2, "one"), (4, "three"), (5, "four")]
    assert skipped == [("larger than 1,000 bytes", 3)]


MEASURE = """
import sys
from elas.data_prep.memory import peak_rss_mb
from elas.data_prep.sources import Corpus
import pyarrow.parquet, pyarrow.compute
from elas.data_prep import parquet
corpus = Corpus(sys.argv[1:])
for field in corpus.files: parquet.columns(field.path)
before = peak_rss_mb()
count = sum(len(document.text) for document in corpus)
print(count, peak_rss_mb() - before)
"""


def test_parquet_memory_goes_by_bytes_not_rows(tmp_path):
    """40 rows of 2 MB, four a row group: all at once 80 MB, and PyArrow would hold them four times; a group is 8 MB."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [os.urandom(1_000_000).hex() for _ in range(40)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "a.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    count, grown = done.stdout.split()
    assert int(count) == 80_000_000
    assert float(grown) < 80, f"{grown} MB"


def test_a_file_of_large_pages_is_warned_of(tmp_path):
    import pyarrow
    import pyarrow.parquet

    from elas.data_prep import parquet

    table = pyarrow.table({"text": [os.urandom(500_000).hex() for _ in range(24)], "id": range(24)})
    pyarrow.parquet.write_table(table, tmp_path / "one.parquet")
    pyarrow.parquet.write_table(table, tmp_path / "many.parquet", row_group_size=2)
    one, many = (parquet.required_memory(str(tmp_path / f"{name}.parquet"), "text") for name in ("one", "many"))
    assert 50e6 < one < 60e6 and 11e6 < many < 14e6  # twice 24 MB, and twice 2 MB, and a batch of 8 MB
    assert parquet.required_memory(str(tmp_path / "one.parquet"), "id") < 11e6


def test_a_missing_column_is_named_once_a_file(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({"body": ["x"] * 50, "meta": [{"a": 1}] * 50}), tmp_path / "a.parquet", row_group_size=5
    )
    corpus = Corpus([tmp_path])
    skipped = []
    for index, piece, _ in corpus.pieces(1):
        list(corpus.read(corpus.files[index], piece))
    skipped = corpus.skipped.reasons
    assert dict(skipped) == {"no column 'text'": 1}
    ((file, why),) = corpus.without_column()
    assert (file.name, why) == ("a.parquet", "no column 'text' (it has body, meta.a)")


def tokenize(capsys, tokenizer, folder, output, *more) -> tuple[int, list[str]]:
    command = [
        "prep",
        "tokenize",
        "--input",
        str(folder),
        "--tokenizer",
        str(tokenizer),
        "--output",
        str(output),
        *more,
    ]
    status = exit_status(run, command)
    return status, capsys.readouterr().err.splitlines()


def test_a_corpus_that_lacks_the_column_is_refused_before_work(tokenizer_folder, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name, column in (("a", "text"), ("b", "text"), ("c", "body")):
        (tmp_path / "in" / f"{name}.csv").write_text(f"id,{column}\n" + "1,some words\n" * 20)
    (tmp_path / "in" / "empty.txt").write_text("")  # of no weight, and no reason to count files instead of bytes
    status, err = tokenize(capsys, tokenizer_folder, tmp_path / "in", tmp_path / "all")
    assert status == 2 and len(err) == 1 and not (tmp_path / "all.work").exists()
    assert err[0] == (
        "error: --field='text': missing in 1 of 4 files, 33% of the corpus; c.csv: no column 'text' (it has id, body); "
        f"name the text with --field or --input {tmp_path}/in/c.csv:FIELD, or accept the loss with --max-skipped 1"
    )
    status, err = tokenize(capsys, tokenizer_folder, tmp_path / "in", tmp_path / "all", "--max-skipped", "0.4")
    assert status == 0 and err[-1].startswith("warning: 33.3% of the corpus could not be read; ")
    manifest = json.loads((tmp_path / "all.manifest.json").read_text())
    assert manifest["skipped"] == 2 and abs(manifest["unread_share"] - 1 / 3) < 1e-6


def test_records_that_lack_the_field_are_refused_at_the_end(tokenizer_folder, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name, key in (("a", "text"), ("b", "text"), ("c", "body")):
        (tmp_path / "in" / f"{name}.jsonl").write_text(f'{{"{key}": "some words"}}\n' * 30)
    status, err = tokenize(capsys, tokenizer_folder, tmp_path / "in", tmp_path / "all")
    assert status == 2 and not (tmp_path / "all.bin").exists()
    assert err[-1].startswith("error: --max-skipped=0.25: 33.3% of the corpus was not read, for example in c.jsonl: ")
    assert (
        f"no field 'text' (it has body); name the text with --field or --input {tmp_path}/in/c.jsonl:FIELD" in err[-1]
    )
    listed = (tmp_path / "all.work" / "skipped.jsonl").read_text().splitlines()
    assert len(listed) == 30 and json.loads(listed[0])["file"] == "c.jsonl"
    report = ["--json", f"{tmp_path}/facts.json"]
    status, err = tokenize(capsys, tokenizer_folder, tmp_path / "in", tmp_path / "all", "--max-skipped", "1", *report)
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert status == 0 and facts["tasks_done_before"] == facts["tasks"]
    assert (facts["documents"], facts["skipped"]) == (60, 30)


def test_damage_is_refused_only_beyond_a_bound_that_was_given(tokenizer_folder, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "fine"}\n{"text": ""}\n{broken}\n{broken}\n')
    status, err = tokenize(capsys, tokenizer_folder, tmp_path / "in", tmp_path / "all")
    assert status == 0 and err[-1].startswith("warning: 50.0% of the corpus could not be read")
    for few, status in ((99, 0), (100, 2)):  # records without the field among others of their file
        (tmp_path / "in" / "a.jsonl").write_text('{"text": "fine"}\n' + '{"body": "x"}\n' * few)
        assert tokenize(capsys, tokenizer_folder, tmp_path / "in", tmp_path / f"{few}")[0] == status
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "fine"}\n{broken}\n')
    status, err = tokenize(capsys, tokenizer_folder, tmp_path / "in", tmp_path / "other", "--max-skipped", "0.4")
    assert status == 2 and "50.0% of the corpus was not read" in err[-1] and "malformed JSON" in err[-1]
    status, err = tokenize(capsys, tokenizer_folder, tmp_path / "in", tmp_path / "other", "--max-skipped", "5")
    assert status == 2 and "--max-skipped=5.0" in err[-1]
