"""The amount of training and validation data, counted from the corpora's `.idx` files; builds no sample index."""

from dataclasses import dataclass

import numpy as np

from elas.config import Config
from elas.data.corpus import parse_blend
from elas.data.split import EVERYTHING, divide, parse_split
from elas.data.token_files import read_token_files


@dataclass(frozen=True)
class Source:
    """One corpus of a blend, or the only corpus.

    Attributes:
        prefix: prefix of its token files.
        share: its share of the samples drawn, 0 to 1.
        samples: samples in one epoch.
        tokens: labels that count in the loss in one epoch.
    """

    prefix: str
    share: float
    samples: int
    tokens: int


@dataclass(frozen=True)
class Extent:
    """The data that a run trains and validates on."""

    train: tuple[Source, ...]
    valid: tuple[Source, ...]
    train_samples: int
    """Samples that the run takes, over all epochs."""
    valid_samples: int
    """Samples in one validation, each at most once."""

    @property
    def tokens(self) -> int:
        """Tokens (labels that count) that the run trains on, over all epochs."""
        return _drawn(self.train, self.train_samples)

    @property
    def valid_tokens(self) -> int:
        """Tokens of one validation."""
        return _drawn(self.valid, self.valid_samples)

    def epochs(self, source: Source) -> float:
        """Epochs of one source in the run."""
        return self.train_samples * source.share / source.samples

    @property
    def all_epochs(self) -> float:
        """Samples that the run takes, divided by the samples of all sources together."""
        return self.train_samples / sum(source.samples for source in self.train)


def extent(config: Config) -> Extent:
    """Count the data of a run; `config` must have passed `elas.data.corpus.check_corpus`."""
    batch = config.train.global_batch_size
    own = config.data.valid is not None
    shares = EVERYTHING if own else parse_split(config.data.split)
    train = _sources(config, "data.train", shares, part=0)
    wanted = config.train.eval_batches * batch
    valid: tuple[Source, ...] = ()
    if wanted:
        valid = _sources(config, "data.valid", (0.0, 1.0, 0.0), 1) if own else _sources(config, "data.train", shares, 1)
    # A blend ends when its first source is exhausted.
    available = int(min((one.samples / one.share for one in valid), default=0) + 1e-6)
    return Extent(train, valid, config.train.steps * batch, min(wanted, available))


MOST_EPOCHS = 40
"""Repeating tokens more often than this teaches nothing more (arXiv 2305.16264, figure 5)."""
FEW_TOKENS = 10_000
"""With a loss of about 3 nats a token, the standard error of the mean of so many is 3 %."""


def thin_data(config: Config) -> list[str]:
    """Warnings if the run repeats a source far too often, or validates on very few tokens.

    Args:
        config: a configuration that passed `elas.data.corpus.check_corpus`.

    Returns:
        Lines `key=value: why; fix`.
    """
    data, found = extent(config), []
    worst = max(data.train, key=data.epochs)
    if data.epochs(worst) > MOST_EPOCHS:
        repeated = f"{worst.prefix} is repeated {data.epochs(worst):,.0f} times, and after about {MOST_EPOCHS} times"
        fix = "give more text or fewer steps"
        found.append(f"train.steps={config.train.steps}: {repeated} text teaches nothing more; {fix}")
    if 0 < data.valid_tokens < FEW_TOKENS:
        own, train = config.data.valid is not None, config.train
        if data.valid_samples == train.eval_batches * train.global_batch_size:
            key, value = "train.eval_batches", train.eval_batches
            fix = f"give {-(-FEW_TOKENS * train.eval_batches // data.valid_tokens)} or more"
        else:  # all that there is
            key, value = ("data.valid", config.data.valid) if own else ("data.split", config.data.split)
            fix = "hold out more text"
        why = f"a validation has only {data.valid_tokens:,} tokens, so its perplexity is off by several percent"
        found.append(f"{key}={value}: {why}; {fix}")
    return found


def _sources(config: Config, key: str, shares: tuple[float, float, float], part: int) -> tuple[Source, ...]:
    prefixes, weights = parse_blend(key, getattr(config.data, key.split(".")[1]))
    counts = [_count(config, key, prefix, shares, part) for prefix in prefixes]
    drawn = weights or [float(samples) for samples, _ in counts]
    return tuple(Source(p, w / sum(drawn), *count) for p, w, count in zip(prefixes, drawn, counts))


def _count(config: Config, key: str, prefix: str, shares: tuple[float, float, float], part: int) -> tuple[int, int]:
    """Samples and labels in one epoch of a corpus's documents for training (part 0) or validation (part 1)."""
    files, seq_length = read_token_files(key, prefix), config.model.seq_length
    lengths = files.lengths_of(divide(files.documents, shares)[part])
    if config.data.packing == "document":
        usable = lengths[lengths > 1]
        return len(usable), int(np.minimum(usable - 1, seq_length).sum())
    samples = max(0, (int(lengths.sum()) - 1) // seq_length)
    return samples, samples * seq_length


def _drawn(sources: tuple[Source, ...], samples: int) -> int:
    return round(sum(samples * one.share * one.tokens / one.samples for one in sources))
