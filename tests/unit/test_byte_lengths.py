"""The bytes of a text are the sum over its ids."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from elas.data.tokenizer import load_tokenizer
from elas.data.tokenizer.byte_lengths import byte_lengths, document_bytes, inexact_because

HOSTILE = [
    "", " ", "   a  ", "a", "\n\n\t", "\r\n", "x\u2581y\u2581", "\u2581", "日本語 😀 \u0301e\u00a0", "\x00\x7f\x80",
    "</s><s><unk><pad> <0x0A> <|endoftext|>", "\ud7ff\ue000\U0010fffe",
]  # fmt: skip
ORDINARY = {
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "user_defined_symbols": ["\n", "\t", "<|user|>", "é"],
}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py"))]


def sentencepiece(path: Path, texts, **settings):
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    chunks = (text[i : i + 2000] for text in texts for i in range(0, len(text), 2000))
    given = {"vocab_size": 600, "pad_id": 3, "minloglevel": 2, "max_sentence_length": 16000, "hard_vocab_limit": False}
    SentencePieceTrainer.train(sentence_iterator=chunks, model_writer=model, **given | settings)
    path.write_bytes(model.getvalue())
    return load_tokenizer(path)


def hugging_face(folder: Path, fast, **config):
    folder.mkdir()
    fast.save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return load_tokenizer(folder)


def byte_level(folder: Path, texts, normalizer=None, add_prefix_space=False):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE())
    fast.normalizer, fast.decoder = normalizer, decoders.ByteLevel()
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": alphabet, "show_progress": False}
    fast.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, **special))
    fast.add_tokens([AddedToken("<é user>", normalized=False)])
    return hugging_face(folder, fast, eos_token="<|endoftext|>", unk_token="<|endoftext|>")


def check_exact(tokenizer, texts) -> None:
    assert inexact_because(tokenizer) is None
    lengths = byte_lengths(tokenizer)
    assert lengths.shape == (tokenizer.vocab_size,) and lengths.dtype == np.int32
    for text in [*texts, *HOSTILE, "<|user|> é <é user>"]:
        ids = tokenizer.encode(text)
        assert document_bytes(tokenizer, ids) == len(text.encode()), text[:40]
        if tokenizer.special_ids:
            assert document_bytes(tokenizer, [*ids, min(tokenizer.special_ids)]) == len(text.encode())


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_with_byte_pieces_is_exact(model_type, texts, tmp_path):
    plain = {"model_type": model_type, "add_dummy_prefix": False, **ORDINARY}
    tokenizer = sentencepiece(tmp_path / "plain.model", texts, **plain)
    check_exact(tokenizer, texts)
    for text in texts:  # without a dummy space the plain sum is the document's
        assert byte_lengths(tokenizer)[tokenizer.encode(text)].sum() == len(text.encode())
    lengths, vocab = byte_lengths(tokenizer), tokenizer.vocab
    assert [int(lengths[vocab[piece]]) for piece in ("<unk>", "</s>", "<0x0A>", "\n", "<|user|>", "é")] == [
        0, 0, 1, 1, 8, 2,
    ]  # fmt: skip
    longer = byte_lengths(tokenizer, 1000)
    assert np.array_equal(longer[: len(lengths)], lengths) and len(longer) == 1000 and not longer[len(lengths) :].any()


def test_the_dummy_space_is_no_byte_of_the_document(texts, tmp_path):
    for number, suffix in enumerate((False, True)):
        settings = ORDINARY | {"add_dummy_prefix": True, "treat_whitespace_as_suffix": suffix}
        tokenizer = sentencepiece(tmp_path / f"{number}.model", texts, model_type="bpe", **settings)
        if suffix:  # each part between two U+2581 gets its own space then, which only these texts have
            assert document_bytes(tokenizer, tokenizer.encode(" a b ")) == 5
        else:
            check_exact(tokenizer, texts)
        assert byte_lengths(tokenizer)[tokenizer.encode("ab")].sum() == 3


def test_byte_level_bpe_is_exact(texts, tmp_path):
    tokenizer = byte_level(tmp_path / "t", texts)
    check_exact(tokenizer, texts)
    lengths = byte_lengths(tokenizer)
    assert lengths[tokenizer.id_of("Ġ")] == lengths[tokenizer.id_of("é")] == 1  # of the byte alphabet
    assert lengths[tokenizer.id_of("<é user>")] == 9 and lengths[tokenizer.eod] == 0


def test_an_exported_tokenizer_counts_the_same(texts, tmp_path):
    from elas.hf.tokenizer import write_tokenizer

    for number, prefix in enumerate((False, True)):
        for model_type in ("bpe", "unigram"):
            name = f"{model_type}{number}"
            settings = ORDINARY | {"add_dummy_prefix": prefix, "model_type": model_type}
            ours = sentencepiece(tmp_path / f"{name}.model", texts, **settings)
            (tmp_path / name).mkdir()
            write_tokenizer(tmp_path / f"{name}.model", tmp_path / name, 256)
            again = load_tokenizer(tmp_path / name)
            assert np.array_equal(byte_lengths(again), byte_lengths(ours)), name
            check_exact(again, texts)


def test_metaspace_with_byte_fallback_is_exact(texts, tmp_path):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE(byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    special = ["</s>", *(f"<0x{i:02X}>" for i in range(256))]
    fast.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False))
    fast.add_tokens([AddedToken("日本", normalized=False)])
    facts = json.loads(fast.to_str())  # bytes are pieces, which trainers cannot say
    facts["added_tokens"] = [token for token in facts["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = hugging_face(tmp_path / "t", Tokenizer.from_str(json.dumps(facts)), eos_token="</s>")
    for text in [*texts, " a", "  two  spaces\tünïcode 日本語 😀 e\u0301", "\x00\r\n"]:
        ids = tokenizer.encode(text)
        assert byte_lengths(tokenizer)[ids].sum() == document_bytes(tokenizer, ids) == len(text.encode()), text[:40]
    assert inexact_because(tokenizer) == r"'x\u2581y' of 5 bytes counts as 3"  # it takes U+2581 for a space
    assert byte_lengths(tokenizer)[tokenizer.eod] == 0


def test_what_is_not_exact_is_said(texts, tmp_path):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    lossy = sentencepiece(tmp_path / "lossy.model", texts, model_type="bpe", normalization_rule_name="nmt_nfkc")
    assert inexact_because(lossy) is not None  # collapses spaces
    unknown = sentencepiece(tmp_path / "u.model", texts, model_type="bpe", **ORDINARY | {"byte_fallback": False})
    assert inexact_because(unknown).endswith("Two Spaces\\r\\n' of 38 bytes counts as 37")  # no piece for the \\r
    assert document_bytes(unknown, unknown.encode("a日b")) == 2
    composed = byte_level(tmp_path / "nfc", texts, normalizer=normalizers.NFC())
    assert inexact_because(composed) == r"'e\u0301' of 3 bytes counts as 2"
    spaced = byte_level(tmp_path / "spaced", texts, add_prefix_space=True)
    assert inexact_because(spaced) == "' a' of 2 bytes counts as 1"
    assert document_bytes(spaced, spaced.encode("ab c")) == 4

    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False)
    special = {"special_tokens": ["[UNK]", "[SEP]"], "show_progress": False}
    words.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=600, **special))
    pieces = hugging_face(tmp_path / "words", words, unk_token="[UNK]", eos_token="[SEP]")
    assert inexact_because(pieces) is not None
    assert document_bytes(pieces, pieces.encode("return self")) == len("return self")
