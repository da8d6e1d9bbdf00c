"""A SentencePiece model as a `tokenizers.Tokenizer`, the content of a `tokenizer.json`.

transformers' own converters leave out what SentencePiece does outside of the model: they strip and collapse spaces by
other rules, take U+2581 in a text for a space, prepend the dummy space after every added token, match the text `<0x0A>`
as that byte, and give the character map graphemes instead of code points. Here a chain of normalizers brings the text
into SentencePiece's form, and pieces contain plain spaces instead of U+2581, so that a U+2581 of the text remains one
character without a piece, which falls back to its bytes.

Where two roles of one string must be distinguished, a noncharacter of Unicode (U+FDD1 on) replaces it between
normalizer and decoder; such a piece has that name in the vocabulary.
"""

from collections.abc import Set

from elas.data.tokenizer.sentencepiece_model import SPACE_MARK
from elas.data.tokenizer.special_tokens import model_proto
from elas.errors import UserError
from elas.hf.sentencepiece_text import Normalizers, StandIns

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE, WORD, CHAR = range(1, 5)
_NEVER = "\ufdd0"  # a noncharacter, in pieces that no text contains


def to_backend(model: bytes, added: dict[str, int], special: Set[int]):
    """Convert a model.

    Args:
        model: a serialised SentencePiece model: unigram, BPE or char.
        added: content → id of the tokens beyond the model's pieces.
        special: ids that become special tokens of the result, which finds them in a text unless that is switched off
            with `encode_special_tokens`.

    Returns:
        A `tokenizers.Tokenizer`.

    Raises:
        UserError: a model of whole words.
    """
    from tokenizers import AddedToken, Tokenizer, decoders

    proto = model_proto(model)
    kind, spec = proto.trainer_spec.model_type, proto.normalizer_spec
    if kind == WORD:
        raise UserError("tokenizer: a SentencePiece model of whole words has no tokenizer.json; train unigram or BPE")
    pieces = [_spaced(p.piece) if spec.escape_whitespaces else p.piece for p in proto.pieces]
    types = [p.type for p in proto.pieces]
    symbols = [piece for piece, of in zip(pieces, types) if of == USER_DEFINED and _NEVER not in piece]
    names, text = StandIns(), Normalizers(model)
    # A text is cut at added tokens before its normalizers run, so they require normalizers that act on characters.
    split = kind != UNIGRAM and text.is_plain and any(len(symbol) > 1 for symbol in symbols)
    kept = set() if kind == UNIGRAM or split else {symbol for symbol in symbols if len(symbol) > 1}
    steps = text.steps(symbols, kept, names)
    if kind == UNIGRAM:
        hidden = {i for i, of in enumerate(types) if of not in (NORMAL, USER_DEFINED, UNUSED)} | special
        steps += [names.step(letter) for letter in _distinguishing(pieces, hidden, types)]
        vocabulary = [names.of(piece) if i not in hidden else piece for i, piece in enumerate(pieces)]
        backend = Tokenizer(_unigram(proto, vocabulary, added))
    else:
        vocabulary = [names.of(piece) if piece in kept else piece for piece in pieces]
        backend = Tokenizer(_bpe(proto, vocabulary, symbols, added))
    backend.normalizer = text.sequence(steps)
    fallback = [decoders.ByteFallback()] if proto.trainer_spec.byte_fallback else []
    restore = [decoders.Replace(other, original) for original, other in [*names.taken.items(), (" ", _NEVER)]]
    # SentencePiece's decoder drops one leading space even if the dummy space is at the end.
    strip = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([*fallback, decoders.Fuse(), *restore, *strip])
    contents = [content for i in sorted(special) if (content := backend.id_to_token(i))]
    backend.add_special_tokens([AddedToken(content, normalized=False, special=True) for content in contents])
    if split:
        backend.add_tokens([AddedToken(symbol, normalized=False, special=False) for symbol in symbols])
    return backend


def _spaced(piece: str) -> str:
    """The piece with plain spaces; one with plain spaces before matches no text, whose spaces are U+2581."""
    return piece.replace(" ", _NEVER).replace(SPACE_MARK, " ")


def _distinguishing(pieces: list[str], hidden: set[int], types: list[int]) -> list[str]:
    """Characters to rename in text and pieces, so that no text contains one of the pieces `hidden`.

    A unigram model of `tokenizers` matches every piece, SentencePiece only normal and user-defined ones. Renamed are
    characters that are pieces themselves, usually `<` alone; others would fall back to the bytes of their stand-ins.
    """
    single = {piece for i, piece in enumerate(pieces) if len(piece) == 1 and i not in hidden and types[i] == NORMAL}
    chosen: list[str] = []
    left = [pieces[i] for i in hidden if i < len(pieces)]
    while left:
        counts = {letter: sum(letter in piece for piece in left) for letter in sorted(single & set("".join(left)))}
        if not counts:
            break
        chosen.append(max(counts, key=counts.__getitem__))
        left = [piece for piece in left if chosen[-1] not in piece]
    return chosen


def _unigram(proto, vocabulary: list[str], added: dict[str, int]):
    """`models.Unigram`; ids without a piece get one that no text contains."""
    from tokenizers import models

    normal = [p.score for p in proto.pieces if p.type == NORMAL]
    highest = max(normal, default=0.0)
    scored = []
    for name, piece in zip(vocabulary, proto.pieces):
        score = piece.score
        if piece.type == USER_DEFINED:  # a bonus by length in bytes, measured with sentencepiece 0.2.3
            score = 0.1 * (len(piece.piece.encode()) - 1)
        elif piece.type == UNUSED:
            name = _NEVER + name
        elif piece.type != NORMAL:  # the lowest score sets the price of unknown characters
            score = highest
        scored.append((name, score))
    at = {number: content for content, number in added.items()}
    for number in range(len(scored), max(at, default=-1) + 1):
        scored.append((at.get(number, f"{_NEVER}{number}"), highest))
    return models.Unigram(scored, unk_id=proto.trainer_spec.unk_id, byte_fallback=proto.trainer_spec.byte_fallback)


def _bpe(proto, vocabulary: list[str], symbols: list[str], added: dict[str, int]):
    """`models.BPE`, which merges by rank of a pair; SentencePiece by score of the merged piece, then from the left."""
    from tokenizers import models

    ids = {name: i for i, name in enumerate(vocabulary)} | added
    normal = {name: p.score for name, p in zip(vocabulary, proto.pieces) if p.type == NORMAL}
    for symbol in symbols:  # are never merged
        normal.pop(symbol, None)
    merges = []
    for name, score in normal.items():
        cuts = range(1, len(name)) if proto.trainer_spec.model_type == BPE else ()
        for cut in cuts:
            left, right = name[:cut], name[cut:]
            if left in normal and right in normal:
                merges.append((-score, ids[name], cut, left, right))
    merges.sort(key=lambda merge: merge[:3])
    return models.BPE(
        vocab=ids,
        merges=[(left, right) for *_, left, right in merges],
        unk_token=vocabulary[proto.trainer_spec.unk_id],
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )
