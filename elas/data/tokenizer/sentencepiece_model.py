"""A SentencePiece model as a tokenizer, with special tokens from the files beside it."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from elas.data.tokenizer.special_tokens import NamedTokens, hide_pieces, missing_eod, present, without_prefix
from elas.errors import UserError

# SentencePiece encodes spaces as U+2581 and decodes every U+2581, even a literal one, to a space.
SPACE_MARK = "\u2581"


class SentencePieceTokenizer:
    """A SentencePiece model; `decode(encode(text)) == text` for every text when `train_tokenizer` made it.

    Args:
        model: path of the `.model` file.
        named: tokens named by other files of the folder; they take precedence over the model's own.

    Attributes:
        sha256: digest of everything that determines ids: the model, and the tokens named beside it.
        special_ids: ids that text must not yield, even if it spells their tokens.
        unk: the unknown id.

    Raises:
        UserError: not a SentencePiece model.
    """

    def __init__(self, model: Path, named: NamedTokens | None = None):
        self.path, self._named = Path(model), named or NamedTokens()
        data = self.path.read_bytes()
        try:
            self._pieces = _Pieces(data)
        except RuntimeError as error:
            raise UserError(
                f"tokenizer {model}: not a SentencePiece model; train one with elas prep tokenizer"
            ) from error
        self._sp = self._pieces.sp
        self._added = {content: n for content, n in self._named.added.items() if n >= self._sp.vocab_size()}
        self.sha256 = hashlib.sha256(data).hexdigest()
        if self._named.special or self._added:
            beside = json.dumps([self.sha256, sorted(self._named.special), sorted(self._added.items())])
            self.sha256 = hashlib.sha256(beside.encode()).hexdigest()
        # Identified by content, not by path: Megatron's index caches stay valid when the folder moves.
        self.unique_identifiers = OrderedDict({"class": type(self).__name__, "sha256": self.sha256})
        self.unk: int | None = self._sp.unk_id()
        controls = {i for i in range(self._sp.vocab_size()) if self._sp.is_control(i)}
        named_ids = {i for token in self._named.special if (i := self.id_of(token)) is not None}
        self.special_ids = frozenset(controls | named_ids | set(self._added.values())) - {self.unk}

    @property
    def identities(self) -> set[str]:
        """Digests of the tokenizers that yield these ids: its own."""
        return {self.sha256}

    @property
    def model(self) -> bytes:
        """The serialised model."""
        return self._pieces.data

    @property
    def added(self) -> dict[str, int]:
        """Content → id of the tokens beyond the model's pieces."""
        return dict(self._added)

    @property
    def has_ordinary_added_tokens(self) -> bool:
        """Whether some tokens named beside the model are not special, so that text may contain them."""
        return not self._named.special.issuperset(self._added)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without beginning or end ids."""
        return self._pieces.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of every text."""
        return [self._pieces.encode(text) for text in texts]

    def encoder_without(self, ids: Collection[int]) -> Callable[[str], list[int]] | None:
        """An `encode` that avoids the pieces `ids`; None if the model is invalid without them."""
        try:
            return _Pieces(hide_pieces(self._pieces.data, ids)).encode
        except RuntimeError:  # one of the 256 byte pieces is missing
            return None

    def id_of(self, token: str) -> int | None:
        """Id of a piece or of a token named beside the model; None if it does not exist."""
        if token in self._added:
            return self._added[token]
        token_id = self._sp.piece_to_id(token)
        return token_id if self._sp.id_to_piece(token_id) == token else None

    def token_of(self, token_id: int) -> str:
        """The piece or token of an id; empty if the id is unused."""
        return self.inv_vocab.get(token_id, "")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without special tokens."""
        return self._sp.decode([i for i in map(int, ids) if i not in self.special_ids])

    def spelling(self, ids: Sequence[int]) -> str:
        """Text of `ids`, including the names of special tokens."""
        size = self._sp.vocab_size()
        mixed: Any = [int(i) if i < size else self.token_of(int(i)) for i in ids]  # which the stub does not know
        return self._sp.decode(mixed)

    @property
    def vocab_size(self) -> int:
        """Number of ids, including added tokens and gaps."""
        return max([self._sp.vocab_size() - 1, *self._added.values()]) + 1

    @property
    def eod(self) -> int:
        """End-of-document id: the tokenizer's end-of-sequence id.

        Raises:
            UserError: the tokenizer has no end-of-sequence id.
        """
        token_id = self._role("eos", self._sp.eos_id())
        if token_id < 0:
            raise missing_eod(self.path, "train it with one")
        return token_id

    @property
    def eos(self) -> int:
        """The same id as `eod`."""
        return self.eod

    @property
    def bos(self) -> int:
        """Beginning-of-sequence id; raises `NotImplementedError` without one."""
        return present(self._role("bos", self._sp.bos_id()), "bos")

    @property
    def pad(self) -> int:
        """Padding id, never equal to `eod`, which would exclude the ends of documents from the loss.

        Raises:
            NotImplementedError: the tokenizer has no such id.
        """
        pad = self._role("pad", self._sp.pad_id())
        return present(None if pad == self._role("eos", self._sp.eos_id()) else pad, "pad")

    def _role(self, role: str, own: int) -> int:
        """Id of the token named for a role beside the model, else `own`."""
        if role not in self._named.roles:
            return own
        token = self._named.roles[role]
        token_id = self.id_of(token)
        if token_id is None:
            why = f"tokenizer_config.json or special_tokens_map.json names {role}_token {token!r}, which does not exist"
            raise UserError(f"tokenizer {self.path.parent}: {why}; fix that file")
        return token_id

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Piece → id."""
        return {piece: i for i, piece in self.inv_vocab.items()}

    @cached_property
    def inv_vocab(self) -> dict[int, str]:
        """Id → piece."""
        pieces = {i: self._sp.id_to_piece(i) for i in range(self._sp.vocab_size())}
        return pieces | {i: content for content, i in self._added.items()}


class _Pieces:
    """Encodes with a serialised model; a literal U+2581 is encoded as its bytes if the model has byte pieces."""

    def __init__(self, data: bytes):
        from sentencepiece import SentencePieceProcessor

        self.data = data
        self.sp = SentencePieceProcessor(model_proto=data)
        names = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
        ids = [self.sp.piece_to_id(name) for name in names]
        self._mark_ids = ids if all(map(self.sp.is_byte, ids)) else None

    def encode(self, text: str) -> list[int]:
        if SPACE_MARK not in text or self._mark_ids is None:
            return self.sp.encode(text)
        first, *rest = text.split(SPACE_MARK)
        ids = self.sp.encode(first)
        for part in rest:
            ids += self._mark_ids + self._continuation.encode(part)
        return ids

    @cached_property
    def _continuation(self):
        """The processor for text after the first part: foreign models may prepend a space to whatever they encode."""
        from sentencepiece import SentencePieceProcessor

        pieces = self.sp.encode("x", out_type=str)
        if pieces and pieces[0].startswith(SPACE_MARK):
            return SentencePieceProcessor(model_proto=without_prefix(self.data))
        return self.sp
