"""The tokenizer of a trained model is found, and another one is refused in one line."""

import json
import shutil

import pytest
from support.corpora import SMALL, write_corpus

from elas.config import load_config
from elas.data.tokenizer.found import tokenizer_of
from elas.errors import ConfigError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with two tokenizers of 320 tokens, `larger` of 340, and the corpus `text`, made with `tokenizer`."""
    from elas.data_prep.sources import Corpus
    from elas.data_prep.tokenize_corpus import tokenize_corpus
    from elas.data_prep.tokenizer_training import train_tokenizer

    folder = tmp_path_factory.mktemp("made")
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"words {i * i} of text {i**3}\n" * 40)
    corpus = Corpus([f"{folder}/*.txt"])
    train_tokenizer(corpus, folder / "tokenizer", vocab_size=320)
    train_tokenizer(corpus, folder / "other", vocab_size=320, model_type="unigram")
    train_tokenizer(corpus, folder / "larger", vocab_size=340)
    tokenize_corpus(corpus, folder / "tokenizer", folder / "text")
    return folder


@pytest.fixture
def moved(made, tmp_path):
    """A copy of `made`'s corpus, whose manifest names the copy's own tokenizer."""
    for end in ("bin", "idx", "manifest.json"):
        shutil.copy(made / f"text.{end}", tmp_path)
    shutil.copytree(made / "tokenizer", tmp_path / "tokenizer")
    text = (tmp_path / "text.manifest.json").read_text()
    (tmp_path / "text.manifest.json").write_text(text.replace(str(made), str(tmp_path)))
    return tmp_path


def config_of(folder, **more):
    train = more.pop("train", str(folder / "text"))
    return load_config(None, {**SMALL, "train.run_dir": str(folder / "run"), "data.train": train, **more})


def refused(config, given=None) -> str:
    with pytest.raises(ConfigError) as error:
        tokenizer_of(config, given)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_it_is_given_or_set_or_named_by_the_corpus(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made / "tokenizer", copy)
    assert tokenizer_of(config_of(made), None) == made / "tokenizer"
    set_there = config_of(made, **{"data.tokenizer": str(copy)})
    assert tokenizer_of(set_there, None) == copy
    assert tokenizer_of(set_there, str(made / "tokenizer")) == made / "tokenizer"
    plain = write_corpus(tmp_path / "plain", vocab=320)  # its manifest names no tokenizer: nothing to compare
    assert tokenizer_of(config_of(made, train=[plain, str(made / "text")]), None) == made / "tokenizer"
    assert tokenizer_of(config_of(made, train=plain), str(made / "other")) == made / "other"
    of_valid = config_of(made, train=plain, **{"data.valid": str(made / "text")})
    assert tokenizer_of(of_valid, None) == made / "tokenizer"
    assert tokenizer_of(config_of(made, train=str(tmp_path / "gone")), str(copy)) == copy


def test_without_any_the_option_is_asked_for(made, tmp_path):
    ending = "give the tokenizer that the model was trained with"
    unset = "--tokenizer=None: data.tokenizer is not set and"
    plain = write_corpus(tmp_path / "plain", vocab=320)
    assert refused(config_of(made, train=plain)) == f"{unset} {plain}.manifest.json names none; {ending}"
    gone = config_of(made, train=["nowhere/a", "nowhere/b"])
    why = "there is no manifest of nowhere/a nor of 1 others that names one"
    assert refused(gone) == f"{unset} {why}; {ending}"
    none = load_config(None, {**SMALL, "train.run_dir": str(tmp_path / "run"), "data.train": None})
    assert refused(none) == f"{unset} data.train names no corpus whose manifest would name one; {ending}"
    (tmp_path / "plain.manifest.json").write_text('{"source": {"settings": []}}')
    assert refused(config_of(made, train=plain)).startswith(unset)


def test_a_moved_or_changed_tokenizer_is_said(made, moved):
    config, folder = config_of(moved), moved / "tokenizer"
    shutil.copy(made / "other" / "tokenizer.model", folder)
    line = refused(config)
    assert line.startswith(f"--tokenizer=None: {folder} has changed since {moved}/text was made with it (sha256 ")
    assert line.endswith("; restore it, or give the one that it was")
    (folder / "tokenizer.model").write_bytes(b"no model")
    assert refused(config).startswith(f"--tokenizer='{folder}': cannot be opened (")
    shutil.rmtree(folder)
    why = f"{folder}, the tokenizer that {moved}/text was made with, is not there (moved, removed, or on another"
    assert refused(config).startswith(f"--tokenizer=None: {why} machine); give the path that it has now")
    assert tokenizer_of(config, str(made / "tokenizer")) == made / "tokenizer"


def test_a_tokenizer_of_another_corpus_is_refused(made):
    config, other = config_of(made), made / "other"
    sha = json.loads((made / "text.manifest.json").read_text())["tokenizer_sha256"][:12]
    was = f"{made}/text was made with another tokenizer ({made}/tokenizer, 320 tokens, sha256 {sha}…"
    why = f"{was}; this one has 320 tokens); "
    assert refused(config, str(other)) == f"--tokenizer='{other}': {why}give {made}/tokenizer"
    set_there = config_of(made, **{"data.tokenizer": str(other)})
    assert refused(set_there) == f"data.tokenizer='{other}': {why}set data.tokenizer to {made}/tokenizer"
    assert refused(config, "nowhere").startswith("--tokenizer='nowhere': cannot be opened (no tokenizer.model or ")


def test_a_tokenizer_larger_than_the_model_is_refused(made, tmp_path):
    plain = write_corpus(tmp_path / "plain", vocab=320)
    size = {"model.vocab_size": 330}
    why = "has 340 tokens, more than model.vocab_size=330: it is of another vocabulary"
    larger = made / "larger"
    assert refused(config_of(made, train=plain, **size), str(larger)).startswith(
        f"--tokenizer='{larger}': {why}; give "
    )
    small = config_of(made, **{"model.vocab_size": 300})
    named = f"--tokenizer=None: {made}/tokenizer, the tokenizer of {made}/text, has 320 tokens, more than"
    assert refused(small).startswith(f"{named} model.vocab_size=300")
