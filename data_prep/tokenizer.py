"""Tokenizers behind one interface: our SentencePiece models and Hugging Face folders.

Both offer what Megatron-core's `GPTDatasetConfig(tokenizer=…)` reads (`eod`, `pad`, `vocab_size`, `unique_identifiers`)
without deriving from its classes: importing those takes seconds, and every worker process would pay.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from elas.errors import UserError

MODEL_NAME = "tokenizer.model"
# SentencePiece writes spaces as U+2581 and reads every U+2581 back as a space, a literal one included.
_SPACE_MARK = "\u2581"


class SentencePieceTokenizer:
    """A SentencePiece model trained by `train_tokenizer`: `decode(encode(text)) == text` for every text.

    Args:
        model: path of the `.model` file.

    Raises:
        UserError: not a SentencePiece model.
    """

    def __init__(self, model: Path):
        from sentencepiece import SentencePieceProcessor

        data = Path(model).read_bytes()
        self.path = Path(model)
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self._sp = SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise UserError(
                f"tokenizer {model}: not a SentencePiece model; train one with elas prep tokenizer"
            ) from error
        # The content identifies it, not the path: Megatron's index caches stay valid when the folder moves.
        self.unique_identifiers = OrderedDict({"class": type(self).__name__, "sha256": self.sha256})
        self._mark_ids = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without beginning or end."""
        if _SPACE_MARK not in text:
            return self._sp.encode(text)
        first, *rest = text.split(_SPACE_MARK)
        ids = self._sp.encode(first)
        for part in rest:
            ids += self._mark_ids + self._sp.encode(part)
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of every text."""
        return [self.encode(text) for text in texts]

    def id_of(self, token: str) -> int | None:
        """Id of a piece; None where there is none."""
        token_id = self._sp.piece_to_id(token)
        return token_id if self._sp.id_to_piece(token_id) == token else None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; beginning, end and padding are nothing."""
        return self._sp.decode([int(i) for i in ids])

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._sp.vocab_size()

    @property
    def eod(self) -> int:
        """Id that ends a document.

        Raises:
            UserError: it has no end-of-sequence id.
        """
        if self._sp.eos_id() < 0:
            raise _no_eod(self.path, "train it with one")
        return self._sp.eos_id()

    @property
    def eos(self) -> int:
        """The same id as `eod`."""
        return self.eod

    @property
    def bos(self) -> int:
        """Id that begins a sequence."""
        return _present(self._sp.bos_id(), "bos")

    @property
    def pad(self) -> int:
        """Padding id."""
        return _present(self._sp.pad_id(), "pad")

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Piece → id."""
        return {piece: i for i, piece in self.inv_vocab.items()}

    @cached_property
    def inv_vocab(self) -> dict[int, str]:
        """Id → piece."""
        return {i: self._sp.id_to_piece(i) for i in range(self.vocab_size)}


class HFTokenizer:
    """A Hugging Face tokenizer folder; text that spells a special token (`</s>`) stays text.

    Args:
        folder: holds `tokenizer.json` or what `AutoTokenizer` reads.

    Raises:
        UserError: `AutoTokenizer` cannot read it.
    """

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer

        try:
            self._hf = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"tokenizer {folder}: AutoTokenizer cannot read it: {error}") from error
        self._fast = getattr(self._hf, "backend_tokenizer", None)
        if self._fast is not None:
            self._fast.encode_special_tokens = True
            self._fast.no_truncation()
            self._fast.no_padding()
        self.path = Path(folder)
        digest = hashlib.sha256()
        for file in sorted(self.path.glob("*token*")) + sorted(self.path.glob("vocab*")):
            digest.update(file.read_bytes())
        self.sha256 = digest.hexdigest()
        self.unique_identifiers = OrderedDict({"class": type(self).__name__, "sha256": self.sha256})
        self._vocab_size = max(self._hf.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without beginning or end."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of every text; twice as fast as one by one."""
        if self._fast is None:
            return [
                self._hf.encode(t, add_special_tokens=False, split_special_tokens=True, verbose=False) for t in texts
            ]
        try:
            return [encoded.ids for encoded in self._fast.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error:  # the library raises no class of its own
            raise UserError(f"tokenizer {self.path}: cannot encode every text: {error}") from error

    def id_of(self, token: str) -> int | None:
        """Id of a token; None where there is none."""
        return self._hf.get_vocab().get(token)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are nothing."""
        return self._hf.decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens and gaps included."""
        return self._vocab_size

    @property
    def eod(self) -> int:
        """Id that ends a document.

        Raises:
            UserError: it has no end-of-sequence id.
        """
        if self._hf.eos_token_id is None:
            raise _no_eod(self.path, "set it in tokenizer_config.json")
        return self._hf.eos_token_id

    @property
    def eos(self) -> int:
        """The same id as `eod`."""
        return self.eod

    @property
    def bos(self) -> int:
        """Id that begins a sequence."""
        return _present(self._hf.bos_token_id, "bos")

    @property
    def pad(self) -> int:
        """Padding id; never that of `eod`, or training would leave the ends of documents out of the loss."""
        return _present(None if self._hf.pad_token_id == self._hf.eos_token_id else self._hf.pad_token_id, "pad")

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Piece → id."""
        return self._hf.get_vocab()

    @cached_property
    def inv_vocab(self) -> dict[int, str]:
        """Id → piece."""
        return {i: piece for piece, i in self.vocab.items()}


def load_tokenizer(path: str | Path) -> SentencePieceTokenizer | HFTokenizer:
    """Open a tokenizer.

    Args:
        path: a SentencePiece `.model` file, a folder with `tokenizer.model`, or a Hugging Face tokenizer folder.
            A folder with both is read as Hugging Face's when it has a `tokenizer.json`.

    Raises:
        UserError: nothing there that can be read.
    """
    path = Path(path)
    if path.is_file():
        return SentencePieceTokenizer(path)
    if (path / "tokenizer.json").is_file():
        return HFTokenizer(path)
    if (path / MODEL_NAME).is_file():
        return SentencePieceTokenizer(path / MODEL_NAME)
    if (path / "tokenizer_config.json").is_file():
        return HFTokenizer(path)
    raise UserError(f"tokenizer {path}: no {MODEL_NAME} and no tokenizer.json there; make one with elas prep tokenizer")


def _present(token_id: int | None, what: str) -> int:
    # NotImplementedError is how Megatron's own tokenizers say that they lack one; it then goes without.
    if token_id is None or token_id < 0:
        raise NotImplementedError(f"the tokenizer has no {what} id")
    return token_id


def _no_eod(path: Path, fix: str) -> UserError:
    why = "has no end-of-sequence token, which ends documents"
    return UserError(f"tokenizer {path}: {why}; {fix}, name another with --eod-token, or give --append-eod no")
