"""Special tokens named by a tokenizer folder's files, and encoders that never produce them from text.

A vocabulary may contain a special token as an ordinary piece: a Unigram model then encodes a text that spells `</s>` as
that token. Renaming the piece to a string that no text contains keeps all other pieces and all ids, and the text is
encoded with other pieces.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from elas.errors import UserError

_HIDDEN = "\ufdd0"  # a noncharacter: Unicode reserves it for internal use, so it does not occur in exchanged text
_ROLES = ("bos", "eos", "pad")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class NamedTokens:
    """Tokens named beside a SentencePiece model by three JSON files, see `named_tokens`.

    Args:
        roles: content of the `bos`, `eos` and `pad` tokens, where named.
        special: content of every special token.
        added: content → id of the tokens beyond the model's own pieces, special or not.
    """

    roles: dict[str, str] = field(default_factory=dict)
    special: frozenset[str] = frozenset()
    added: dict[str, int] = field(default_factory=dict)


def named_tokens(folder: Path) -> NamedTokens:
    """Read `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`; any of them may be missing.

    `tokenizer_config.json` takes precedence.

    Raises:
        UserError: a file is damaged.
    """
    roles, special, added = {}, set(), {}
    added.update(_object(folder / "added_tokens.json"))
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        facts = _object(folder / name)
        for number, token in (facts.get("added_tokens_decoder") or {}).items():
            added[token["content"]] = int(number)
            if token.get("special"):
                special.add(token["content"])
            else:  # overrides the other file
                special.discard(token["content"])
        for role in _ROLES:
            if content := _content(facts.get(f"{role}_token")):
                roles[role] = content
        for key in _LISTS:
            named = facts.get(key) or ()
            special.update(filter(None, map(_content, named.values() if isinstance(named, dict) else named)))
    return NamedTokens(roles, frozenset(special | set(roles.values())), added)


def _object(path: Path) -> dict:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {path}: cannot be read ({error}); fix the file or remove it") from None
    if not isinstance(facts, dict):
        raise UserError(f"tokenizer {path}: not a JSON object; fix the file or remove it")
    return facts


def _content(token: object) -> str | None:
    """The content of a token given as a string or as `{"content": text, …}`."""
    if isinstance(token, dict):
        return token.get("content")
    return token if isinstance(token, str) else None


def model_proto(model: bytes) -> Any:
    """A serialised SentencePiece model as a protobuf message, whose class exists at run time only."""
    from sentencepiece import sentencepiece_model_pb2

    generated: Any = sentencepiece_model_pb2
    return generated.ModelProto.FromString(model)


def hide_pieces(model: bytes, ids: Collection[int]) -> bytes:
    """A serialised SentencePiece model in which no text yields the pieces `ids`; all ids are unchanged."""
    proto = model_proto(model)
    for number in ids:
        if number < len(proto.pieces):
            proto.pieces[number].piece = _HIDDEN + proto.pieces[number].piece
    return proto.SerializeToString()


def without_prefix(model: bytes) -> bytes:
    """A serialised SentencePiece model that prepends no space to a text and keeps spaces at its ends."""
    proto = model_proto(model)
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()


def hide_in_backend(backend: str, ids: Collection[int]) -> str:
    """The JSON of a `tokenizers.Tokenizer` in which no text yields the pieces and added tokens `ids`."""
    facts = json.loads(backend)
    model = facts["model"]
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: [piece, score] at index id
        for number in ids:
            if number < len(vocab):
                vocab[number][0] = _HIDDEN + vocab[number][0]
    else:
        hidden = {piece for piece, number in vocab.items() if number in ids}
        model["vocab"] = {_HIDDEN + piece if piece in hidden else piece: number for piece, number in vocab.items()}
        if model.get("unk_token") in hidden:  # referenced by content, which must exist in the vocabulary
            model["unk_token"] = _HIDDEN + model["unk_token"]
        if "merges" in model:  # may only refer to pieces of the vocabulary
            pairs = (tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"])
            model["merges"] = [pair for pair in pairs if not hidden & {*pair, "".join(pair)}]
    for token in facts["added_tokens"]:
        if token["id"] in ids:
            token["content"] = _HIDDEN + token["content"]
    # A post-processor template refers to tokens by name, and is not used for plain text.
    facts |= {"post_processor": None, "truncation": None, "padding": None}
    return json.dumps(facts)


def cut_inside(text: str, contents: Collection[str]) -> list[str]:
    """Cut `text` after the first character of every occurrence of a string in `contents`."""
    cuts = set()
    for content in contents:
        at = text.find(content) if len(content) > 1 else -1
        while at >= 0:
            cuts.add(at + 1)
            at = text.find(content, at + 1)
    edges = [0, *sorted(cuts), len(text)]
    return [text[begin:end] for begin, end in pairwise(edges)]


def present(token_id: int | None, what: str) -> int:
    """The id; raises `NotImplementedError` without one, as Megatron's own tokenizers do and its datasets expect."""
    if token_id is None or token_id < 0:
        raise NotImplementedError(f"the tokenizer has no {what} id")
    return token_id


def missing_eod(path: Path, fix: str) -> UserError:
    """The error for a tokenizer without an end-of-sequence token."""
    why = "has no end-of-sequence token to end documents with"
    return UserError(f"tokenizer {path}: {why}; {fix}, name another with --eod-token, or give --append-eod no")
