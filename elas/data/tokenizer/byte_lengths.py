"""Bytes of text that each token stands for, so that losses of models with different tokenizers compare.

The sum over a text's ids is the text's length in UTF-8, if the tokenizer loses nothing: so it is with those of
`elas prep tokenizer`, and with byte-level BPE. Where it does lose something, the sum is that of the decoded text:
normalised characters, a space that is prepended to every text, and unknown characters, which count nothing.
"""

import json
import re

import numpy as np

from elas.data.tokenizer import HFTokenizer, Tokenizer
from elas.data.tokenizer.sentencepiece_model import SPACE_MARK

_BYTE = re.compile("<0x[0-9A-F]{2}>")


def byte_lengths(tokenizer: Tokenizer, vocab_size: int = 0) -> np.ndarray:
    """Bytes of each id, int64; 0 for special, unknown and unused ids.

    Args:
        tokenizer: any.
        vocab_size: of the model, whose further ids have 0 bytes.
    """
    lengths = np.zeros(max(tokenizer.vocab_size, vocab_size), np.int64)
    of_piece = _of_huggingface(tokenizer) if isinstance(tokenizer, HFTokenizer) else _of_sentencepiece
    for number, piece in tokenizer.inv_vocab.items():
        if number not in tokenizer.special_ids and number != tokenizer.unk:
            lengths[number] = of_piece(number, piece)
    return lengths


def _of_sentencepiece(_number: int, piece: str) -> int:
    return 1 if _BYTE.fullmatch(piece) else len(piece.replace(SPACE_MARK, " ").encode())


def _of_huggingface(tokenizer: HFTokenizer):
    backend = tokenizer.backend_json()
    facts = json.loads(backend) if backend else {}
    added = {token["id"] for token in facts.get("added_tokens", ())}
    is_byte_level = '"ByteLevel"' in json.dumps([facts.get("decoder"), facts.get("pre_tokenizer")])
    before = next(i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).isalpha())
    start = len(tokenizer.decode([before]).encode())

    def of(number: int, piece: str) -> int:
        if is_byte_level and number not in added:
            return len(piece)  # one character for each byte
        if _BYTE.fullmatch(piece):
            return 1
        return len(tokenizer.decode([before, number]).encode()) - start  # some decoders strip the first space

    return of
