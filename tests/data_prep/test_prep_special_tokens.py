"""Text that spells special tokens, for every kind of tokenizer: no document holds its end anywhere but at its end."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from elas.cli import run
from elas.command import exit_status
from elas.data.tokenizer import load_tokenizer
from elas.data_prep.sources import Corpus
from elas.data_prep.tokenize_corpus import Options, tokenize_corpus
from elas.data_prep.verify import verify
from elas.errors import ConfigError, UserError

LINES = ["one two three </s> four", "five six seven <s> <pad> one two", "a b c d e f g h i j k l m n o < / > ."] * 3
SPECIAL = ["<unk>", "</s>", "<s>", "<pad>"]
ROLES = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TEXTS = ["one </s> two", "plain one two", "<s> one <pad>", "three </s>", "</s></s>", "<unk> one"]


def _hugging_face(folder: Path, kind: str) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

    if kind == "slow":
        ByT5Tokenizer().save_pretrained(folder)
        return
    common = {"special_tokens": SPECIAL, "show_progress": False}
    roles = dict(ROLES)
    if kind == "unigram":
        fast, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", **common)
    elif kind == "bpe":
        fast, trainer = Tokenizer(models.BPE(unk_token="<unk>")), trainers.BpeTrainer(vocab_size=90, **common)
    elif kind == "wordlevel":
        fast, trainer = Tokenizer(models.WordLevel(unk_token="<unk>")), trainers.WordLevelTrainer(**common)
    elif kind == "wordpiece":
        fast, trainer = Tokenizer(models.WordPiece(unk_token="<unk>")), trainers.WordPieceTrainer(**common)
        fast.decoder = decoders.WordPiece()
    else:
        fast = Tokenizer(models.BPE())
        common |= {"special_tokens": ["</s>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
        trainer = trainers.BpeTrainer(vocab_size=300, **common)
        fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        roles = {"eos_token": "</s>", "bos_token": "</s>", "unk_token": "</s>"}  # GPT-2's: one token for all
    if kind in ("unigram", "bpe"):
        fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        fast.normalizer = normalizers.NFKC()  # spells </s> where the text does not
    elif kind.startswith("word"):
        fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.train_from_iterator(LINES, trainer)
    fast.add_tokens(["<sep>"])
    PreTrainedTokenizerFast(tokenizer_object=fast, **roles).save_pretrained(folder)


def _sentencepiece(folder: Path, **options) -> None:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    lines = [line.replace("</s>", "").replace("<s>", "").replace("<pad>", "") for line in LINES] * 5
    more = {"vocab_size": 45, "hard_vocab_limit": False, "minloglevel": 2, "pad_id": 3, **options}
    SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **more)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a tokenizer by its kind, made when first asked for."""
    made = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            if kind == "sentencepiece":
                _sentencepiece(made[kind], user_defined_symbols=["\n", "<sep>"], byte_fallback=True, vocab_size=310)
            else:
                _hugging_face(made[kind], kind)
        return made[kind]

    return get


KINDS = ["unigram", "bpe", "wordlevel", "wordpiece", "bytelevel", "slow", "sentencepiece"]
CANNOT = {"wordlevel"}  # a word it does not know is unknown, whatever it is made of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", [None, "<sep>", "one"])
def test_no_document_holds_its_end_before_its_end(kind, end, folder_of, tmp_path, write_jsonl, read_back):
    """Whichever token ends documents: the tokenizer's own, one that was added, or a piece of ordinary text."""
    folder = folder_of(kind)
    tokenizer = load_tokenizer(folder)
    if end == "one":
        end = next((p for p in ("▁one", "one", "Ġone", "o") if tokenizer.id_of(p) is not None), None)
    if end is not None and tokenizer.id_of(end) is None:
        pytest.skip(f"{kind} has no {end}")
    eod = tokenizer.eod if end is None else tokenizer.id_of(end)
    texts = [*TEXTS, "five ＜/s＞", "five <sep> six", "six", "\n\n five\n"]
    options = Options(workers=1, eod_token=end)
    facts = tokenize_corpus(Corpus([write_jsonl([{"text": t} for t in texts])]), folder, tmp_path / "all", options)
    stored = read_back(tmp_path / "all")
    assert all(ids[-1] == eod and eod not in ids[:-1] for ids in stored)
    assert all(not set(ids[:-1]) & tokenizer.special_ids - {tokenizer.unk} for ids in stored)
    report = verify(str(tmp_path / "all"))
    assert report["bad"] == []
    left_out = sum(n for why, n in facts["skip_reasons"].items() if why.startswith("spells "))
    assert len(stored) + left_out == facts["documents"] + left_out == len(texts)
    if end is None and kind not in CANNOT:
        assert left_out == 0
        kept = ["".join(tokenizer.decode(ids[:-1]).split()) for ids in stored]
        assert kept[0] == "one</s>two" and kept[3] == "three</s>"
    elif kind in CANNOT:
        assert left_out > 0 and any("</s>" in r["reason"] or "one" in r["reason"] for r in skipped(tmp_path / "all"))


def skipped(prefix) -> list[dict]:
    return [json.loads(line) for line in Path(f"{prefix}.skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("end", ["Ċ", "Ġone"])
def test_text_whose_only_piece_ends_documents_is_skipped(end, folder_of, tmp_path, write_jsonl, read_back):
    """A byte-level vocabulary has one piece for a newline: ending documents in it leaves none for text."""
    folder = folder_of("bytelevel")
    texts = ["five\nsix", "two one two", "five"]
    corpus = Corpus([write_jsonl([{"text": text} for text in texts])])
    tokenize_corpus(corpus, folder, tmp_path / "all", Options(workers=1, eod_token=end))
    kept = [load_tokenizer(folder).decode(ids[:-1]) for ids in read_back(tmp_path / "all")]
    left_out = [1] if end == "Ċ" else []
    assert kept == [text for number, text in enumerate(texts, 1) if number not in left_out]
    assert [row["line"] for row in skipped(tmp_path / "all")] == left_out
    with pytest.raises(ConfigError, match="no such token; did you mean 'Ċ'"):
        tokenize_corpus(corpus, folder, tmp_path / "more", Options(workers=1, eod_token="\n"))


def test_verify_counts_documents_that_hold_special_ids(folder_of, tmp_path, write_jsonl):
    corpus = Corpus([write_jsonl([{"text": f"one two {n} three"} for n in range(50)])])
    folder, prefix = folder_of("unigram"), tmp_path / "all"
    tokenize_corpus(corpus, folder, prefix, Options(workers=1, prepend_bos=True))
    tokenizer, whole = load_tokenizer(folder), np.fromfile(f"{prefix}.bin", np.uint16)
    manifest = json.loads(Path(f"{prefix}.manifest.json").read_text())
    assert (manifest["eod"], manifest["bos"]) == (tokenizer.eod, tokenizer.bos)
    starts = np.flatnonzero(whole == tokenizer.bos)
    for at, ids, why in (
        (starts[:3] + 2, tokenizer.eod, f"3 documents contain the end-of-document id {tokenizer.eod} before their end"),
        (starts[:2] + 2, tokenizer.bos, "2 documents contain the beginning-of-sequence id"),
        (starts[:4], 9, "4 documents do not begin with the beginning-of-sequence id"),
        (np.array([starts[0] + 1, starts[0] + 2]), tokenizer.eod, "1 documents contain the end"),
    ):
        changed = whole.copy()
        changed[at] = ids
        changed.tofile(f"{prefix}.bin")
        manifest["files"]["all.bin"]["sha256"] = hashlib.sha256(changed.tobytes()).hexdigest()
        Path(f"{prefix}.manifest.json").write_text(json.dumps(manifest))
        (line,) = verify(str(prefix))["bad"]
        assert why in line
    assert run(["prep", "verify", str(prefix)]) == 1


@pytest.mark.parametrize("kind", ["unigram", "bytelevel", "sentencepiece"])
def test_prepend_bos_begins_every_document_once(kind, folder_of, tmp_path, write_jsonl, read_back):
    """GPT-2's tokenizer has one token for beginning and end; both stand where they should."""
    tokenizer = load_tokenizer(folder_of(kind))
    corpus = Corpus([write_jsonl([{"text": text} for text in TEXTS])])
    tokenize_corpus(corpus, folder_of(kind), tmp_path / "all", Options(workers=1, prepend_bos=True))
    for ids in read_back(tmp_path / "all"):
        assert (ids[0], ids[-1]) == (tokenizer.bos, tokenizer.eod)
        assert not {tokenizer.bos, tokenizer.eod} & set(ids[1:-1])
    assert verify(str(tmp_path / "all"))["bad"] == []
    with pytest.raises(ConfigError, match="holds another corpus, or one from other inputs or settings"):
        tokenize_corpus(corpus, folder_of(kind), tmp_path / "all", Options(workers=1))


def test_prepend_bos_without_such_a_token_is_refused(folder_of, tmp_path, write_jsonl, capsys):
    data = write_jsonl([{"text": "one"}])
    _sentencepiece(tmp_path / "no_bos", bos_id=-1)
    for folder in (folder_of("slow"), tmp_path / "no_bos"):
        argv = f"prep tokenize --input {data} --tokenizer {folder} --output {tmp_path}/out/all --prepend-bos"
        assert exit_status(run, argv.split()) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "--prepend-bos" in line and "has no beginning-of-sequence token" in line
    assert not (tmp_path / "out").exists()


def test_documents_without_a_token_are_listed_not_written(tmp_path, write_jsonl, read_back):
    _sentencepiece(tmp_path / "t")  # the default normalisation drops zero-width and control characters
    corpus = Corpus([write_jsonl([{"text": text} for text in ("one", "\u200b\u200b", "two", "\x01")])])
    facts = tokenize_corpus(corpus, tmp_path / "t", tmp_path / "all", Options(workers=1))
    stored = read_back(tmp_path / "all")
    reason = "yields no tokens"
    assert facts["documents"] == len(stored) == 2 and facts["skip_reasons"] == {reason: 2}
    assert [(row["line"], row["reason"]) for row in skipped(tmp_path / "all")] == [(2, reason), (4, reason)]
    assert json.loads((tmp_path / "all.manifest.json").read_text())["skip_reasons"] == {reason: 2}


NAMED = {
    "tokenizer_config.json": [{"eos_token": "<end>"}, {"eos_token": {"content": "<end>", "special": True}}],
    "special_tokens_map.json": [{"eos_token": "<end>"}, {"eos_token": {"content": "<end>"}}],
}


@pytest.mark.parametrize("file", NAMED)
def test_files_beside_sentencepiece_models_name_special_tokens(file, tmp_path, write_jsonl, read_back):
    _sentencepiece(tmp_path / "t", user_defined_symbols=["<end>", "<turn>"])
    plain = load_tokenizer(tmp_path / "t")
    for form in NAMED[file]:
        (tmp_path / "t" / file).write_text(json.dumps(form | {"additional_special_tokens": ["<turn>"]}))
        tokenizer = load_tokenizer(tmp_path / "t")
        assert tokenizer.eod == plain.id_of("<end>") != plain.eod
        assert plain.id_of("<turn>") in tokenizer.special_ids and tokenizer.sha256 != plain.sha256
    corpus = Corpus([write_jsonl([{"text": text} for text in ("one two", "one <end> two", "<turn>")])])
    tokenize_corpus(corpus, tmp_path / "t", tmp_path / "all", Options(workers=1))
    for ids in read_back(tmp_path / "all"):
        assert ids[-1] == tokenizer.eod and not set(ids[:-1]) & tokenizer.special_ids
    (tmp_path / "t" / file).write_text('{"eos_token": "<absent>"}')
    with pytest.raises(UserError, match=r"names eos_token '<absent>', which does not exist; fix that file"):
        tokenize_corpus(corpus, tmp_path / "t", tmp_path / "more", Options(workers=1))
    (tmp_path / "t" / file).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path / "t")


def test_tokens_added_beside_a_sentencepiece_model(tmp_path, write_jsonl, read_back):
    """`<|im_end|>` after the model's last id, as chat models have it: it ends documents, by either way to name it."""
    _sentencepiece(tmp_path / "t")
    size = load_tokenizer(tmp_path / "t").vocab_size
    added = {str(size + 1): {"content": "<|im_end|>", "special": True}}
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    corpus = Corpus([write_jsonl([{"text": "one two"}])])
    tokenize_corpus(corpus, tmp_path / "t", tmp_path / "a", Options(workers=1, eod_token="<|im_end|>"))
    facts = {"added_tokens_decoder": added, "eos_token": "<|im_end|>"}
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(facts))
    tokenize_corpus(corpus, tmp_path / "t", tmp_path / "b", Options(workers=1))
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.vocab_size == size + 2
    for name in "ab":
        (ids,) = read_back(tmp_path / name)
        assert ids[-1] == size + 1 and tokenizer.decode(ids) == "one two"
    with pytest.raises(ConfigError, match=r"no such token; did you mean '<\|im_end\|>'\?"):
        tokenize_corpus(corpus, tmp_path / "t", tmp_path / "c", Options(workers=1, eod_token="<|im_ends|>"))
