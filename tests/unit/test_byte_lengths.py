"""Bytes of tokens add up to the text's, for every kind of tokenizer that loses nothing."""

import pytest

from elas.data.tokenizer import load_tokenizer
from elas.data.tokenizer.byte_lengths import byte_lengths

TEXTS = ["words 144 of text\n", "  two  spaces\tünïcode 日本語 😀 é\u0301", "x\u2581y </s> a", " a", "\x00\r\n"]


def sum_of(tokenizer, text: str) -> int:
    return int(byte_lengths(tokenizer)[tokenizer.encode(text)].sum())


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"words {i * i} of text {i**3} ünïcode\n" * 40)
    return folder


@pytest.mark.parametrize("kind", ("bpe", "unigram"))
def test_sentencepiece_adds_up(texts, kind):
    from elas.data_prep.sources import Corpus
    from elas.data_prep.tokenizer_training import train_tokenizer

    train_tokenizer(Corpus([f"{texts}/*.txt"]), texts / kind, vocab_size=330, model_type=kind)
    tokenizer = load_tokenizer(texts / kind)
    for text in TEXTS:
        assert sum_of(tokenizer, text) == len(text.encode()), text
    lengths = byte_lengths(tokenizer)
    assert lengths[tokenizer.eod] == 0 and lengths[sorted(tokenizer.special_ids)].sum() == 0


@pytest.mark.parametrize("kind", ("bytes", "metaspace"))
def test_hugging_face_adds_up(texts, tmp_path, kind):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.BPE(byte_fallback=kind == "metaspace"))
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
    special = ["</s>"] + ([f"<0x{i:02X}>" for i in range(256)] if kind == "metaspace" else [])
    if kind == "bytes":
        own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        last = decoders.Metaspace(prepend_scheme="never")
        own.decoder = decoders.Sequence([decoders.ByteFallback(), last])
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    own.train([str(path) for path in texts.glob("*.txt")], trainer)
    own.add_tokens([AddedToken("日本", normalized=False)])
    PreTrainedTokenizerFast(tokenizer_object=own, eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS[:2] if kind == "metaspace" else TEXTS:
        assert sum_of(tokenizer, text) == len(text.encode()), text
    assert byte_lengths(tokenizer)[tokenizer.eod] == 0
