"""Checks of the data settings before a run starts: the corpora are intact and fit the model and the split."""

import math
import os
from pathlib import Path

import numpy as np

from elas.config import Config
from elas.data.split import EVERYTHING, SCHEME, divide, held_out_counts, parse_split
from elas.data.token_files import TokenFiles, manifest_tokenizer, manifest_vocabulary, read_manifest, read_token_files
from elas.errors import ConfigError, UserError


def parse_blend(key: str, value: str | list[str] | None) -> tuple[list[str], list[float] | None]:
    """Parse the prefixes and weights of a data setting.

    Args:
        key: `data.train` or `data.valid`, for messages.
        value: a prefix, prefixes, or `[weight, prefix, …]`; or the same as a string, separated by blanks.

    Returns:
        Prefixes, and their weights or None.

    Raises:
        ConfigError: no prefix, weights that are not positive numbers, or the same corpus twice.
    """
    parts = value.split() if isinstance(value, str) and not os.path.exists(f"{value}.idx") else value or []
    parts = [parts] if isinstance(parts, str) else list(parts)
    weights = [_weight(part) for part in parts[::2]]
    if not parts:
        raise ConfigError(key, value, "names no corpus", "give the prefix of a .bin/.idx pair")
    if all(weight is None for weight in weights):
        return _distinct(key, value, parts), None
    if len(parts) % 2 or not all(weight and 0 < weight < math.inf for weight in weights):
        raise ConfigError(key, value, "is not a blend", "write [WEIGHT, PREFIX, WEIGHT, PREFIX, …], weights above 0")
    return _distinct(key, value, parts[1::2]), [weight for weight in weights if weight is not None]


def _distinct(key: str, value: str | list[str] | None, prefixes: list[str]) -> list[str]:
    """Check that no corpus is named twice, in any spelling: both of its shares would start with the same samples."""
    seen: dict[str, str] = {}
    for prefix in prefixes:
        file = os.path.realpath(f"{prefix}.bin")
        if file in seen:
            names = seen[file] if prefix == seen[file] else f"{seen[file]} and {prefix}"
            why = f"names one corpus twice ({names})"
            raise ConfigError(key, value, why, "name it once, with the sum of the weights")
        seen[file] = prefix
    return prefixes


def _weight(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def check_corpus(config: Config) -> None:
    """Check every data setting against the files and the model.

    Raises:
        ConfigError: missing, damaged or empty files, too few tokens for one sample, or a vocabulary that does not fit.
    """
    data = config.data
    if data.train is None:
        raise ConfigError("data.train", None, "no corpus to train on", "give the prefix of a .bin/.idx pair")
    tokenizer = open_tokenizer("data.tokenizer", data.tokenizer) if data.tokenizer is not None else None
    for key, value in (("data.train", data.train), ("data.valid", data.valid)):
        if value is None:
            continue
        for prefix in parse_blend(key, value)[0]:
            files = read_token_files(key, prefix)
            why = _too_small(config, files, np.arange(files.documents))
            if why:
                raise ConfigError(key, prefix, f"holds {why}", "use a larger corpus or shorter sequences")
            if tokenizer is not None and data.tokenizer is not None:
                # Before comparing sizes, which mean nothing for another tokenizer.
                fix = "tokenise the corpus again with this one"
                check_made_with("data.tokenizer", data.tokenizer, tokenizer, prefix, fix)
            vocabulary = manifest_vocabulary(prefix)
            if vocabulary is None:
                vocabulary = files.largest_sampled() + 1
            made_with = manifest_tokenizer(prefix)
            source = f"the corpus {prefix}, made with {made_with}" if made_with else f"the corpus {prefix}"
            _check_vocabulary(config, vocabulary, source)
    if tokenizer is not None:
        _check_vocabulary(config, tokenizer.vocab_size, f"data.tokenizer={data.tokenizer}")
    _check_split(config)
    _check_cache(data.cache)


def corpus_identity(config: Config) -> dict:
    """What determines the training samples, by the content of the corpora and not their paths.

    Returns:
        `data.train`: weight, documents, tokens and fingerprint of each source; `data.held_out`: `held_out_identity`.
    """
    if config.data.train is None:
        return {"data.held_out": None}
    prefixes, weights = parse_blend("data.train", config.data.train)
    sources = [read_token_files("data.train", prefix) for prefix in prefixes]
    facts = [[w, f.documents, f.tokens, f.fingerprint()] for w, f in zip(weights or [None] * len(sources), sources)]
    shares = EVERYTHING if config.data.valid is not None else parse_split(config.data.split)
    return {
        "data.train": facts,
        "data.held_out": held_out_identity(SCHEME, [files.documents for files in sources], shares),
    }


def held_out_identity(scheme: str, documents: list[int], shares: tuple[float, float, float]) -> list | None:
    """The scheme that holds documents out of training, and their number for each source; None if there are none."""
    counts = [held_out_counts(number, shares)[0] for number in documents]
    return [scheme, *counts] if any(counts) else None


def _check_cache(cache: str | None) -> None:
    if cache is None:
        return
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"cannot create the folder ({error.strerror})"
        raise ConfigError("data.cache", cache, why, "give another, or null") from None
    if not os.access(cache, os.W_OK):
        raise ConfigError("data.cache", cache, "is not writable", "give another folder, or null")


def open_tokenizer(key: str, path: str, fix: str = ""):
    """Open the tokenizer that the setting or option `key` names; raises `ConfigError`, with a fix, if it cannot be."""
    from elas.data.tokenizer import load_tokenizer

    try:
        return load_tokenizer(path)
    except UserError as error:
        why = str(error).removeprefix(f"tokenizer {path}: ").removeprefix(f"{path}: ")
        raise ConfigError(key, path, f"cannot be opened ({why})", fix or "give a tokenizer folder") from error


def check_made_with(key: str, given: str, tokenizer, prefix: str, other_fix: str | None = None) -> None:
    """Check that a corpus was made with a tokenizer; skipped for a corpus without a manifest.

    Args:
        key, given: the setting or option that names the tokenizer, and its value.
        tokenizer: the opened tokenizer.
        prefix: the corpus.
        other_fix: what else the user can do, apart from giving the corpus's tokenizer.

    Raises:
        ConfigError: the manifest has the digest of another tokenizer.
    """
    made_with = read_manifest(prefix).get("tokenizer_sha256")
    if made_with is None or made_with in tokenizer.identities:
        return
    own, size = manifest_tokenizer(prefix), manifest_vocabulary(prefix)
    known = [own, f"{size} tokens" if size else None, f"sha256 {str(made_with)[:12]}…"]
    facts = ", ".join(fact for fact in known if fact)
    why = f"{prefix} was made with another tokenizer ({facts}; this one has {tokenizer.vocab_size} tokens)"
    fix = "give the corpus's tokenizer"
    if own is not None and os.path.exists(own):
        fix = f"give {own}" if key.startswith("-") else f"set {key} to {own}"
    raise ConfigError(key, given, why, f"{fix}, or {other_fix}" if other_fix else fix)


def _check_vocabulary(config: Config, vocabulary: int, source: str) -> None:
    if config.model.vocab_size < vocabulary:
        tp = config.parallel.tensor
        why = f"smaller than the {vocabulary} tokens of {source}"
        raise ConfigError("model.vocab_size", config.model.vocab_size, why, f"set it to {-(-vocabulary // tp) * tp}")


def unused_vocabulary(config: Config) -> list[str]:
    """A warning if the model's vocabulary is far larger than that of its corpora, according to their manifests.

    Padding to a round number is common, so there is a warning only above a quarter plus 1,024 extra tokens.

    Args:
        config: a configuration that passed `check_corpus`.

    Returns:
        A list with one line, `key=value: why; fix`, or an empty list.
    """
    model = config.model
    prefixes = [p for k in ("train", "valid") if (v := getattr(config.data, k)) for p in parse_blend(f"data.{k}", v)[0]]
    sizes = [size for prefix in prefixes if (size := manifest_vocabulary(prefix)) is not None]
    largest = max(sizes, default=0)
    if not sizes or len(sizes) < len(prefixes) or model.vocab_size <= 1.25 * largest + 1024:
        return []
    wasted = (model.vocab_size - largest) * model.hidden_size * (1 if model.tie_embeddings else 2)
    why = f"the tokenizer has {largest} tokens, so {wasted / 1e6:,.1f} M parameters are never used"
    return [f"model.vocab_size={model.vocab_size}: {why}; give about {-(-largest // 128) * 128}"]


def _check_split(config: Config) -> None:
    split = config.data.split
    shares = parse_split(split)
    wants_valid = config.data.valid is None and config.train.eval_batches > 0
    fix = "give data.valid, a larger validation share, or train.eval_batches=0"
    if wants_valid and shares[1] == 0:
        raise ConfigError("data.split", split, "leaves nothing to validate on", fix)
    if config.data.valid is not None:
        return
    for prefix in parse_blend("data.train", config.data.train)[0]:
        files = read_token_files("data.train", prefix)
        train, valid = divide(files.documents, shares)
        parts = [("train", train, "give a larger training share, or a larger corpus")]
        if wants_valid:
            parts.append(("validate", valid, fix))
        for purpose, documents, this_fix in parts:
            if not len(documents):
                why = f"leaves no document of {prefix} ({files.documents} in all) to {purpose} on"
                raise ConfigError("data.split", split, why, this_fix)
            why = _too_small(config, files, documents, f" of {prefix} to {purpose} on")
            if why:
                raise ConfigError("data.split", split, f"leaves {why}", this_fix)


def _too_small(config: Config, files: TokenFiles, documents: np.ndarray, of: str = "") -> str:
    """Why documents are too few for one sample, with `of` naming them; empty if they are enough."""
    lengths, seq_length = files.lengths_of(documents), config.model.seq_length
    if config.data.packing == "document":
        return "" if (lengths > 1).any() else f"no document of at least two tokens{of}"
    if lengths.sum() > seq_length:
        return ""
    return f"{lengths.sum()} tokens{of}, too few for a sample of model.seq_length={seq_length} and its label"
