"""Which tokenizer belongs to a trained model: given, set in the configuration, or named by the training corpus."""

import os
from pathlib import Path

from elas.config import Config
from elas.data.corpus import check_made_with, open_tokenizer, parse_blend
from elas.data.token_files import manifest_tokenizer, read_manifest
from elas.errors import ConfigError

_OPTION = "--tokenizer"


def check_given(path: str | None) -> None:
    """Raise `ConfigError` if the path of the option `--tokenizer` does not exist; it is opened later."""
    if path is not None and not Path(path).exists():
        raise ConfigError(_OPTION, path, "does not exist", "give a tokenizer folder")


def tokenizer_of(config: Config, given: str | None) -> Path:
    """The tokenizer of a run, for work on its checkpoints outside of training.

    It is `given`; else `data.tokenizer`; else the path in the manifest of the training corpus, and of the validation
    corpus if no training corpus has one. It is opened and compared with every corpus that has a manifest.

    Args:
        config: the run's configuration.
        given: value of the option `--tokenizer`.

    Returns:
        A path for `elas.data.tokenizer.load_tokenizer`.

    Raises:
        ConfigError: no tokenizer is known, or it is not where the corpus says, cannot be opened, is not the one that
            the corpora were made with, or has more tokens than the model.
    """
    corpora = _corpora(config)
    if given is not None:
        key, path = _OPTION, given
    elif config.data.tokenizer is not None:
        key, path = "data.tokenizer", config.data.tokenizer
    else:
        return _named_by(corpora, config)
    tokenizer = open_tokenizer(key, path, "" if given else f"if it was moved, give the path that it has now: {_OPTION}")
    for prefix in corpora:
        check_made_with(key, path, tokenizer, prefix)
    why = _too_large(config, tokenizer.vocab_size)
    if why:
        raise ConfigError(key, path, why, "give the tokenizer that the model was trained with")
    return Path(path)


def _named_by(corpora: list[str], config: Config) -> Path:
    """The tokenizer that the corpora's manifests name."""
    named = {prefix: path for prefix in corpora if (path := manifest_tokenizer(prefix)) is not None}
    fix = "give the tokenizer that the model was trained with"
    if not named:
        raise ConfigError(_OPTION, None, f"data.tokenizer is not set and {_unnamed(corpora)}", fix)
    there = [(prefix, path) for prefix, path in named.items() if os.path.exists(path)]
    if not there:
        prefix, path = next(iter(named.items()))
        why = f"{path}, the tokenizer that {prefix} was made with, is not there (moved, removed, or on another machine)"
        raise ConfigError(_OPTION, None, why, "give the path that it has now")
    first, path = there[0]
    tokenizer = open_tokenizer(_OPTION, path)
    made_with = read_manifest(first).get("tokenizer_sha256")
    if made_with is not None and made_with not in tokenizer.identities:
        why = f"{path} has changed since {first} was made with it"
        digests = f"sha256 {str(made_with)[:12]}… then, {tokenizer.sha256[:12]}… now"
        raise ConfigError(_OPTION, None, f"{why} ({digests})", "restore it, or give the one that it was")
    for prefix in corpora:
        check_made_with(_OPTION, path, tokenizer, prefix)
    why = _too_large(config, tokenizer.vocab_size)
    if why:
        raise ConfigError(_OPTION, None, f"{path}, the tokenizer of {first}, {why}", fix)
    return Path(path)


def _corpora(config: Config) -> list[str]:
    """Prefixes of the training and validation corpora; they need not exist."""
    settings = (("data.train", config.data.train), ("data.valid", config.data.valid))
    return [prefix for key, value in settings if value is not None for prefix in parse_blend(key, value)[0]]


def _unnamed(corpora: list[str]) -> str:
    """Why no corpus names a tokenizer."""
    if not corpora:
        return "data.train names no corpus whose manifest would name one"
    if os.path.exists(f"{corpora[0]}.manifest.json"):
        return f"{corpora[0]}.manifest.json names none"
    others = f" nor of {len(corpora) - 1} others" if len(corpora) > 1 else ""
    return f"there is no manifest of {corpora[0]}{others} that names one"


def _too_large(config: Config, size: int) -> str | None:
    """Why a tokenizer does not fit the model; None if it does: the model's vocabulary may be padded."""
    if size <= config.model.vocab_size:
        return None
    return f"has {size} tokens, more than model.vocab_size={config.model.vocab_size}: it is of another vocabulary"


def document_ids(config: Config) -> tuple[int | None, int | None]:
    """The ids before and after every document of the training corpus, by its manifest; None for none or unknown."""
    manifests = [read_manifest(prefix) for prefix in _corpora(config)]
    ids = next(((m.get("bos"), m.get("eod")) for m in manifests if "eod" in m), (None, None))
    before, after = (one if type(one) is int else None for one in ids)
    return before, after
