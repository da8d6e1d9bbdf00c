"""How many bytes of text each id stands for, so that bits per byte need the ids of a corpus alone.

Exact, for every text, are SentencePiece models with byte pieces and without normalisation (all that `elas prep
tokenizer` makes) and byte-level BPE without a normalizer. Not exact are

- characters without a piece, where there are no byte pieces: an unknown id counts 0 bytes;
- a tokenizer that changes the text (NFKC, case, runs of spaces): counted is the text that it decodes to;
- one that prepends a space only where a text does not start with one;
- WordPiece and others that lose where spaces were: counted is what their decoder inserts.

`inexact_because` tries a tokenizer on texts with all of these. The dummy space that SentencePiece prepends (or appends)
to every text is no byte of it; `byte_lengths` includes it in its piece, and `document_bytes` subtracts it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from elas.data.tokenizer import HFTokenizer, SentencePieceTokenizer, Tokenizer
from elas.data.tokenizer.sentencepiece_model import SPACE_MARK
from elas.data.tokenizer.special_tokens import model_proto

_PROBES = (
    "def f(x):\n    return  x\t# Two Spaces\r\n",
    " a", "  a", "a ", "\n", "It's 3.14 (isn't it?) .",
    "na\u00efve \ufb01 \uff21 \u00bd", "e\u0301", "\u65e5\u672c\u8a9e", "\U0001f600", "x\u2581y", "\x00\x01", "\ue000",
)  # fmt: skip


def byte_lengths(tokenizer: Tokenizer, vocab_size: int = 0) -> np.ndarray:
    """Bytes of UTF-8 text that each id stands for.

    Special tokens, ids without a piece and the unknown id count 0. An ordinary piece that ends documents
    (`--eod-token`) counts its bytes: set its entry to 0.

    Args:
        tokenizer: of any kind.
        vocab_size: of the model; its further ids have 0 bytes.

    Returns:
        int32 `[max(tokenizer.vocab_size, vocab_size)]`.
    """
    lengths = _table(tokenizer).lengths
    return np.pad(lengths, (0, max(0, vocab_size - len(lengths))))


def document_bytes(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> int:
    """Bytes of UTF-8 text of a whole document, given all of its ids, with or without beginning and end ids."""
    table, ids = _table(tokenizer), np.asarray(ids, np.int64)
    lengths = table.lengths[ids]
    total = int(lengths.sum(dtype=np.int64))
    if table.dummy is None or total == 0:
        return total
    text = ids[lengths > 0]
    return total - int(table.starts[text[0]] if table.dummy == "start" else table.ends[text[-1]])


def inexact_because(tokenizer: Tokenizer) -> str | None:
    """A text of which not all bytes, or more, are counted; None if there is none among texts of many kinds."""
    for text in _PROBES:
        counted, size = document_bytes(tokenizer, tokenizer.encode(text)), len(text.encode())
        if counted != size:
            return f"{text!a} of {size} bytes counts as {counted}"
    return None


@dataclass(frozen=True)
class _Table:
    """Facts per id, `[vocab_size]`: bytes, whether the text starts or ends with a space; where a dummy space is put."""

    lengths: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    dummy: str | None


@lru_cache(maxsize=4)
def _table(tokenizer: Tokenizer) -> _Table:
    text_of = _sentencepiece(tokenizer) if isinstance(tokenizer, SentencePieceTokenizer) else _huggingface(tokenizer)
    size = tokenizer.vocab_size
    lengths, starts, ends = np.zeros(size, np.int32), np.zeros(size, bool), np.zeros(size, bool)
    for token_id, token in tokenizer.inv_vocab.items():
        if token_id in tokenizer.special_ids or token_id == tokenizer.unk:
            continue
        text = text_of(token_id, token)
        lengths[token_id] = len(text)
        starts[token_id], ends[token_id] = text[:1] == b" ", text[-1:] == b" "
    one = tokenizer.encode("x")
    dummy = None
    if lengths[one].sum() == 2:
        dummy = "start" if starts[one[0]] else "end" if ends[one[-1]] else None
    return _Table(lengths, starts, ends, dummy)


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> Callable[[int, str], bytes]:
    """The text of a piece."""
    proto = model_proto(tokenizer.model)
    pieces, kinds = proto.pieces, type(proto).SentencePiece
    silent = {kinds.CONTROL, kinds.UNKNOWN}

    def text_of(token_id: int, token: str) -> bytes:
        kind = pieces[token_id].type if token_id < len(pieces) else kinds.NORMAL
        if kind in silent:
            return b""
        if kind == kinds.BYTE:
            return bytes([int(token[3:5], 16)])  # <0x0A>
        return token.replace(SPACE_MARK, " ").encode()

    return text_of


def _huggingface(tokenizer: HFTokenizer) -> Callable[[int, str], bytes]:
    """The text of a token: by the byte alphabet where there is one, else by the decoder, after another token."""
    added, parts = tokenizer.added_ids, tokenizer.part_types
    alphabet = _byte_alphabet() if "ByteLevel" in parts else {}
    bytes_of = {f"<0x{n:02X}>": bytes([n]) for n in range(256)} if "ByteFallback" in parts else {}

    def text_of(token_id: int, token: str) -> bytes:
        if token_id in added:
            return token.encode()
        if token in bytes_of:
            return bytes_of[token]
        if alphabet and alphabet.keys() >= set(token):
            return bytes(alphabet[letter] for letter in token)
        # After another token, since decoders drop a space at the start of a text.
        return tokenizer.join(["x", token]).encode()[1:]

    return text_of


def _byte_alphabet() -> dict[str, int]:
    """Character → byte of byte-level vocabularies: printable bytes are themselves, others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [n for n in range(256) if n not in printable]
    return {chr(n): n for n in printable} | {chr(256 + i): n for i, n in enumerate(others)}
