"""A Hugging Face tokenizer folder as a tokenizer."""

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from pathlib import Path

from elas.data.tokenizer.special_tokens import cut_inside, hide_in_backend, missing_eod, present
from elas.errors import UserError

# Texts that library versions may encode differently without a changed file; their ids are part of the identity.
_PROBES = (
    "def f(x):\n\treturn  x\r\n",
    " Ünïcode ﬁ Ａ½ 日本語 😀 ",
    "don't 12345 1,000.5 </s> <s> \u2581 \0",
    "a\u0301 ÅÅ İi ß",
)
SOURCE_NAME = "elas_tokenizer.json"
"""Beside an exported tokenizer: `sha256`, its own digest, and `source_sha256`, that of the one it was made from."""
_JSON_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "config.json",
    SOURCE_NAME,
)


class HFTokenizer:
    """A Hugging Face tokenizer folder.

    Args:
        folder: contains `tokenizer.json` or other files that `AutoTokenizer` reads.

    Attributes:
        sha256: digest of everything that determines ids, as loaded: vocabulary, merges, normalizer, pre-tokenizer,
            added tokens.
        special_ids: ids that text must not yield, even if it spells their tokens.
        unk: the unknown id; None without one.

    Raises:
        UserError: `AutoTokenizer` cannot read it, or its encoding is random.
    """

    def __init__(self, folder: Path):
        self.path = Path(folder)
        self._hf = _load(self.path)
        self._fast = getattr(self._hf, "backend_tokenizer", None)
        if self._fast is not None:
            # Do not match special tokens in text; the vocabulary may still contain them, see `encoder_without`.
            self._fast.encode_special_tokens = True
            self._fast.no_truncation()
            self._fast.no_padding()
            if getattr(self._fast.model, "dropout", None):
                why = f"its model's dropout of {self._fast.model.dropout:g} makes the ids random"
                raise UserError(f"tokenizer {folder}: {why}; set it to null in tokenizer.json")
        self._vocab_size = max(self._hf.get_vocab().values()) + 1
        self.unk: int | None = self._hf.unk_token_id
        self.special_ids = frozenset(self._hf.all_special_ids) - {self.unk}
        self.sha256 = self._identity()
        self.unique_identifiers = OrderedDict({"class": type(self).__name__, "sha256": self.sha256})

    @property
    def identities(self) -> set[str]:
        """Digests of the tokenizers that yield these ids: its own, and that of the one it was exported from."""
        try:
            facts = json.loads((self.path / SOURCE_NAME).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {self.sha256}
        unchanged = facts.get("sha256") == self.sha256  # since the export, by which the ids were compared
        return {self.sha256, facts.get("source_sha256")} if unchanged else {self.sha256}

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without beginning or end ids."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of every text; twice as fast as `encode` for each."""
        if self._fast is None:
            return [
                self._hf.encode(t, add_special_tokens=False, split_special_tokens=True, verbose=False) for t in texts
            ]
        try:
            return [encoded.ids for encoded in self._fast.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error:  # the library raises plain exceptions
            raise UserError(f"tokenizer {self.path}: cannot encode every text: {error}") from error

    def encoder_without(self, ids: Collection[int]) -> Callable[[str], list[int]]:
        """An `encode` that avoids the pieces `ids` as far as possible."""
        backend = self.backend_json()
        if backend is not None:
            from tokenizers import Tokenizer

            try:
                fast = Tokenizer.from_str(hide_in_backend(backend, ids))
            except Exception as error:  # the library raises plain exceptions
                raise UserError(f"tokenizer {self.path}: cannot be read without special tokens: {error}") from error
            fast.encode_special_tokens = True
            return lambda text: fast.encode(text, add_special_tokens=False).ids
        contents = [token for token, i in self.vocab.items() if i in ids]
        return lambda text: [i for part in cut_inside(text, contents) for i in self.encode(part)]

    def id_of(self, token: str) -> int | None:
        """Id of a token; None if it does not exist."""
        return self.vocab.get(token)

    def token_of(self, token_id: int) -> str:
        """The token of an id; empty if the id is unused."""
        return self.inv_vocab.get(token_id, "")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without special tokens."""
        return self._hf.decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def spelling(self, ids: Sequence[int]) -> str:
        """Text of `ids`, including the names of special tokens."""
        return self._hf.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def join(self, tokens: list[str]) -> str:
        """Text of tokens, as their decoder joins them."""
        return self._hf.convert_tokens_to_string(tokens)

    @property
    def added_ids(self) -> frozenset[int]:
        """Ids of the tokens that are found in a text before it is split, special or not."""
        return frozenset(self._hf.added_tokens_decoder)

    @property
    def part_types(self) -> set[str]:
        """Types of the pre-tokenizers and decoders (`ByteLevel`, …); empty if they are Python code."""
        backend = self.backend_json()
        facts = json.loads(backend) if backend is not None else {}
        parts = json.dumps([facts.get("pre_tokenizer"), facts.get("decoder")])
        return set(re.findall(r'"type": "(\w+)"', parts))

    @property
    def vocab_size(self) -> int:
        """Number of ids, including added tokens and gaps."""
        return self._vocab_size

    @property
    def eod(self) -> int:
        """End-of-document id: the tokenizer's end-of-sequence id.

        Raises:
            UserError: the tokenizer has no end-of-sequence id.
        """
        if self._hf.eos_token_id is None:
            raise missing_eod(self.path, "set it in tokenizer_config.json")
        return self._hf.eos_token_id

    @property
    def eos(self) -> int:
        """The same id as `eod`."""
        return self.eod

    @property
    def bos(self) -> int:
        """Beginning-of-sequence id; raises `NotImplementedError` without one."""
        return present(self._hf.bos_token_id, "bos")

    @property
    def pad(self) -> int:
        """Padding id, never equal to `eod`, which would exclude the ends of documents from the loss.

        Raises:
            NotImplementedError: the tokenizer has no such id.
        """
        return present(None if self._hf.pad_token_id == self._hf.eos_token_id else self._hf.pad_token_id, "pad")

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Piece → id."""
        return self._hf.get_vocab()

    @cached_property
    def inv_vocab(self) -> dict[int, str]:
        """Id → piece."""
        return {i: piece for piece, i in self.vocab.items()}

    def backend_json(self) -> str | None:
        """The loaded tokenizer as the JSON of the tokenizers library; None if part of it is Python code."""
        try:
            return None if self._fast is None else self._fast.to_str()
        except Exception:  # "Custom … cannot be serialized", a plain Exception
            return None

    def _identity(self) -> str:
        """Digest of the tokenizer as loaded, not of files by name: every tokenizer class reads different files."""
        backend = self.backend_json()
        if backend is not None:
            facts = json.loads(backend)
            parts = [facts[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
        else:
            added = {i: str(token) for i, token in self._hf.added_tokens_decoder.items()}
            names = sorted(set(getattr(self._hf, "vocab_files_names", {}).values()))
            files = [self.path / name for name in names if (self.path / name).is_file()]
            digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
            settings = {
                k: str(v) for k, v in self._hf.init_kwargs.items() if k not in ("name_or_path", *_paths(self._hf))
            }
            parts = [type(self._hf).__name__, sorted(self.vocab.items()), added, digests, settings]
        facts = [*parts, sorted(self.special_ids), [self._probe(text) for text in _PROBES]]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _probe(self, text: str) -> list[int] | str:
        if self._fast is None:
            return self.encode(text)
        try:
            # Not encode_batch, which starts threads: workers are still to be forked from this process.
            return self._fast.encode(text, add_special_tokens=False).ids
        except Exception as error:  # no piece for the text; the error is then part of the identity
            return str(error)


def _paths(tokenizer) -> tuple[str, ...]:
    """Names of settings that hold file paths, which are not part of the identity."""
    return (*tokenizer.vocab_files_names, "tokenizer_file")


def auto_tokenizer(folder: Path):
    """transformers' `AutoTokenizer` of a local folder, which runs no code from there and does not speak.

    It would warn that the folder's model is of no type it knows, which a tokenizer need not have.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # trust_remote_code must be False, or it asks on the terminal whether to run code from the folder.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    finally:
        logging.set_verbosity(level)


def _load(folder: Path):
    cannot = f"tokenizer {folder}: AutoTokenizer cannot read it"
    for name in _JSON_FILES:
        problem = _json_problem(folder / name)
        if problem:
            raise UserError(f"{cannot}: {name} {problem}; copy it again from its source")
    try:
        hf = auto_tokenizer(folder)
    except Exception as error:  # tokenizer classes raise anything on damaged files
        why = f"{type(error).__name__}: {error}" if not str(error) or isinstance(error, KeyError) else error
        if "custom code" in str(error):
            why = "it requires custom code, which is not run; save it with a tokenizer.json"
        raise UserError(f"{cannot}: {why}") from error
    if set(hf.get_vocab().values()) <= set(hf.all_special_ids):  # some classes ignore missing vocabulary files
        why = f"{type(hf).__name__} finds no vocabulary there"
        raise UserError(f"{cannot}: {why}; add tokenizer.json, or the vocabulary files")
    return hf


def _json_problem(path: Path) -> str | None:
    """Why a file is not a JSON object; None if it is one, or does not exist."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be opened ({error.strerror})"
    except (ValueError, RecursionError) as error:
        return f"is damaged or truncated ({error})"
    return None if isinstance(value, dict) else "is not a JSON object"
