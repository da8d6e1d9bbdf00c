"""Inputs as users name them: what elas wrote among them, fields, globs, names, formats that names do not show."""

import bz2
import gzip
import json
import lzma
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elas.cli import run
from elas.data_prep.executors import finished_tasks
from elas.data_prep.sources import Corpus
from elas.errors import UserError


def texts(corpus) -> list[str]:
    return [document.text for document in corpus]


def jsonl(path: Path, records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_results_below_an_input_are_never_input(tokenizer_folder, tmp_path):
    """Killed and started again with the output in the input's folder; then once more, and for another output."""
    folder = tmp_path / "D"
    lines = [{"text": f"document {n} " + "of many words " * (n % 40)} for n in range(4000)]
    for part in range(3):
        jsonl(folder / f"{part}.jsonl", [*lines[part::3], {"other": 1}])
    what = ["prep", "tokenize", "--tokenizer", str(tokenizer_folder), "--json", f"{folder}/facts.json"]
    what += ["--valid-output", f"{folder}/valid", "--valid-fraction", "0.1", "--task-bytes", "40000", "--workers", "1"]
    command = [*what, "--input", str(folder), "--output", f"{folder}/train"]
    process = subprocess.Popen([sys.executable, "-m", "elas.cli", *command], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not finished_tasks(folder / "train.work"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run(command) == 0
    first = json.loads((folder / "facts.json").read_text())
    assert first["tasks_done_before"] > 0 and first["documents"] + first["valid_documents"] == 4000
    assert first["skipped"] == 3
    assert run(command) == 0 and "tasks" not in json.loads((folder / "facts.json").read_text())  # nothing to do
    run(["prep", "tokenizer", "--input", f"{folder}/0.jsonl", "--vocab-size", "300", "--output", f"{folder}/tok"])
    run(["prep", "verify", f"{folder}/train", "--json", f"{folder}/verified.json"])
    as_shells_do = [str(path) for path in sorted(folder.glob("*")) if not path.name.startswith(".")]
    for inputs in ([folder], [f"{folder}/*.jsonl"], [f"{folder}/*"], [f"{folder}/**"], as_shells_do):
        corpus = Corpus(inputs)
        assert [file.name for file in corpus.files] == ["0.jsonl", "1.jsonl", "2.jsonl"], inputs
        assert corpus.ignored["written by elas prep"]
    with pytest.raises(UserError, match="contains only output of elas prep"):
        Corpus([folder / "train.skipped.jsonl", folder / "tok"])


def test_work_begun_below_an_input_is_never_input(tmp_path):
    """Also reached by a recursive glob; folders and files of users that only look like ours by name are read."""
    jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    for folder in ("out.work", "mine.work"):
        jsonl(tmp_path / folder / "parts" / "00000.skipped.jsonl", [{"text": folder}])
    (tmp_path / "out.work" / "lock").touch()
    jsonl(tmp_path / "b.skipped.jsonl", [{"text": "b"}])
    jsonl(tmp_path / "c.skipped.jsonl", [{"file": "x", "line": 1, "reason": "empty"}])
    for given in (tmp_path, f"{tmp_path}/**/*.jsonl"):
        assert texts(Corpus([given])) == ["a", "b", "mine.work"]


def test_same_names_are_told_apart(tokenizer_folder, tmp_path):
    given = [jsonl(tmp_path / folder / "part-0.jsonl", [{"text": folder}, {"no": 1}]) for folder in ("s0", "s1")]
    jsonl(tmp_path / "s1" / "x" / "a.jsonl", [{"text": "other"}])
    argv = ["prep", "tokenize", "--input", *map(str, given), str(tmp_path / "s1"), "--output", str(tmp_path / "all")]
    assert run([*argv, "--tokenizer", str(tokenizer_folder)]) == 0
    skipped = [json.loads(line) for line in (tmp_path / "all.skipped.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in skipped] == [("s0/part-0.jsonl", 2), ("s1/part-0.jsonl", 2)]
    files = json.loads((tmp_path / "all.manifest.json").read_text())["source"]["files"]
    assert [name for name, *_ in files] == ["s0/part-0.jsonl", "s1/part-0.jsonl", "x/a.jsonl"]
    for folder in ("s0", "s1"):
        jsonl(tmp_path / folder / "x" / "a.jsonl", [{"text": folder}])
    names = [file.name for file in Corpus([tmp_path / "s0", tmp_path / "s1"]).files]
    assert len(set(names)) == len(names) == 4 and "s0/x/a.jsonl" in names


def test_globs_read_what_the_shell_would_make_of_them(tmp_path):
    jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    jsonl(tmp_path / "sub" / "deep" / "b.jsonl", [{"text": "b"}])
    jsonl(tmp_path / "out.jsonl" / "part-0.jsonl", [{"text": "c"}])  # a folder, as Spark makes them
    quoted, unquoted = Corpus([f"{tmp_path}/*"]), Corpus(sorted(tmp_path.glob("*")))
    assert texts(quoted) == texts(unquoted) == ["a", "c", "b"]
    assert [file.name for file in quoted.files] == ["a.jsonl", "out.jsonl/part-0.jsonl", "sub/deep/b.jsonl"]
    assert texts(Corpus([f"{tmp_path}/*.jsonl"])) == ["a", "c"]


RECORDS = [{"text": "one", "url": "u"}, {"text": "two [{,", "url": "v"}, {"text": "é😀\n", "url": "w"}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


@pytest.mark.parametrize(
    ("name", "data"),
    {
        "c4-train.00000-of-01024.json.gz": gzip.compress(LINES),
        "a.json": LINES,
        "a.json.bz2": bz2.compress(LINES),
        "A.JSONL.XZ": lzma.compress(LINES),
        "A.Json.GZ": gzip.compress(LINES),
        "b.jsonl": gzip.compress(LINES),  # compressed, and the name does not say so
        "array.json": json.dumps(RECORDS).encode(),
        "laid-out.json": json.dumps(RECORDS, indent=2).encode(),
        "objects.json.gz": gzip.compress("\n".join(json.dumps(r, indent=1) for r in RECORDS).encode()),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_json_is_read_by_content_under_any_name(tmp_path, name, data):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(data)
    for given in (tmp_path / "in", tmp_path / "in" / name, f"{tmp_path}/in/*"):
        corpus = Corpus([given])
        assert texts(corpus) == [record["text"] for record in RECORDS] and corpus.skipped.total == 0
        pieces = [d.text for i, piece, _ in corpus.pieces(20) for d in corpus.read(corpus.files[i], piece)]
        assert pieces == texts(corpus)
    assert texts(Corpus([f"{tmp_path / 'in' / name}:url"])) == ["u", "v", "w"]


def test_advice_for_unknown_names_works_when_followed(tmp_path):
    (tmp_path / "part-00000").write_bytes(LINES)
    (tmp_path / "x.dat.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "notes.md").write_text("# words")
    for name in ("part-00000", "x.dat.gz"):
        with pytest.raises(UserError, match="looks like JSON lines; add --format jsonl"):
            Corpus([tmp_path / name])
        assert len(texts(Corpus([tmp_path / name], form="jsonl"))) == 3
    with pytest.raises(
        UserError, match=r"add --format text to read every input as text, or --suffix \.md to read only \.md"
    ):
        Corpus([tmp_path / "notes.md"])
    assert texts(Corpus([tmp_path / "notes.md"], suffixes=[".md"])) == ["# words"]
    assert texts(Corpus([tmp_path / "notes.md"], form="text")) == ["# words"]
    for name in ("a.zip", "a.tar.gz", "a.jsonl.lz4"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match="unpack it first"):
            Corpus([tmp_path / name])
    for suffix, fix in ((".gz", "the suffix before it"), (".json", "--format text"), ("jsonl", "--format text")):
        with pytest.raises(UserError, match=fix):
            Corpus([tmp_path / "notes.md"], suffixes=[suffix])
    (tmp_path / "lines.txt").write_bytes(LINES)
    (note,) = Corpus([tmp_path / "lines.txt"]).notes
    assert "lines.txt: is read as text but looks like JSON lines; add --format jsonl to read its records" in note


def test_json_that_holds_no_records_is_refused_or_passed_over(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": "x", "layers": [1]}, indent=2))
    (tmp_path / "vocab.json").write_text(json.dumps({"text": 5, "a": 1}))
    (tmp_path / "doc.json").write_text(json.dumps({"id": 1, "text": "one\ndocument"}, indent=2))
    corpus = Corpus([tmp_path])
    assert texts(corpus) == ["one\ndocument"] and corpus.ignored == {".json without 'text'": 2}
    with pytest.raises(UserError, match=r"a single JSON object with no field 'text' \(it has model, layers\)"):
        Corpus([tmp_path / "config.json"])
    (tmp_path / "cut.json").write_text('[{"text": "whole"},\n {"text": "cu')
    (tmp_path / "bad.json").write_text('[{"text": "good"}, {"text": bad}, {"text": "lost"}]' + " " * 100)
    corpus = Corpus([tmp_path / "cut.json", tmp_path / "bad.json"])
    assert texts(corpus) == ["whole", "good"]
    assert corpus.skipped.reasons == {"malformed JSON from here on": 2}


def test_fields_may_be_nested_and_differ_by_input(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"content": "p", "meta": {"text": "q", "deep": {"x": "r"}}}, {"content": "s", "meta": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    jsonl(tmp_path / "b:c.jsonl", [{"text": "t", "meta": {"text": "u"}, "meta.deep.x": "dotted"}, {"meta": {}}])
    (tmp_path / "d.csv").write_text("id,body\n1,v\n")
    corpus = Corpus(
        [
            f"{tmp_path}/a.parquet:content",
            tmp_path / "b:c.jsonl",
            f"{tmp_path}/*.csv:body",
            f"{tmp_path}/b:c.jsonl:meta.text",
        ]
    )
    assert texts(corpus) == ["p", "s", "t", "v", "u"]
    assert len({file.name for file in corpus.files}) == 4
    nested = Corpus([tmp_path / "a.parquet", tmp_path / "b:c.jsonl"], field="meta.text")
    assert texts(nested) == ["q", "u"]
    assert nested.skipped.reasons == {"the column holds no text": 1, "no field 'meta.text'": 1}
    assert texts(Corpus([tmp_path / "a.parquet", tmp_path / "b:c.jsonl"], field="meta.deep.x")) == ["r", "dotted"]
    assert texts(Corpus([tmp_path / "a.parquet"], field="meta")) == []
    with pytest.raises(UserError, match="text files have no fields"):
        (tmp_path / "e.txt").write_text("x")
        Corpus([f"{tmp_path}/e.txt:body"])
    with pytest.raises(UserError, match="no such file or folder"):
        Corpus([f"{tmp_path}/gone.jsonl:body"])


def test_what_a_table_has_is_listed_where_its_column_is_missing(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("id,title,body\n1,x,y\n")
    jsonl(tmp_path / "b.jsonl", [{"id": 1, "meta": {"title": "x"}}])
    assert texts(Corpus([tmp_path])) == []
    err = capsys.readouterr().err
    assert "a.csv:1: no column 'text' (it has id, title, body)" in err
    assert "b.jsonl:1: no field 'text' (it has id, meta.title)" in err
