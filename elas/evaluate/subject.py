"""What a model is evaluated on: rows of tokens, and how they are read."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from elas.config import ParallelConfig
from elas.data.tokenizer.byte_lengths import byte_lengths, inexact_because
from elas.errors import ConfigError, UserError
from elas.evaluate.corpora import check_ids, of_prefixes, own_validation
from elas.evaluate.rows import Documents, Rows, rows_of
from elas.evaluate.tokenizers import tokenizer_for
from elas.hf.source import Source

PADDING = 2048
"""Rows of a vocabulary without a token, at most: Megatron rounds up to 128 for each of up to 16 shards."""
LONGEST_BY_DEFAULT = 2048
BATCH = 8


@dataclass(frozen=True)
class Request:
    """What the user asked for; see `elas eval --help`."""

    checkpoint: Path
    data: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    protocol: str | None = None
    tokens: int | None = None
    batch: int | None = None
    seq_length: int | None = None
    dtype: str | None = None
    tokenizer: str | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def check(self) -> None:
        """Raise `UserError` for options that are wrong whatever the model is."""
        for option, value in (("tokens", self.tokens), ("batch", self.batch), ("seq-length", self.seq_length)):
            if value is not None and value < 1:
                raise UserError(f"--{option} {value}: too small; give 1 or more")
        if self.data and self.text:
            raise UserError(f"--text {' '.join(self.text)}: not together with --data; give one of them")


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        what: the corpora, for people.
        rows: of each corpus; at least one token is predicted.
        protocol: one of `elas.evaluate.rows.PROTOCOLS`.
        seq_length: longest row.
        batch: rows of a batch.
        byte_lengths: bytes of each token id; None if no tokenizer is known.
        notes: lines for the user.
    """

    what: str
    rows: list[Rows]
    protocol: str
    seq_length: int
    batch: int
    byte_lengths: np.ndarray | None
    notes: list[str]

    @property
    def tokens(self) -> int:
        """Tokens to predict."""
        return sum(int(rows.lengths().sum()) for rows in self.rows)


def subject_of(request: Request, source: Source, longest: int | None, vocab_size: int) -> Subject:
    """Read and check what is to be evaluated.

    Args:
        request: the user's.
        source: the model.
        longest: the longest sequence that it takes; None if unknown.
        vocab_size: its rows of tokens.

    Raises:
        UserError: nothing to evaluate on, or it does not fit the model.
    """
    config = source.config
    seq_length = request.seq_length or _own_length(source, longest)
    if longest is not None and seq_length > longest:
        raise UserError(f"--seq-length {seq_length}: the model takes at most {longest} tokens; give {longest} or less")
    protocol = request.protocol or ("papers" if config and config.data.packing == "document" else "packed")
    corpora, what, lengths, notes = _read(request, source, vocab_size)
    limits = _shares(corpora, request.tokens)
    rows = [rows_of(one, protocol, seq_length, limit) for one, limit in zip(corpora, limits)]
    rows = [one for one in rows if len(one)]
    if not rows:
        held = sum(int(one.lengths.sum()) for one in corpora)
        why = f"holds {held} tokens in {sum(map(len, corpora))} documents, nothing to predict"
        raise UserError(f"{what}: {why}; give a document of at least two tokens")
    for one in rows:
        check_ids(one, vocab_size)
    held = sum(int(one.lengths().sum()) for one in rows)
    if request.tokens is not None and held < request.tokens:
        notes.append(f"--tokens {request.tokens:,}: there are {held:,} to predict")
    batch = request.batch or (config.train.micro_batch_size if config else BATCH)
    return Subject(what, rows, protocol, seq_length, batch, lengths, notes)


def _own_length(source: Source, longest: int | None) -> int:
    if source.config is not None:
        return source.config.model.seq_length
    return min(longest or LONGEST_BY_DEFAULT, LONGEST_BY_DEFAULT)


def _read(
    request: Request, source: Source, vocab_size: int
) -> tuple[list[Documents], str, np.ndarray | None, list[str]]:
    """The documents, what they are, the bytes of each token id, and notes."""
    if request.text:
        from elas.evaluate.text import read_text  # imports datatrove

        tokenizer, why = tokenizer_for(source, request.tokenizer, [])
        if tokenizer is None:
            raise UserError(f"--text {' '.join(request.text)}: requires the model's tokenizer ({why})")
        if request.tokenizer and tokenizer.vocab_size + PADDING < vocab_size:
            why = f"has {tokenizer.vocab_size:,} tokens, but the model {vocab_size:,}"
            raise ConfigError("--tokenizer", request.tokenizer, why, "give the model's own")
        documents, notes = read_text(request.text, tokenizer, request.tokens)
        return [documents], documents.name, byte_lengths(tokenizer, vocab_size), notes
    if request.data:
        corpora, what = of_prefixes(request.data), f"--data {' '.join(request.data)}"
    elif source.config is not None:
        corpora, what = own_validation(source.config)
    else:
        fix = "give --data PREFIX, or --text FILE"
        raise ConfigError("--data", None, "a Hugging Face folder names no validation set", fix)
    tokenizer, why = tokenizer_for(source, request.tokenizer, [one.name for one in corpora])
    if tokenizer is None:
        return corpora, what, None, [f"no bits per byte, for want of a tokenizer: {why}"]
    why = inexact_because(tokenizer)
    notes = [f"bits per byte are of the text as decoded, which is not always the original: {why}"] if why else []
    return corpora, what, byte_lengths(tokenizer, vocab_size), notes


def _shares(corpora: list[Documents], limit: int | None) -> list[int | None]:
    """How many of `limit` tokens each corpus gets, by its size."""
    if limit is None:
        return [None] * len(corpora)
    sizes = np.array([int(one.lengths.sum()) for one in corpora], float)
    edges = np.round(np.concatenate(([0.0], np.cumsum(sizes))) / max(1.0, sizes.sum()) * limit).astype(int)
    return np.diff(edges).tolist()
