"""What to evaluate on: token files, the run's own validation set, or text that is tokenised here. Writes nothing."""

import os
from collections.abc import Sequence

import numpy as np

from elas.config import Config
from elas.data.corpus import parse_blend
from elas.data.split import divide, parse_split
from elas.data.token_files import TokenFiles, read_token_files
from elas.errors import ConfigError, UserError
from elas.evaluate.rows import Documents, Rows


def of_prefixes(prefixes: Sequence[str]) -> list[Documents]:
    """All documents of the corpora given as `--data`."""
    return [_documents(read_token_files("--data", prefix)) for prefix in prefixes]


def own_validation(config: Config) -> tuple[list[Documents], str]:
    """The documents that the run validates on: all of `data.valid`, or the validation share of `data.split`.

    Returns:
        The documents of each corpus, and what they are, for people.

    Raises:
        ConfigError: the run has no validation set, or its files are not there.
    """
    held_out = config.data.valid is None
    key, given = ("data.train", config.data.train) if held_out else ("data.valid", config.data.valid)
    fix = "give --data PREFIX, or --text FILE"
    if given is None:
        raise ConfigError("--data", None, "the run names no corpus", fix)
    prefixes, weights = parse_blend(key, given)
    for prefix in prefixes:
        if not os.path.exists(f"{prefix}.idx"):
            raise ConfigError("--data", None, f"{prefix} of the run's {key} is not there", fix)
    files = [read_token_files(key, prefix) for prefix in prefixes]
    what = "validation set of the run"
    if weights and len(files) > 1:
        what += " (every document once, whatever the weights)"
    if not held_out:
        return [_documents(one) for one in files], f"{what}, {key}={given}"
    shares = parse_split(config.data.split)
    parts = [divide(one.documents, shares)[1] for one in files]
    if not any(len(part) for part in parts):
        raise ConfigError("--data", None, f"data.split={config.data.split} of the run holds nothing out", fix)
    what += f", data.split={config.data.split} of {given}"
    return [_documents(one, part) for one, part in zip(files, parts) if len(part)], what


def check_ids(rows: Rows, vocab_size: int) -> None:
    """Check that a model has a row of its embedding for every token.

    Raises:
        UserError: an id is outside the vocabulary.
    """
    for index in range(len(rows)):
        ids, owners = rows[index]
        if ids.min() < 0 or ids.max() >= vocab_size:
            place = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
            where = f"token id {ids[place]} of document {owners[max(0, place - 1)]}"
            fix = "give a corpus that was made with the model's tokenizer"
            raise UserError(f"{rows.documents.name}: {where} is outside the model's vocabulary of {vocab_size}; {fix}")


def _documents(files: TokenFiles, chosen: np.ndarray | None = None) -> Documents:
    every = np.arange(files.documents, dtype=np.int64)
    return Documents(files.prefix, files.ids(), *files.extents_of(every if chosen is None else chosen))
