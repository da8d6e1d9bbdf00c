"""What a tokenisation is asked to do, and whether that can be done."""

from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from elas.data.tokenizer import Tokenizer, load_tokenizer
from elas.data_prep.plan import Settings
from elas.data_prep.sources import Corpus, check_fraction
from elas.errors import ConfigError

UINT16_VOCAB = 65500  # Megatron's own bound for two-byte tokens


@dataclass(frozen=True)
class Options:
    """What to do with a corpus, beside reading it.

    Args:
        valid_output: prefix for held-out documents; needs `valid_fraction` above 0, and the other way round.
        valid_fraction: fraction of documents to hold out, by hash of their text.
        valid_max_bytes: never hold out a longer document; None for no bound.
        append_eod: end every document with the end-of-document id.
        eod_token: the token that ends documents; None for the tokenizer's own.
        prepend_bos: begin every document with the tokenizer's beginning-of-sequence id.
        filters: of `elas.data_prep.quality.parse_filter`.
        min_chars, max_chars, min_tokens, max_tokens: leave other documents out.
        deduplicate: keep only the first of documents with the same text.
        executor: `local`, `slurm` or `ray`.
        workers: processes; None for one a usable core. With slurm, jobs at a time; None for no bound.
        task_bytes: size of a task; None for what `make_plan` finds fit.
        overwrite: start afresh, whatever is there.
        share: `(i, n)`: do every n-th task only, beginning with task i, and leave the rest and the merge to others.
        max_skipped: share of the corpus that may be left out as unreadable; None for what `unread` finds too much.
        slurm: see `elas.data_prep.executors.slurm_executor`.
    """

    valid_output: str | Path | None = None
    valid_fraction: float = 0.0
    valid_max_bytes: int | None = None
    append_eod: bool = True
    eod_token: str | None = None
    prepend_bos: bool = False
    filters: list[list] = field(default_factory=list)
    min_chars: int | None = None
    max_chars: int | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    deduplicate: bool = False
    executor: str = "local"
    workers: int | None = None
    task_bytes: int | None = None
    overwrite: bool = False
    share: tuple[int, int] | None = None
    max_skipped: float | None = None
    slurm: dict = field(default_factory=dict)


def check_options(output_prefix: str | Path, options: Options) -> list[Path]:
    """The prefixes to write.

    Raises:
        ConfigError: options that contradict each other, or that nothing can come of.
    """
    check_fraction("--valid-fraction", options.valid_fraction)
    if options.max_skipped is not None and not 0 <= options.max_skipped <= 1:
        raise ConfigError("--max-skipped", options.max_skipped, "is no share of the corpus", "give 0 to 1, 0.25")
    if options.workers is not None and options.workers < 1:
        raise ConfigError("--workers", options.workers, "nobody would tokenise", "give 1 or more")
    for key in ("min_chars", "max_chars", "min_tokens", "max_tokens", "task_bytes", "valid_max_bytes"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise ConfigError(f"--{key.replace('_', '-')}", value, "is out of range", "give 1 or more")
    for what in ("chars", "tokens"):
        least, most = getattr(options, f"min_{what}"), getattr(options, f"max_{what}")
        if least is not None and most is not None and least > most:
            raise ConfigError(f"--min-{what}", least, f"above --max-{what}={most}", "no document would be left")
    _check_share(options)
    if options.eod_token is not None and not options.append_eod:
        raise ConfigError("--eod-token", options.eod_token, "with --append-eod no", "give one of the two")
    valid = options.valid_output
    if valid is None and options.valid_fraction > 0:
        fraction = options.valid_fraction
        raise ConfigError("--valid-fraction", fraction, "nowhere to put them", "add --valid-output PREFIX")
    if valid is not None and options.valid_fraction == 0:
        raise ConfigError("--valid-output", str(valid), "nothing would go there", "add --valid-fraction 0.02")
    prefixes = [Path(p) for p in (output_prefix, valid) if p is not None]
    if len({p.resolve() for p in prefixes}) < len(prefixes):
        raise ConfigError("--valid-output", str(valid), "is --output as well", "give another prefix")
    for key, prefix in zip(("--output", "--valid-output"), prefixes):
        if not prefix.name or str(prefix).endswith(("/", ".bin", ".idx")) or prefix.is_dir():
            raise ConfigError(key, str(prefix), "is not a file prefix", "give a path such as data/train")
    return prefixes


def _check_share(options: Options) -> None:
    if options.share is None:
        return
    first, step = options.share
    told = f"{first}/{step}"
    if not 0 <= first < step:
        raise ConfigError("--share", told, "is no share", "count from 0: the shares of two are 0/2 and 1/2")
    if options.overwrite:
        raise ConfigError("--share", told, "with --overwrite", "remove what is there before the shares start")
    if options.executor != "local":
        raise ConfigError("--share", told, f"with --executor {options.executor}", "give one of the two")


def make_settings(corpus: Corpus, tokenizer_path: str | Path, options: Options) -> Settings:
    """What decides which tokens come out, for the plan.

    Raises:
        UserError: a tokenizer that cannot be read, or lacks a token that is asked for.
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
        valid_fraction=options.valid_fraction,
        valid_max_bytes=options.valid_max_bytes,
        filters=options.filters,
        min_chars=options.min_chars,
        max_chars=options.max_chars,
        min_tokens=options.min_tokens,
        max_tokens=options.max_tokens,
        deduplicate=options.deduplicate,
    )


def _eod(tokenizer: Tokenizer, options: Options) -> int | None:
    """Id that ends every document."""
    if not options.append_eod:
        return None
    if options.eod_token is None:
        return tokenizer.eod
    eod = tokenizer.id_of(options.eod_token)
    if eod is None:
        special = sorted(tokenizer.token_of(i) for i in tokenizer.special_ids)
        ids = tokenizer.encode(options.eod_token)  # a newline is written Ċ in byte-level vocabularies
        near = [tokenizer.token_of(ids[0])] if len(ids) == 1 else get_close_matches(options.eod_token, special, n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"its special tokens are {', '.join(special[:5]) or 'none'}"
        raise ConfigError("--eod-token", options.eod_token, "the tokenizer has no such token", fix)
    return eod


def _bos(tokenizer: Tokenizer, path: str | Path) -> int:
    """Id that begins every document."""
    try:
        return tokenizer.bos
    except NotImplementedError:
        why = f"the tokenizer {path} has no beginning-of-sequence token"
        raise ConfigError(
            "--prepend-bos", True, why, "name one in its tokenizer_config.json, or leave this out"
        ) from None
