"""Verify token files against their manifest: sizes, checksums, counts, id range, document boundaries."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np

from elas.data.token_files import TokenFiles, read_manifest, read_token_files
from elas.data.tokenizer import load_tokenizer
from elas.errors import ConfigError, UserError

_CHUNK = 1 << 22


def verify(prefix: str) -> dict:
    """Check one corpus by reading all of it; memory does not grow with its size.

    Args:
        prefix: path without `.bin`.

    Returns:
        `files`: number of files checked; `documents` and `tokens` (0 if unknown); `bad`: a line for every defect;
        `notes`: lines about other things worth knowing.
    """
    bad: list[str] = []
    report = {"files": 0, "documents": 0, "tokens": 0, "bad": bad, "notes": []}
    manifest = read_manifest(prefix)
    if not manifest:
        why = "missing or unreadable; the files are incomplete or were not written by elas prep"
        bad.append(f"{prefix}.manifest.json: {why}")
    listed = manifest.get("files")
    for name, facts in listed.items() if isinstance(listed, dict) else ():
        report["files"] += 1
        # By suffix only: the manifest keeps the original names, and a copy may have another prefix.
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
    report["notes"] += _changed_tokenizer(manifest)
    return report


def _changed_tokenizer(manifest: dict) -> list[str]:
    """A note if the tokenizer at the manifest's path has changed; the tokens themselves are still valid."""
    source = manifest.get("source")
    settings = source.get("settings") if isinstance(source, dict) else None
    path = settings.get("tokenizer") if isinstance(settings, dict) else None
    if not isinstance(path, str) or not Path(path).exists():
        return []
    try:
        if load_tokenizer(path).sha256 == manifest.get("tokenizer_sha256"):
            return []
    except UserError as error:
        return [str(error)]
    return [f"tokenizer {path}: has changed since; decoding and training require the one this corpus was made with"]


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
        return [f"{path}: the manifest lacks its size or checksum"]
    return [] if digest == facts.get("sha256") else [f"{path}: SHA-256 does not match the manifest"]


def _check_tokens(files: TokenFiles, manifest: dict) -> list[str]:
    bad = []
    vocabulary, eod = manifest.get("vocab_size"), manifest.get("eod")
    tokens = np.memmap(f"{files.prefix}.bin", files.dtype, "r")
    if type(vocabulary) is int:
        wrong = sum(int(_outside(tokens[n : n + _CHUNK], vocabulary).sum()) for n in range(0, len(tokens), _CHUNK))
        if wrong:
            bad.append(f"{files.prefix}.bin: {wrong:,} ids outside the vocabulary of {vocabulary:,}")
    return bad + _check_ends(files, tokens, eod, manifest.get("bos"))


def _check_ends(files: TokenFiles, tokens: np.ndarray, eod: object, bos: object) -> list[str]:
    """Check that documents begin and end with the manifest's ids, and contain them nowhere else."""
    eod, bos = (i if type(i) is int else None for i in (eod, bos))
    wrong: Counter[str] = Counter()
    for begin, lengths in files.document_lengths(_CHUNK):
        ends = begin + np.cumsum(lengths) - 1
        starts = ends - lengths + 1
        nonempty = lengths > 0
        wrong["are empty"] += int((~nonempty).sum())
        if eod is not None:
            wrong[f"do not end with the end-of-document id {eod}"] += int((tokens[ends[nonempty]] != eod).sum())
            edges = (ends, starts) if bos == eod else (ends,)
            inside = _count_containing(tokens, eod, starts, ends, edges)
            wrong[f"contain the end-of-document id {eod} before their end"] += inside
        if bos is not None:
            wrong_starts = int((tokens[starts[nonempty]] != bos).sum())
            wrong[f"do not begin with the beginning-of-sequence id {bos}"] += wrong_starts
        if bos is not None and bos != eod:
            inside = _count_containing(tokens, bos, starts, ends, (starts,))
            wrong[f"contain the beginning-of-sequence id {bos} after their beginning"] += inside
    return [f"{files.prefix}.bin: {count:,} documents {what}" for what, count in wrong.items() if count]


def _count_containing(
    tokens: np.ndarray, wanted: int, starts: np.ndarray, ends: np.ndarray, edges: tuple[np.ndarray, ...]
) -> int:
    """Number of consecutive documents that contain `wanted` at any position other than their `edges`."""
    containing = np.zeros(len(ends), bool)
    last = int(ends[-1]) + 1
    for at in range(int(starts[0]), last, _CHUNK):
        places = at + np.flatnonzero(tokens[at : min(at + _CHUNK, last)] == wanted)
        owners = np.searchsorted(ends, places)
        inside = np.ones(len(places), bool)
        for edge in edges:
            inside &= places != edge[owners]
        containing[owners[inside]] = True
    return int(containing.sum())


def _outside(ids: np.ndarray, vocabulary: int) -> np.ndarray:
    return (ids >= vocabulary) | (ids < 0)
