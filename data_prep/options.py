"""Options of a tokenisation, and the checks on them."""

from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from elas.data.tokenizer import Tokenizer, load_tokenizer
from elas.data_prep.plan import Selection, Settings
from elas.data_prep.sources import Corpus, check_fraction
from elas.errors import ConfigError

UINT16_VOCAB = 65500  # Megatron's limit for two-byte tokens


@dataclass(frozen=True)
class Options(Selection):
    """How to tokenise a corpus: which documents, and the following.

    Args:
        valid_output: prefix for held-out documents; required if and only if `valid_fraction` is above 0.
        append_eod: append the end-of-document id to every document.
        eod_token: end-of-document token; None for the tokenizer's own.
        prepend_bos: prepend the tokenizer's beginning-of-sequence id to every document.
        executor: `local`, `slurm` or `ray`.
        workers: processes; None for one per usable core. With slurm, parallel jobs; None for no limit.
        task_bytes: bytes per task; None for the default of `make_plan`.
        overwrite: start over and replace existing files.
        share: `(i, n)`: run only every n-th task, starting with task i, and do not merge.
        max_skipped: maximum unreadable share of the corpus, 0 to 1; None for the default of `unread`.
        slurm: see `elas.data_prep.executors.slurm_executor`.
    """

    valid_output: str | Path | None = None
    append_eod: bool = True
    eod_token: str | None = None
    prepend_bos: bool = False
    executor: str = "local"
    workers: int | None = None
    task_bytes: int | None = None
    overwrite: bool = False
    share: tuple[int, int] | None = None
    max_skipped: float | None = None
    slurm: dict = field(default_factory=dict)


def check_options(output_prefix: str | Path, options: Options) -> list[Path]:
    """Check the options; returns the prefixes to write, training first.

    Raises:
        ConfigError: an option is out of range or contradicts another.
    """
    check_fraction("--valid-fraction", options.valid_fraction)
    if options.max_skipped is not None and not 0 <= options.max_skipped <= 1:
        raise ConfigError("--max-skipped", options.max_skipped, "is not a share of the corpus", "give 0 to 1")
    if options.workers is not None and options.workers < 1:
        raise ConfigError("--workers", options.workers, "too few", "give 1 or more")
    for key in ("min_chars", "max_chars", "min_tokens", "max_tokens", "task_bytes", "valid_max_bytes"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise ConfigError(f"--{key.replace('_', '-')}", value, "out of range", "give 1 or more")
    for what in ("chars", "tokens"):
        least, most = getattr(options, f"min_{what}"), getattr(options, f"max_{what}")
        if least is not None and most is not None and least > most:
            why = f"above --max-{what}={most}, so no document would be left"
            raise ConfigError(f"--min-{what}", least, why, f"give {most} or less")
    if options.slurm.get("mem_gb", 1) < 1:
        raise ConfigError("--slurm-mem-gb", options.slurm["mem_gb"], "out of range", "give 1 or more")
    _check_share(options)
    if options.eod_token is not None and not options.append_eod:
        raise ConfigError("--eod-token", options.eod_token, "has no effect with --append-eod no", "remove one of them")
    valid = options.valid_output
    if valid is None and options.valid_fraction > 0:
        why = "requires an output for the held-out documents"
        raise ConfigError("--valid-fraction", options.valid_fraction, why, "add --valid-output PREFIX")
    if valid is not None and options.valid_fraction == 0:
        why = "no documents are held out"
        raise ConfigError("--valid-output", str(valid), why, "add --valid-fraction F, for example 0.02")
    prefixes = [Path(p) for p in (output_prefix, valid) if p is not None]
    if len({p.resolve() for p in prefixes}) < len(prefixes):
        raise ConfigError("--valid-output", str(valid), "is the same as --output", "give another prefix")
    for key, prefix in zip(("--output", "--valid-output"), prefixes):
        if not prefix.name or str(prefix).endswith(("/", ".bin", ".idx")) or prefix.is_dir():
            raise ConfigError(key, str(prefix), "is not a file prefix", "give a path such as data/train")
    return prefixes


def _check_share(options: Options) -> None:
    if options.share is None:
        return
    first, step = options.share
    label = f"{first}/{step}"
    if not 0 <= first < step:
        raise ConfigError("--share", label, "is not a share", "count from 0: for two machines give 0/2 and 1/2")
    if options.overwrite:
        why = "not supported with --overwrite, which would remove the work of other shares"
        raise ConfigError("--share", label, why, "remove existing files before the shares start")
    if options.executor != "local":
        why = f"not supported with --executor {options.executor}"
        raise ConfigError("--share", label, why, "remove one of them")


def make_settings(corpus: Corpus, tokenizer_path: str | Path, options: Options) -> Settings:
    """The settings of a plan.

    Raises:
        UserError: the tokenizer cannot be read or lacks a requested token.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    return Settings(
        field=corpus.field,
        tokenizer=str(Path(tokenizer_path).absolute()),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        dtype=np.dtype(np.uint16 if tokenizer.vocab_size < UINT16_VOCAB else np.int32).name,
        eod=_eod(tokenizer, options),
        bos=_bos(tokenizer, tokenizer_path) if options.prepend_bos else None,
        **{selected.name: getattr(options, selected.name) for selected in fields(Selection)},
    )


def _eod(tokenizer: Tokenizer, options: Options) -> int | None:
    """The end-of-document id; None without one."""
    if not options.append_eod:
        return None
    if options.eod_token is None:
        return tokenizer.eod
    eod = tokenizer.id_of(options.eod_token)
    if eod is None:
        special = sorted(tokenizer.token_of(i) for i in tokenizer.special_ids)
        ids = tokenizer.encode(options.eod_token)  # byte-level vocabularies spell a newline as Ċ
        near = [tokenizer.token_of(ids[0])] if len(ids) == 1 else get_close_matches(options.eod_token, special, n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"its special tokens are {', '.join(special[:5]) or 'none'}"
        raise ConfigError("--eod-token", options.eod_token, "the tokenizer has no such token", fix)
    return eod


def _bos(tokenizer: Tokenizer, path: str | Path) -> int:
    """The beginning-of-sequence id; raises `ConfigError` if the tokenizer has none."""
    try:
        return tokenizer.bos
    except NotImplementedError:
        why = f"the tokenizer {path} has no beginning-of-sequence token"
        raise ConfigError(
            "--prepend-bos", True, why, "name one in its tokenizer_config.json, or remove this option"
        ) from None
