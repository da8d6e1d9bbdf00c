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
    expected = {"malformed JSON": 1, "not UTF-8": 2, "no text in field 'text'": 2}
    assert corpus.skipped.reasons == expected | {"half a surrogate pair": 1, "damaged gzip": 2}
    warnings = capsys.readouterr().err.splitlines()
    assert warnings[0] == "warning: skipped bad.jsonl:2: malformed JSON"
    assert len(warnings) == corpus.skipped.NAMED + 1
    texts(corpus)
    assert corpus.skipped.total == 8  # a second pass counts afresh


def test_overlapping_inputs_are_read_once_and_names_do_not_depend_on_the_place(tmp_path):
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
    names = [name for name, _ in corpus.files]
    assert names == sorted(names)
    assert json.__name__ + "/__init__.py" in names
    assert not any("site-packages" in str(path) for _, path in corpus.files)


def test_held_out_takes_about_its_fraction_and_grows_with_it():
    names = [f"file{i}.py" for i in range(5000)]
    small, large = ({n for n in names if held_out(n, f)} for f in (0.02, 0.1))
    assert small < large
    # 5000 draws at 0.1: mean 500, standard deviation 21; six of those.
    assert abs(len(large) - 500) < 130
    assert not any(held_out(n, 0.0) for n in names)
