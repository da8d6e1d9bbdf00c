"""Stream datasets of the Hugging Face hub: `hf://NAME[@REVISION][#CONFIG][:SPLIT[:FIELD]]`.

The libraries retry for minutes and then raise long tracebacks. Here a single request with a timeout first checks that
the hub has the dataset, and every error becomes one line. NAME may also be a local folder.
"""

import os
import re
import sys
from collections.abc import Iterator
from functools import lru_cache

from elas.data_prep import fields
from elas.errors import Failure, UserError

HUB = "hf://"
TIMEOUT = 10.0
"""Seconds for the hub to answer whether it has a dataset."""
_COLON = re.compile(r":(?![^\[]*\])")  # a split may be train[10:20]
_FORM = "hf://NAME[@REVISION][#CONFIG][:SPLIT[:FIELD]]"


def parse(given: str) -> tuple[str, str | None]:
    """An input as `(NAME[@REVISION][#CONFIG]:SPLIT, FIELD)`; the default split is `train`.

    Raises:
        UserError: not of that form.
    """
    name, *rest = _COLON.split(given.removeprefix(HUB))
    if not re.split("[@#]", name)[0]:
        raise UserError(f"--input {given}: no dataset named; write {_FORM}")
    if len(rest) > 2:
        raise UserError(f"--input {given}: too many colons; write {_FORM}")
    split, field = [*rest, "", ""][:2]
    return f"{name}:{split or 'train'}", field or None


@lru_cache(maxsize=8)
def open_dataset(name: str):
    """A streaming `datasets.IterableDataset` for `NAME[@REVISION][#CONFIG]:SPLIT`; opened once per process.

    Raises:
        UserError: no such dataset, configuration or split, or the hub does not answer.
    """
    given = f"{HUB}{name}"
    name, split = _COLON.split(name)
    name, _, config = name.partition("#")
    name, _, revision = name.partition("@")
    if name.startswith(("/", ".", "~")) and not os.path.exists(name):
        raise UserError(f"--input {given}: no such folder; give an existing folder, or {_FORM}")
    if not os.path.exists(name):
        _check_exists(given, name, revision)
    print(f"note: opening {given}", file=sys.stderr, flush=True)  # importing the library alone takes seconds
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config or None, split=split, streaming=True, revision=revision or None)
    except Exception as error:  # ValueError, KeyError, NotImplementedError and classes of four libraries
        raise UserError(f"--input {given}: {_one_line(error)}; {_fix(error)}") from error


def columns(name: str) -> list[str] | None:
    """The fields of a dataset; None if it does not declare them."""
    return open_dataset(name).column_names


def read(name: str, field: str, piece: tuple[int, int], skip) -> Iterator[tuple[int, str]]:
    """Yield the texts in some shards of a dataset, numbered from 1; see `readers.read_piece`.

    Raises:
        Failure: the connection was lost; the piece is discarded, and the next run reads it again.
    """
    dataset = open_dataset(name)
    begin, end = piece
    number = 0
    for shard in range(begin, dataset.num_shards if end < 0 else end):
        rows = iter(dataset.shard(dataset.num_shards, shard))
        while True:
            try:
                record = next(rows)
            except StopIteration:
                break
            except Exception as error:  # whatever the libraries raise, rows are missing: the piece must not count
                why = f"hf://{name}: reading stopped ({_one_line(error)})"
                raise Failure(f"{why}; run the same command again to resume") from error
            number += 1
            has_field, text = fields.find(record, field)
            if not has_field:
                skip(fields.missing("field", field, fields.names(record)), number)
            elif not isinstance(text, str):
                skip(f"field {field!r} is not text", number)
            elif not fields.encodable(text):
                skip("lone surrogate", number)
            else:
                yield number, text


def _check_exists(given: str, name: str, revision: str) -> None:
    """Raise `UserError` unless the hub has a dataset; one request, no retries.

    Offline (`HF_HUB_OFFLINE=1`) nothing is checked: the libraries use their own caches and fail at once.
    """
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return
    api = HfApi()
    print(f"note: asking {api.endpoint} for {name}", file=sys.stderr, flush=True)
    fix = "check the network, a proxy (HTTPS_PROXY) or mirror (HF_ENDPOINT), or give downloaded files as --input PATH"
    try:
        api.dataset_info(name, revision=revision or None, timeout=TIMEOUT)
        return
    except errors.RevisionNotFoundError as error:
        cause, why, fix = error, f"has no revision {revision!r} of it", "check the part after @"
    except errors.HFValidationError as error:
        raise UserError(f"--input {given}: {_one_line(error)}; write {_FORM}") from error
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        cause, why = error, "has no such dataset, or it is private or gated"
        fix = "check the name, or log in with `hf auth login`"
    except errors.HfHubHTTPError as error:
        cause, why, fix = error, f"answers {_one_line(error)}", "try again later"
    except Exception as error:  # errors of the HTTP library, which differs between versions of huggingface_hub
        cause, why = error, f"does not answer ({_one_line(error) or type(error).__name__})"
    raise UserError(f"--input {given}: {api.endpoint} {why}; {fix}") from cause


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")


def _fix(error: Exception) -> str:
    text = str(error)
    if "split" in text.lower():
        return f"name one of its splits: {_FORM}"
    if "config" in text.lower():
        return f"name one of its configurations: {_FORM}"
    if "offline" in text.lower() or "cache" in text.lower():
        return "unset HF_HUB_OFFLINE to ask the hub, or give downloaded files as --input PATH"
    return f"check the name: {_FORM}"
