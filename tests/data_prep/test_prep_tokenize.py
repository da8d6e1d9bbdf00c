import hashlib
import json
import multiprocessing
import os
import re
import time

import numpy as np
import pytest

from elas.cli import run
from elas.command import exit_status
from elas.data.tokenizer import load_tokenizer
from elas.data_prep import encoder, steps
from elas.data_prep.sources import Corpus, held_out
from elas.data_prep.tokenize_corpus import Options, tokenize_corpus

TEXTS = [f"def f{i}(x):\n\treturn x  * {i}\n" * (i % 7 + 1) for i in range(60)]


@pytest.fixture
def corpus(write_jsonl) -> Corpus:
    return Corpus([write_jsonl([{"text": text} for text in TEXTS])])


def test_read_back_is_the_input(corpus, tokenizer_folder, tmp_path, read_back):
    facts = tokenize_corpus(corpus, tokenizer_folder, tmp_path / "new" / "all", Options(workers=1))
    tokenizer = load_tokenizer(tokenizer_folder)
    stored = read_back(tmp_path / "new" / "all")
    assert [tokenizer.decode(ids) for ids in stored] == TEXTS
    assert all(ids[-1] == tokenizer.eod and tokenizer.eod not in ids[:-1] for ids in stored)
    assert facts["documents"] == 60
    assert facts["tokens"] == sum(map(len, stored))
    assert facts["bytes_in"] == sum(len(text.encode()) for text in TEXTS)
    assert facts["mb_per_s"] > 0 and facts["peak_rss_mb"] > 10
    names = ["all.bin", "all.idx", "all.manifest.json", "all.skipped.jsonl"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names


def test_megatrons_own_dataset_reads_it(corpus, tokenizer_folder, tmp_path):
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    tokenize_corpus(corpus, tokenizer_folder, tmp_path / "all", Options(workers=1))
    tokenizer = load_tokenizer(tokenizer_folder)
    settings = GPTDatasetConfig(
        random_seed=1, sequence_length=64, blend=([str(tmp_path / "all")], None), split="1,0,0",
        path_to_cache=str(tmp_path / "cache"), tokenizer=tokenizer, reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    dataset, *_ = BlendedMegatronDatasetBuilder(GPTDataset, [8, 0, 0], lambda: True, settings).build()
    text = tokenizer.decode(dataset[0]["tokens"].tolist())
    assert len(dataset) >= 8 and "return x" in text


def test_manifest_fits_the_files(corpus, tokenizer_folder, tmp_path):
    tokenize_corpus(corpus, tokenizer_folder, tmp_path / "all", Options(workers=1))
    manifest = json.loads((tmp_path / "all.manifest.json").read_text())
    assert sorted(manifest["files"]) == ["all.bin", "all.idx"]
    for name, file in manifest["files"].items():
        data = (tmp_path / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    assert manifest["dtype"] == "uint16" and manifest["tokens"] * 2 == manifest["files"]["all.bin"]["bytes"]
    assert manifest["tokenizer_sha256"] == load_tokenizer(tokenizer_folder).sha256
    source = manifest["source"]
    assert source["inputs"] == corpus.inputs and source["settings"]["tokenizer"] == str(tokenizer_folder)
    assert source["files"] == [["corpus.jsonl", os.path.getsize(corpus.inputs[0]), 60, manifest["tokens"]]]
    assert source["sources"][corpus.inputs[0]]["tokens"] == manifest["tokens"]


def test_without_eod_and_with_another(corpus, tokenizer_folder, tmp_path, read_back):
    tokenize_corpus(corpus, tokenizer_folder, tmp_path / "none", Options(workers=1, append_eod=False))
    tokenizer = load_tokenizer(tokenizer_folder)
    assert all(tokenizer.eod not in ids for ids in read_back(tmp_path / "none"))
    tokenize_corpus(corpus, tokenizer_folder, tmp_path / "own", Options(workers=1, eod_token="<s>"))
    assert all(ids[-1] == tokenizer.bos for ids in read_back(tmp_path / "own"))


def test_same_files_for_any_number_of_workers_and_size_of_batch(corpus, tokenizer_folder, tmp_path, monkeypatch):
    valid = {"valid_fraction": 0.2, "task_bytes": 1000, "deduplicate": True}
    for workers in (1, 2, 4):
        monkeypatch.setattr(steps, "BATCH_DOCUMENTS", 1 + workers)
        folder = tmp_path / str(workers)
        options = Options(workers=workers, valid_output=folder / "valid", **valid)
        facts = tokenize_corpus(corpus, tokenizer_folder, folder / "train", options)
        assert facts["tasks"] > 4
    for file in (tmp_path / "1").iterdir():
        for workers in ("2", "4"):
            assert file.read_bytes() == (tmp_path / workers / file.name).read_bytes(), file.name


def test_a_task_that_fails_leaves_what_was_done_and_no_process(corpus, tokenizer_folder, tmp_path, monkeypatch):
    tasks = Options(workers=2, task_bytes=1000)
    tokenize_corpus(corpus, tokenizer_folder, tmp_path / "whole", tasks)
    write, pid = encoder.Encoder.write, os.getpid()

    def fails(self, batch, part):
        if part.task == 3:
            raise RuntimeError("reader fell over")
        write(self, batch, part)

    monkeypatch.setattr(encoder.Encoder, "write", fails)
    with pytest.raises(RuntimeError, match="reader fell over"):
        tokenize_corpus(corpus, tokenizer_folder, tmp_path / "all", tasks)
    end = time.monotonic() + 5  # killed; the pool's own thread may be the one that waits for them
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.05)
    assert os.getpid() == pid and not multiprocessing.active_children()
    assert not (tmp_path / "all.bin").exists()
    monkeypatch.undo()
    facts = tokenize_corpus(corpus, tokenizer_folder, tmp_path / "all", tasks)
    assert 0 < facts["tasks_done_before"] < facts["tasks"]
    for end in ("bin", "idx", "manifest.json"):
        theirs = (tmp_path / f"whole.{end}").read_bytes().replace(b"whole.", b"all.")
        assert (tmp_path / f"all.{end}").read_bytes() == theirs
    assert not (tmp_path / "all.work").exists()


def test_finished_work_is_kept_other_corpora_too(corpus, tokenizer_folder, tmp_path, write_jsonl, capsys):
    argv = f"prep tokenize --input {corpus.inputs[0]} --tokenizer {tokenizer_folder} --output {tmp_path}/all"
    assert run([*argv.split(), "--json", f"{tmp_path}/first.json"]) == 0
    changed = (tmp_path / "all.bin").stat().st_mtime_ns
    assert run([*argv.split(), "--json", f"{tmp_path}/second.json"]) == 0
    first_said, said = capsys.readouterr().out.split("already complete: ")
    assert said.startswith(f"{tmp_path}/all.bin; nothing to do (--overwrite starts over)\n")
    assert "MB of text per s" in first_said and "lost by the tokenizer" in first_said
    assert not any(word in said for word in ("MB of text per s", "peak memory", "seconds", "respelled"))
    assert (tmp_path / "all.bin").stat().st_mtime_ns == changed
    first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("first", "second"))
    assert all(first[key] == second[key] for key in ("documents", "tokens", "bytes_in", "skipped"))
    write_jsonl([{"text": "another"}])
    assert exit_status(run, argv.split()) == 2
    assert "holds another corpus" in capsys.readouterr().err
    assert (tmp_path / "all.bin").stat().st_mtime_ns == changed
    assert run([*argv.split(), "--overwrite"]) == 0
    assert json.loads((tmp_path / "all.manifest.json").read_text())["documents"] == 1


def test_held_out_split_is_disjoint_and_complete(corpus, tokenizer_folder, tmp_path, read_back):
    options = Options(workers=1, valid_output=tmp_path / "valid", valid_fraction=0.25)
    facts = tokenize_corpus(corpus, tokenizer_folder, tmp_path / "train", options)
    decode = load_tokenizer(tokenizer_folder).decode
    train, valid = ([decode(ids) for ids in read_back(tmp_path / side)] for side in ("train", "valid"))
    assert train == [text for text in TEXTS if not held_out(text, 0.25)]
    assert valid == [text for text in TEXTS if held_out(text, 0.25)]
    assert (facts["documents"], facts["valid_documents"]) == (len(train), len(valid))


def test_duplicates_go_and_the_first_stays(tokenizer_folder, tmp_path, write_jsonl, read_back, monkeypatch):
    from elas.data_prep import duplicates

    monkeypatch.setattr(duplicates, "ROWS_AT_ONCE", 20)  # several ranges of digests
    texts = [f"text {i % 23}\n" for i in range(100)] + TEXTS
    corpus = Corpus([write_jsonl([{"text": text} for text in texts])])
    options = Options(workers=1, deduplicate=True, task_bytes=500)
    facts = tokenize_corpus(corpus, tokenizer_folder, tmp_path / "all", options)
    decode = load_tokenizer(tokenizer_folder).decode
    assert [decode(ids) for ids in read_back(tmp_path / "all")] == list(dict.fromkeys(texts))
    assert facts["skip_reasons"] == {"duplicate": len(texts) - len(set(texts))}
    assert facts["bytes_in"] == sum(len(text) for text in set(texts))


def test_lengths_and_filters_leave_out_and_count(tokenizer_folder, tmp_path, write_jsonl, read_back):
    from elas.data_prep.quality import parse_filter

    texts = ["x", "y" * 500, "a fine sentence about nothing. " * 4, "lorem ipsum " * 6, "a b c d e f g h i j"]
    corpus = Corpus([write_jsonl([{"text": text} for text in texts])])
    lorem = "RegexFilter:regex_exp='lorem|dolor'"
    options = Options(workers=1, min_chars=2, max_chars=400, min_tokens=25, filters=[parse_filter(lorem)])
    facts = tokenize_corpus(corpus, tokenizer_folder, tmp_path / "all", options)
    assert [load_tokenizer(tokenizer_folder).decode(ids) for ids in read_back(tmp_path / "all")] == texts[2:3]
    few, many = "too few characters", "too many characters"
    assert facts["skip_reasons"] == {few: 1, many: 1, "RegexFilter": 1, "too few tokens": 1}


def test_vocabulary_decides_the_dtype(corpus, tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("elas.data_prep.options.UINT16_VOCAB", 600)
    facts = tokenize_corpus(corpus, tokenizer_folder, tmp_path / "all", Options(workers=1))
    assert facts["dtype"] == "int32"
    assert (tmp_path / "all.bin").stat().st_size == 4 * facts["tokens"]
    assert np.fromfile(tmp_path / "all.bin", np.int32).max() < 600


def test_long_documents_are_cut_for_the_tokenizer_and_stay_whole(
    tokenizer_folder, tmp_path, write_jsonl, read_back, monkeypatch
):
    monkeypatch.setattr(encoder, "LONG_CHARS", 50)
    texts = ["line\n" * 40, "no line end " * 40, "nothing" * 40, "\n" * 300, " " * 99 + "x", "é▁" * 200]
    assert all("".join(encoder.segments(text)) == text for text in texts)
    assert all(0 < len(s) <= 50 for text in texts for s in encoder.segments(text))
    corpus = Corpus([write_jsonl([{"text": text} for text in texts])])
    tokenize_corpus(corpus, tokenizer_folder, tmp_path / "all", Options(workers=1))
    decode = load_tokenizer(tokenizer_folder).decode
    kept = [text for text in texts if not text.isspace()]
    assert [decode(ids) for ids in read_back(tmp_path / "all")] == kept


def test_command_counts_what_it_skips(tokenizer_folder, tmp_path, write_jsonl, capsys):
    data = write_jsonl([{"body": "kept\n"}, {"body": ""}, b"{", b'{"body": "\xff"}', {"body": 3}])
    argv = f"prep tokenize --input {data} --field body --tokenizer {tokenizer_folder} --output {tmp_path}/all"
    assert run([*argv.split(), "--json", str(tmp_path / "facts.json")]) == 0
    facts = json.loads((tmp_path / "facts.json").read_text())
    reasons = {"malformed JSON": 1, "not UTF-8": 1, "field 'body' is not text": 1, "empty": 1}
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
    "prep tokenize --input EMPTY --tokenizer TOK --output OUT": "no document contains text",
    "prep tokenize --input IN --field body --tokenizer TOK --output OUT": "no field 'body'",
    "prep tokenize --input IN --tokenizer TOK --output OUT --filter GopherQuality": "did you mean GopherQualityFilter?",
    "prep tokenize --input IN --tokenizer TOK --output OUT --filter GopherQualityFilter:min_words=3": "min_doc_words",
    "prep tokenize --input IN --tokenizer TOK --output OUT --filter SamplerFilter:rate=0.5": "seed=1",
    "prep tokenize --input IN --tokenizer TOK --output OUT --filter GopherQualityFilter:min_doc_words": "key=value",
    "prep tokenize --input IN --tokenizer TOK --output OUT --filter SamplerFilter:seed=1,rate=x": "must be a number",
    "prep tokenize --input IN --tokenizer TOK --output OUT --filter SamplerFilter:seed=1,rate=true": "default is 0.5",
    "prep tokenize --input IN --tokenizer TOK --output OUT --filter FineWebQualityFilter:language=3": "must be text",
    "prep tokenize --input IN --tokenizer TOK --output OUT --filter URLFilter:use_integrated_lists=1": "true or false",
    "prep tokenize --input IN --tokenizer TOK --output OUT --filter RegexFilter:regex_exp='['": "unterminated",
    "prep tokenize --input IN --tokenizer TOK --output OUT --filter RegexFilter:regex_exp=[": "is not YAML",
    "prep tokenize --input IN --tokenizer TOK --output OUT --filter RegexFilter:regex_exp=3": "cannot be created",
    "prep tokenize --input IN --tokenizer TOK --output OUT --filter GopherRepetitionFilter:language=xx": "'xx'",
    "prep tokenize --input IN --tokenizer TOK --output OUT --sbatch =5": "--sbatch =5: not an option of sbatch",
    "prep tokenize --input IN --tokenizer TOK --output OUT --sbatch comment=": "give KEY=VALUE, or KEY for a flag",
    "prep tokenize --input IN --tokenizer TOK --output OUT --sbatch array=0-3": "is set from the tasks",
    "prep tokenize --input IN --tokenizer TOK --output OUT --slurm-mem-gb 0": "--slurm-mem-gb=0",
    "prep tokenize --input IN --tokenizer TOK --output OUT --share 1": "--share 1: not of the form I/N",
    "prep tokenize --input IN --tokenizer TOK --output OUT --share 2/2": "count from 0",
    "prep tokenize --input IN --tokenizer TOK --output OUT --share 0/2 --overwrite": "before the shares start",
    "prep tokenize --input IN --tokenizer TOK --output OUT --share 0/2 --executor ray": "not supported with",
    "prep tokenize --input IN --tokenizer TOK --output OUT --append-eod no --eod-token x": "has no effect",
    "prep tokenize --input IN* --tokenizer TOK --output OUT --suffix jsonl": "is read as jsonl",
    "prep tokenize --input IN --tokenizer TOK --output OUT --suffix gz": "is a compression",
    "prep tokenize --input NONE*.txt --tokenizer TOK --output OUT": "matches no readable file",
    "prep tokenizer --input IN --output TOK --vocab-size 300": "already holds a tokenizer",
    "prep tokenize --input IN --tokenizer TOK --output OUT --min-chars 9 --max-chars 8": "--min-chars=9",
    "prep tokenize --input IN --tokenizer TOK --output OUT --min-tokens 0": "--min-tokens=0",
    "prep tokenize --input IN --tokenizer TOK --output OUT --eod-token nonsense": "no such token",
    "prep tokenize --input IN --tokenizer TOK --output OUT --executor slurm": "--slurm-partition",
    "prep tokenize --input IN --tokenizer TOK --output OUT --executor slurm --slurm-partition p": "on a login node",
    "prep merge OUT": "start the work with elas prep tokenize",
    "prep info OUT": "there is no",
    "prep tokenize --input IN --tokenizer NONE --output OUT": "no tokenizer.model",
    "prep tokenize --input IN --tokenizer TOK --output OUT --workers 0": "--workers=0",
    "prep tokenize --input IN --tokenizer TOK --output OUT --workers two": "--workers",
    "prep tokenize --input IN --tokenizer TOK --output OUT --append-eod maybe": "--append-eod",
    "prep tokenize --input IN --tokenizer TOK --output OUT --valid-fraction 0.1": "--valid-output",
    "prep tokenize --input IN --tokenizer TOK --output OUT --valid-output V": "--valid-fraction",
    "prep tokenize --input IN --tokenizer TOK --output OUT --valid-output V --valid-fraction 2": "--valid-fraction=2.0",
    "prep tokenize --input IN --tokenizer TOK --output OUT --valid-output OUT --valid-fraction .1": "another prefix",
    "prep tokenize --input IN --tokenizer TOK --output OUT --valid-output OUT2 --valid-fraction 1e-9": "leaves no",
    "prep tokenize --input IN --tokenizer TOK --output OUT.bin": "not a file prefix",
    "prep tokenize --input IN --tokenizer TOK --output IN/under": "--output",
    "prep tokenizer --input IN --output OUT": "--vocab-size",
    "prep tokenizer --input IN --output OUT --vocab-size 999999": "give more text",
    "prep tokenizer --input IN --output IN --vocab-size 400": "cannot create the folder",
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
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
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


def test_long_documents_are_never_held_out():
    """With `max_bytes` the split of the others stays as it is without."""
    texts = [f"{number} " + "x" * (number % 100) for number in range(2000)]
    every = {text for text in texts if held_out(text, 0.2)}
    short = {text for text in texts if held_out(text, 0.2, 60)}
    assert short == {text for text in every if len(text) <= 60}
    assert 0 < len(short) < len(every)


def test_the_share_held_out_is_said_and_warned_of(tokenizer_folder, tmp_path, write_jsonl, capsys):
    """One of the documents that the hash holds out is a hundred times as long as the others."""
    short = [f"a short text {n}" for n in range(200)]
    long = next(text for n in range(1000) if held_out(text := f"{n} of a long text " * 100, 0.05, None))
    source = write_jsonl([{"text": text} for text in [*short, long]])
    argv = f"prep tokenize --input {source} --tokenizer {tokenizer_folder} --workers 1 --valid-fraction 0.05"
    said = {}
    for name, more in (("all", ""), ("again", ""), ("bounded", " --valid-max-bytes 200")):
        prefix = tmp_path / name.replace("again", "all")
        given = f"{argv} --output {prefix} --valid-output {prefix}-valid --json {tmp_path}/facts.json{more}"
        assert run(given.split()) == 0
        said[name] = capsys.readouterr()
        facts = json.loads((tmp_path / "facts.json").read_text())
        share = facts["held_out"]["bytes"]
        assert share == round(facts["valid_bytes_in"] / (facts["valid_bytes_in"] + facts["bytes_in"]), 6)
        assert f"{share:.2%} of the bytes" in said[name].out and facts["held_out"]["asked"] == 0.05
        assert (share > 0.1) == (name != "bounded")
    assert re.search(r"warning: --valid-fraction 0.05: held out .*; give --valid-max-bytes N to", said["all"].err)
    assert "warning" not in said["bounded"].err + said["again"].err
