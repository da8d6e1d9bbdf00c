"""Describe token files: counts, document lengths, sources, and a few decoded documents."""

from pathlib import Path

import numpy as np

from elas.data.token_files import read_manifest, read_token_files
from elas.data.tokenizer import load_tokenizer
from elas.errors import UserError

_CHUNK = 1 << 20
_SAMPLE_SIZE = 300  # tokens decoded of a sample, and characters shown of it
_BAR_WIDTH = 40


def describe(prefix: str, tokenizer: str | None = None, documents: int = 3) -> dict:
    """Facts about a corpus.

    Args:
        prefix: path without `.bin`.
        tokenizer: path of the tokenizer for decoding; None for the manifest's, if it still exists.
        documents: how many to decode, evenly spread over the corpus.

    Returns:
        `documents`, `tokens`, `dtype`, `lengths` (tokens per document: `min`, `median` as a range that spans a factor
        of two, `mean`, `max`), `histogram` (documents by length: `[from, to, documents]`, bounds doubling), `sources`
        (counts by input) and `samples`: `[number, tokens, text]`.

    Raises:
        UserError: missing or damaged token files, or a tokenizer that the corpus was not made with.
    """
    files = read_token_files("prefix", prefix)
    manifest = read_manifest(prefix)
    counts = np.zeros(64, np.int64)
    least, most = np.iinfo(np.int64).max, 0
    for _, lengths in files.document_lengths(_CHUNK):
        counts += np.bincount(np.frexp(lengths)[1], minlength=64)
        least, most = min(least, int(lengths.min())), max(most, int(lengths.max()))
    used = np.flatnonzero(counts)
    histogram = [[2 ** (int(n) - 1) if n else 0, 2 ** int(n) - 1, int(counts[n])] for n in used]
    middle = int(np.searchsorted(np.cumsum(counts), files.documents / 2))
    source = manifest.get("source", {})
    return {
        "prefix": prefix,
        "documents": files.documents,
        "tokens": files.tokens,
        "dtype": files.dtype.name,
        "lengths": {
            "min": least,
            "median": f"{2 ** (middle - 1) if middle else 0}–{2**middle - 1}",
            "mean": round(files.tokens / files.documents, 1),
            "max": most,
        },
        "histogram": histogram,
        "sources": source.get("sources", {}),
        "samples": _samples(files, manifest, tokenizer, documents),
    }


def show(facts: dict) -> str:
    """Format the facts of `describe` as text."""
    lengths = facts["lengths"]
    lines = [
        f"{facts['prefix']}: {facts['documents']:,} documents, {facts['tokens']:,} tokens ({facts['dtype']})",
        f"tokens per document: {lengths['min']:,} to {lengths['max']:,}, "
        f"mean {lengths['mean']:,}, median {lengths['median']}",
        "",
    ]
    highest = max(count for *_, count in facts["histogram"])
    for begin, end, count in facts["histogram"]:
        lines.append(f"{begin:>12,} – {end:<12,} {count:>12,}  {'█' * -(-count * _BAR_WIDTH // highest)}")
    if facts["sources"]:
        lines.append("")
        for source, counts in facts["sources"].items():
            shown = ", ".join(f"{counts[key]:,} {key}" for key in ("files", "documents", "tokens"))
            lines.append(f"{source}: {shown}")
    for number, tokens, text in facts["samples"]:
        lines += ["", f"── document {number:,}, {tokens:,} tokens " + "─" * 20, text]
    return "\n".join(lines)


def _samples(files, manifest: dict, given: str | None, documents: int) -> list[list]:
    path = given or manifest.get("source", {}).get("settings", {}).get("tokenizer")
    if documents < 1 or path is None or (given is None and not Path(path).exists()):
        return []
    tokenizer = load_tokenizer(path)
    if manifest and manifest.get("tokenizer_sha256") != tokenizer.sha256:
        raise UserError(f"--tokenizer {path}: {files.prefix} was made with another tokenizer; give that one")
    samples = []
    tokens = np.memmap(f"{files.prefix}.bin", files.dtype, "r")
    count = min(documents, files.documents)
    for number in sorted({n * files.documents // count for n in range(count)}):
        begin, length = files.tokens_of(0, number), files.tokens_of(number, number + 1)
        text = tokenizer.decode(tokens[begin : begin + min(length, _SAMPLE_SIZE)].tolist())
        is_cut = length > _SAMPLE_SIZE or len(text) > _SAMPLE_SIZE
        samples.append([number, length, text[:_SAMPLE_SIZE] + ("…" if is_cut else "")])
    return samples
