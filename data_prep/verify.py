"""Whether token files are what their manifest says: sizes, checksums, counts, ids in range, and how documents end."""

import hashlib
from pathlib import Path

import numpy as np

from elas.data.token_files import TokenFiles, read_manifest, read_token_files
from elas.errors import ConfigError

_CHUNK = 1 << 22


def verify(prefix: str) -> dict:
    """Check one corpus, reading all of it; memory does not grow with its size.

    Args:
        prefix: path without `.bin`.

    Returns:
        `files` that were looked at, always those at `prefix`, however they were named when written; `documents`,
        `tokens` (0 where that is unknown), and `bad`: a line for everything that is wrong.
    """
    bad: list[str] = []
    report = {"files": 0, "documents": 0, "tokens": 0, "bad": bad}
    manifest = read_manifest(prefix)
    if not manifest:
        bad.append(f"{prefix}.manifest.json: missing or cannot be read; the files were not finished, or not made here")
    listed = manifest.get("files")
    for name, facts in listed.items() if isinstance(listed, dict) else ():
        report["files"] += 1
        # By its ending: the manifest keeps the name that the files had when written, and a copy may have another.
        bad += _check_file(Path(f"{prefix}{Path(name).suffix}"), facts)
    try:
        files = read_token_files("prefix", prefix)
    except (ConfigError, OSError, ValueError) as error:
        return report | {"bad": [*bad, str(error)]}
    report["documents"], report["tokens"] = files.documents, files.tokens
    for key in ("documents", "tokens"):
        if manifest and manifest.get(key) != getattr(files, key):
            bad.append(f"{prefix}.idx: {getattr(files, key):,} {key}, the manifest says {manifest.get(key)}")
    bad += _check_tokens(files, manifest)
    return report


def _check_file(path: Path, facts: dict) -> list[str]:
    try:
        size = path.stat().st_size
        if size != facts["bytes"]:
            return [f"{path}: {size:,} bytes, the manifest says {facts['bytes']:,}"]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror})"]
    except (KeyError, TypeError):
        return [f"{path}: the manifest does not say its size and checksum"]
    return [] if digest == facts.get("sha256") else [f"{path}: another content than the manifest says (SHA-256)"]


def _check_tokens(files: TokenFiles, manifest: dict) -> list[str]:
    bad = []
    vocabulary, eod = manifest.get("vocab_size"), manifest.get("eod")
    tokens = np.memmap(f"{files.prefix}.bin", files.dtype, "r")
    if type(vocabulary) is int:
        wrong = sum(int(_outside(tokens[n : n + _CHUNK], vocabulary).sum()) for n in range(0, len(tokens), _CHUNK))
        if wrong:
            bad.append(f"{files.prefix}.bin: {wrong:,} ids outside the vocabulary of {vocabulary:,}")
    if type(eod) is int:
        open_ended = empty = 0
        for begin, lengths in files.document_lengths(_CHUNK):
            ends = begin + np.cumsum(lengths) - 1
            empty += int((lengths == 0).sum())
            open_ended += int((tokens[ends[lengths > 0]] != eod).sum())
        if open_ended:
            bad.append(f"{files.prefix}.bin: {open_ended:,} documents do not end in the end-of-document id {eod}")
        if empty:
            bad.append(f"{files.prefix}.idx: {empty:,} documents hold nothing")
    return bad


def _outside(ids: np.ndarray, vocabulary: int) -> np.ndarray:
    return (ids >= vocabulary) | (ids < 0)
