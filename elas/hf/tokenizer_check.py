"""Compares an exported tokenizer with its source: ids and decoded text, on texts that tokenizers disagree about."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from elas.data.tokenizer import HFTokenizer, SentencePieceTokenizer, Tokenizer
from elas.data.tokenizer.huggingface import auto_tokenizer
from elas.data.tokenizer.special_tokens import model_proto
from elas.errors import UserError
from elas.hf.sentencepiece_json import UNIGRAM

TEXTS = (
    "The quick brown fox jumps over the lazy dog. It's 3.14, isn't it?",
    "def f(x):\n    if x:\n\treturn  x  # two  spaces\r\n\n\n",
    "        return {'key': [1, 22, 333], \"a_b\": None}\n" * 3,
    " leading", "  two leading", "trailing ", "trailing  ", " ", "     ",
    "\n", "\n\n\n", "\t", "\tx\t\ty", "a\n b\n  c", "a\r\nb\rc",
    "Ünïcode naïve façade ŒÆß İı Ǆ ﬁ ½ Ａ ㎏",
    "e\u0301 o\u0302\u0301 \u1112\u1161\u11ab ｶﾞ",  # characters of several code points
    "a\u00a0b\u3000c\u200bd\u200de\ufeff",  # other spaces, and none
    "日本語のテキスト、中文文本。한국어 ไทย عربى עברית हिन्दी",
    "😀 👨\u200d👩\u200d👧 🇩🇪 ☺\ufe0f a😀b",
    "\x00\x01\x07\x1b[0m\x7f\x85\u2028x", "\U0001f680\U000e0041\ue000",
    "x\u2581y", "\u2581", "\u2581\u2581 a", "a \u2581 b",
    "<0x0A><0xE2>\\x0a &lt; <|",
    "=" * 40, "-" * 77 + "\n" + "0" * 33, "aAaA" * 20,
    "https://example.org/a?b=c&d=%20#e 192.168.0.1 1,000,000 2024-01-01T00:00:00Z",
)  # fmt: skip
_PIECES, _SPECIAL = 2000, 100


def compare(ours: Tokenizer, theirs: HFTokenizer, folder: Path) -> dict[str, int]:
    """Compare ids and decoded texts on `TEXTS`, special tokens, and pieces of the vocabulary.

    Args:
        ours: the source.
        theirs: the exported one, opened from `folder`.
        folder: opened again with `AutoTokenizer`, as its users will.

    Returns:
        `texts` that were compared; `ties`: how many have other ids whose scores are equal to single precision.

    Raises:
        UserError: they differ; with the text and both.
    """
    auto = auto_tokenizer(folder)
    hidden = sorted(ours.special_ids | ({ours.unk} if ours.unk is not None else set()))
    special = [token for i in hidden if (token := ours.token_of(i))]
    ties, is_tie = 0, _ties_of(ours)
    spelled = [f"x{token} {token}y" for token in special[:_SPECIAL]]
    texts = [*TEXTS, *_around(_sample(ours)), *spelled]
    for text in texts:
        ids = ours.encode(text)
        plain = not any(token in text for token in special)
        others = auto(text, verbose=False)["input_ids"] if plain else theirs.encode(text)
        if others != ids and not is_tie(ids, others):
            raise _differ(ours, f"the ids of {_quoted(text)}", _short(ids), _short(others))
        ties += others != ids
        decoded = auto.decode(ids, skip_special_tokens=True)
        if ours.unk not in ids and decoded != ours.decode(ids):
            raise _differ(ours, f"the text of {_short(ids)}", _quoted(ours.decode(ids)), _quoted(decoded))
    for token in special:
        if (number := auto.convert_tokens_to_ids(token)) != ours.id_of(token):
            raise _differ(ours, f"the id of {token!r}", str(ours.id_of(token)), str(number))
    return {"texts": len(texts), "ties": ties}


def _sample(ours: Tokenizer) -> list[str]:
    """Pieces, evenly over the vocabulary, as text."""
    step = max(1, ours.vocab_size // _PIECES)
    numbers = [i for i in range(0, ours.vocab_size, step) if i not in ours.special_ids and i != ours.unk]
    return [text for i in numbers if (text := ours.decode([i]))]


def _around(pieces: list[str]) -> list[str]:
    """Texts of pieces: four after each other, and each three times, where merges of one piece may overlap."""
    groups = ["".join(pieces[i : i + 4]) for i in range(0, len(pieces), 4)]
    return groups + [piece * 3 for piece in pieces[::8]]


def _ties_of(ours: Tokenizer) -> Callable[[Sequence[int], Sequence[int]], bool]:
    """Whether two lists of ids are cuts of one text with equal scores, which only unigram models have.

    Equal means to within the rounding of SentencePiece's sums: 2⁻²⁴ of the sum at each step.
    """
    if not isinstance(ours, SentencePieceTokenizer):
        return lambda first, second: False
    proto = model_proto(ours.model)
    if proto.trainer_spec.model_type != UNIGRAM:
        return lambda first, second: False
    scores = [piece.score for piece in proto.pieces]

    def is_tie(first: Sequence[int], second: Sequence[int]) -> bool:
        if max(*first, *second) >= len(scores) or ours.spelling(first) != ours.spelling(second):
            return False
        one, other = (sum(scores[i] for i in ids) for ids in (first, second))
        return abs(one - other) <= len(first) * 2**-24 * abs(one)

    return is_tie


def _differ(ours: Tokenizer, what: str, own: str, exported: str) -> UserError:
    why = f"{what} would be {exported} instead of {own}"
    return UserError(f"tokenizer {ours.path}: cannot be exported exactly: {why}; train or choose another")


def _quoted(text: str) -> str:
    return re.sub(" (?= )", r"\\x20", repr(text[:200]))  # a message keeps no runs of spaces


def _short(ids: Sequence[int]) -> str:
    return str(list(ids)) if len(ids) <= 60 else f"{str(list(ids[:60]))[:-1]}, …]"
