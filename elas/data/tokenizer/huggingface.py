"""A Hugging Face tokenizer folder as a tokenizer."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from pathlib import Path

from elas.data.tokenizer.special_tokens import cut_inside, hide_in_backend, missing_eod, present
from elas.errors import UserError

# What a library's version may change without changing a file; their ids are part of a tokenizer's identity.
_PROBES = (
    "def f(x):\n\treturn  x\r\n",
    " Ünïcode ﬁ Ａ½ 日本語 😀 ",
    "don't 12345 1,000.5 </s> <s> \u2581 \0",
    "a\u0301 ÅÅ İi ß",
)
_JSON_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "config.json",
)


class HFTokenizer:
    """A Hugging Face tokenizer folder.

    Args:
        folder: holds `tokenizer.json` or what `AutoTokenizer` reads.

    Attributes:
        sha256: of all that decides ids, as loaded: vocabulary, merges, normalizer, pre-tokenizer, added tokens.
        special_ids: ids that no text may give, whatever it spells.
        unk: id of what it has no piece for, None where there is none.

    Raises:
        UserError: `AutoTokenizer` cannot read it, or it gives other ids every time.
    """

    def __init__(self, folder: Path):
        self.path = Path(folder)
        self._hf = _load(self.path)
        self._fast = getattr(self._hf, "backend_tokenizer", None)
        if self._fast is not None:
            # Special tokens are not looked for in text; a vocabulary may still hold them, see `encoder_without`.
            self._fast.encode_special_tokens = True
            self._fast.no_truncation()
            self._fast.no_padding()
            if getattr(self._fast.model, "dropout", None):
                why = f"its model's dropout of {self._fast.model.dropout:g} gives other ids every time"
                raise UserError(f"tokenizer {folder}: {why}; set it to null in tokenizer.json")
        self._vocab_size = max(self._hf.get_vocab().values()) + 1
        self.unk: int | None = self._hf.unk_token_id
        self.special_ids = frozenset(self._hf.all_special_ids) - {self.unk}
        self.sha256 = self._identity()
        self.unique_identifiers = OrderedDict({"class": type(self).__name__, "sha256": self.sha256})

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

    def encoder_without(self, ids: Collection[int]) -> Callable[[str], list[int]]:
        """An `encode` that writes text without the pieces `ids`, as far as it can."""
        backend = self._backend_json()
        if backend is not None:
            from tokenizers import Tokenizer

            try:
                fast = Tokenizer.from_str(hide_in_backend(backend, ids))
            except Exception as error:  # the library raises no class of its own
                raise UserError(f"tokenizer {self.path}: cannot be read without special tokens: {error}") from error
            fast.encode_special_tokens = True
            return lambda text: fast.encode(text, add_special_tokens=False).ids
        contents = [token for token, i in self.vocab.items() if i in ids]
        return lambda text: [i for part in cut_inside(text, contents) for i in self.encode(part)]

    def id_of(self, token: str) -> int | None:
        """Id of a token; None where there is none."""
        return self.vocab.get(token)

    def token_of(self, token_id: int) -> str:
        """The token of an id."""
        return self.inv_vocab.get(token_id, "")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are nothing."""
        return self._hf.decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def spelling(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens by name."""
        return self._hf.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)

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
            raise missing_eod(self.path, "set it in tokenizer_config.json")
        return self._hf.eos_token_id

    @property
    def eos(self) -> int:
        """The same id as `eod`."""
        return self.eod

    @property
    def bos(self) -> int:
        """Id that begins a sequence."""
        return present(self._hf.bos_token_id, "bos")

    @property
    def pad(self) -> int:
        """Padding id; never that of `eod`, or training would leave the ends of documents out of the loss."""
        return present(None if self._hf.pad_token_id == self._hf.eos_token_id else self._hf.pad_token_id, "pad")

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Piece → id."""
        return self._hf.get_vocab()

    @cached_property
    def inv_vocab(self) -> dict[int, str]:
        """Id → piece."""
        return {i: piece for piece, i in self.vocab.items()}

    def _backend_json(self) -> str | None:
        """The loaded tokenizer as JSON; None where Python code does a part of it."""
        try:
            return None if self._fast is None else self._fast.to_str()
        except Exception:  # "Custom … cannot be serialized", without a class of its own
            return None

    def _identity(self) -> str:
        """Of what was loaded, not of files by name: which files a class reads is its own affair."""
        backend = self._backend_json()
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
            return self._fast.encode(text, add_special_tokens=False).ids  # no threads yet: workers are still forked
        except Exception as error:  # a vocabulary without a piece for it; that is what it does with such text
            return str(error)


def _paths(tokenizer) -> tuple[str, ...]:
    """Settings that say where files lie; the same tokenizer in another folder is the same."""
    return (*tokenizer.vocab_files_names, "tokenizer_file")


def _load(folder: Path):
    from transformers import AutoTokenizer

    cannot = f"tokenizer {folder}: AutoTokenizer cannot read it"
    for name in _JSON_FILES:
        problem = _json_problem(folder / name)
        if problem:
            raise UserError(f"{cannot}: {name} {problem}; copy it again from where it came")
    try:
        # Without False it asks on the terminal whether to run what lies there.
        hf = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a class's own reading of damaged files runs into
        why = f"{type(error).__name__}: {error}" if not str(error) or isinstance(error, KeyError) else error
        if "custom code" in str(error):
            why = "it needs code of its own, which is not run; save it with a tokenizer.json"
        raise UserError(f"{cannot}: {why}") from error
    if set(hf.get_vocab().values()) <= set(hf.all_special_ids):  # what some classes make of missing files
        why = f"{type(hf).__name__} finds no vocabulary there"
        raise UserError(f"{cannot}: {why}; add tokenizer.json, or the vocabulary's own files")
    return hf


def _json_problem(path: Path) -> str | None:
    """What keeps a file from being a JSON object; None where it is one, or is not there."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be opened ({error.strerror})"
    except (ValueError, RecursionError) as error:
        return f"is damaged or cut short ({error})"
    return None if isinstance(value, dict) else "is not a JSON object"
