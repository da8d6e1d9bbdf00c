"""`elas eval` as a command: its figures for a run, text, and what it says to mistakes."""

import gzip
import json
import shutil

import evaluated
import pytest

from elas.errors import UserError
from elas.evaluate import cli

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("one_rank")]


@pytest.fixture
def run(tmp_path, capsys):
    """Runs `elas eval` in this process; returns its JSON, or the one line of its error."""

    def evaluate(*argv: object) -> dict | str:
        from elas import parallel

        arguments = [str(word) for word in argv]
        try:
            assert cli.main([*arguments, "--json", str(tmp_path / "facts.json")]) == 0
        except UserError as error:
            assert "\n" not in str(error)
            return str(error)
        finally:
            parallel.shut_down()
        return json.loads((tmp_path / "facts.json").read_text())

    return evaluate


def test_defaults_are_the_runs_own(run, trained, capsys):
    facts = run("--checkpoint", trained / "run")
    documents = evaluated.documents_of(str(trained / "valid"))
    assert facts["tokens"] == sum(map(len, documents)) - 1 and facts["documents"] == len(documents)
    assert run("--checkpoint", trained / "run", "--tokens", 100, "--protocol", "papers")["tokens"] == 100
    assert (facts["protocol"], facts["seq_length"], facts["batch"], facts["step"]) == ("packed", 32, 2, 5)
    text = b"".join(path.read_bytes() for path in sorted((trained / "text").glob("*[37].txt")))
    first = 1 + len(b"w")  # the tokenizer's first piece: nothing predicts it
    assert 0 < len(text) - facts["bytes"] <= 8 * first
    shown = capsys.readouterr().out
    assert "evaluating" in shown and "bits per byte" in shown and "ppl n plus 1" in shown


def test_text_equals_its_tokens(run, trained, tmp_path):
    """Text files, and the same documents as compressed JSON lines, score as the corpus made of them does."""
    files = sorted((trained / "text").glob("*[37].txt"))
    lines = "".join(json.dumps({"body": file.read_text()}) + "\n" for file in files)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    tokens = run("--checkpoint", trained / "run", "--data", trained / "valid")
    for given in (files, [f"{tmp_path / 'a.jsonl.gz'}:body"]):
        text = run("--checkpoint", trained / "run", "--text", *given)
        for key in ("loss", "loss_stderr", "ppl_n_plus_1", "tokens", "documents", "bytes", "bits_per_byte"):
            assert text[key] == pytest.approx(tokens[key], rel=1e-12), key


def test_a_removed_checkpoint_is_replaced_or_said(trained, tmp_path, capsys):
    """While a run goes on, it removes checkpoints that an evaluation may be about to read."""
    from elas import parallel
    from elas.checkpoint.choose import find
    from elas.checkpoint.identity import written_config
    from elas.config import ParallelConfig
    from elas.console import Console
    from elas.evaluate.models import evaluation_config, open_checkpoint

    folder = shutil.copytree(trained / "run", tmp_path / "run")
    newest = find(folder)
    shutil.rmtree(newest.path)
    config = evaluation_config(written_config(newest), ParallelConfig(), None, 32)
    layout = parallel.initialize(config.parallel, seed=0)
    try:
        _, used = open_checkpoint(folder, newest, config, layout, Console())
        assert used.step == newest.step - 1
        assert f"{newest.path} was removed while it was being read" in capsys.readouterr().out
        with pytest.raises(UserError, match=r"was removed while .*; give a newer one, or the run's folder$"):
            open_checkpoint(newest.path, newest, config, layout, Console())
    finally:
        parallel.shut_down()


def test_mistakes_are_one_line(run, trained, llama, tmp_path):
    from support.corpora import write_corpus

    model = ("--checkpoint", trained / "run")
    large = write_corpus(tmp_path / "large", vocab=4000)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "config.json").write_text("{}")
    broken = shutil.copytree(trained / "run", tmp_path / "broken")
    file = max((broken / "checkpoints").glob("*/__0_0.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    shutil.copytree(trained / "run", tmp_path / "newer")
    for argv, line in (
        (("--checkpoint", tmp_path / "nowhere"), "nowhere: no such folder; give a run's folder"),
        (("--checkpoint", tmp_path), "names no model_type"),
        (("--checkpoint", broken), "__0_0.distcp is damaged"),
        ((*model, "--tokens", 0), "--tokens 0: too small; give 1 or more"),
        ((*model, "--batch", 0), "--batch 0: too small"),
        ((*model, "--seq-length", 33), "--seq-length 33: the model takes at most 32 tokens; give 32 or less"),
        ((*model, "--data", large), f"{large}: token id "),
        ((*model, "--data", tmp_path / "gone"), "there is no "),
        ((*model, "--data", large, "--text", "a"), "--text a: not together with --data"),
        ((*model, "--text", tmp_path / "empty.txt"), "empty.txt: holds no text"),
        ((*model, "--text", tmp_path / "gone.txt"), "--text "),
        ((*model, "--tokenizer", trained / "other"), "was made with another tokenizer"),
        ((*model, "--tokenizer", tmp_path / "gone"), "--tokenizer='"),
        ((*model, "--parallel.tensor", 2), "parallel.tensor=2: tensor × pipeline = 2 × 1 does not divide"),
        ((*model, "--parallel.zero", 2), "--parallel.zero 2: not for elas eval"),
        (("--checkpoint", llama), "--data=None: a Hugging Face folder names no validation set; give --data"),
        (("--checkpoint", llama, "--text", trained / "text"), "requires the model's tokenizer ("),
        (("--checkpoint", llama, "--data", trained / "valid", "--parallel.tensor", 2), "is a Hugging Face folder"),
        (("--checkpoint", llama, "--data", trained / "valid", "--seq-length", 41), "at most 40 tokens"),
        ((*model, "--limit", 3), "--limit: only with --tasks"),
        ((*model, "--tasks", "x", "--text", "a"), "--text: not with --tasks"),
        ((*model, "--tasks", "x", "--parallel.tensor", 2), "--parallel.tensor 2: not with --tasks"),
        ((*model, "--parallel.tensor", 0), "parallel.tensor=0: out of range"),
    ):
        said = run(*argv)
        assert isinstance(said, str) and line in said, (argv, said)


def test_more_tokens_than_there_are_is_said(run, trained, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("the cat sat on the mat")
    facts = run("--checkpoint", trained / "run", "--text", tmp_path / "a.txt", "--tokens", 5000)
    assert f"--tokens 5,000: there are {facts['tokens']} to predict" in capsys.readouterr().out


def test_a_tokenizer_that_is_far_too_small_for_a_folder_is_refused(run, trained, llama, tmp_path, monkeypatch):
    from elas.data_prep.sources import Corpus
    from elas.data_prep.tokenizer_training import train_tokenizer
    from elas.evaluate import subject

    train_tokenizer(Corpus([f"{trained}/text/*.txt"]), tmp_path / "small", vocab_size=300)
    given = ("--checkpoint", llama, "--text", trained / "text", "--tokenizer", tmp_path / "small")
    assert not isinstance(run(*given), str)  # as much as a vocabulary is padded by
    monkeypatch.setattr(subject, "PADDING", 1)
    assert "has 300 tokens, but the model 320; give the model's own" in run(*given)
