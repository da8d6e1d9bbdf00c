"""How much there is to train and to validate on, by counts from the corpora's indices; no sample index is built."""

from dataclasses import dataclass

import numpy as np

from elas.config import Config
from elas.data.corpus import parse_blend
from elas.data.split import EVERYTHING, divide, parse_split
from elas.data.token_files import read_token_files


@dataclass(frozen=True)
class Source:
    """One corpus of a blend, or the only one.

    Attributes:
        prefix: of its token files.
        share: of the samples drawn that come from it.
        samples: in one epoch.
        tokens: labels that count in one epoch.
    """

    prefix: str
    share: float
    samples: int
    tokens: int


@dataclass(frozen=True)
class Extent:
    """What a run trains and validates on."""

    train: tuple[Source, ...]
    valid: tuple[Source, ...]
    train_samples: int
    """That the run takes, over all epochs."""
    valid_samples: int
    """In one validation, which takes none of them twice."""

    @property
    def tokens(self) -> int:
        """Tokens that the run trains on, over all epochs."""
        return _drawn(self.train, self.train_samples)

    @property
    def valid_tokens(self) -> int:
        """Tokens of one validation."""
        return _drawn(self.valid, self.valid_samples)

    def epochs(self, source: Source) -> float:
        """Epochs of one source that the run takes."""
        return self.train_samples * source.share / source.samples

    @property
    def all_epochs(self) -> float:
        """Samples taken over samples there are, of all sources together."""
        return self.train_samples / sum(source.samples for source in self.train)


def extent(config: Config) -> Extent:
    """Count what a run will see; the corpora are checked (`elas.data.corpus.check_corpus`)."""
    batch = config.train.global_batch_size
    own = config.data.valid is not None
    shares = EVERYTHING if own else parse_split(config.data.split)
    train = _sources(config, "data.train", shares, part=0)
    wanted = config.train.eval_batches * batch
    valid: tuple[Source, ...] = ()
    if wanted:
        valid = _sources(config, "data.valid", (0.0, 1.0, 0.0), 1) if own else _sources(config, "data.train", shares, 1)
    # A blend ends where the first of its sources does.
    available = int(min((one.samples / one.share for one in valid), default=0) + 1e-6)
    return Extent(train, valid, config.train.steps * batch, min(wanted, available))


def _sources(config: Config, key: str, shares: tuple[float, float, float], part: int) -> tuple[Source, ...]:
    prefixes, weights = parse_blend(key, getattr(config.data, key.split(".")[1]))
    counts = [_count(config, key, prefix, shares, part) for prefix in prefixes]
    drawn = weights or [float(samples) for samples, _ in counts]
    return tuple(Source(p, w / sum(drawn), *count) for p, w, count in zip(prefixes, drawn, counts))


def _count(config: Config, key: str, prefix: str, shares: tuple[float, float, float], part: int) -> tuple[int, int]:
    """Samples of one epoch of a corpus's documents to train (part 0) or to validate (1) on, and their labels."""
    files, seq_length = read_token_files(key, prefix), config.model.seq_length
    lengths = files.lengths_of(divide(files.documents, shares)[part])
    if config.data.packing == "document":
        usable = lengths[lengths > 1]
        return len(usable), int(np.minimum(usable - 1, seq_length).sum())
    samples = max(0, (int(lengths.sum()) - 1) // seq_length)
    return samples, samples * seq_length


def _drawn(sources: tuple[Source, ...], samples: int) -> int:
    return round(sum(samples * one.share * one.tokens / one.samples for one in sources))
