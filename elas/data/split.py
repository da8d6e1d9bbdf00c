"""Split a corpus's documents by `data.split`, with the held-out documents spread over the whole corpus.

To hold out n documents, the corpus is divided into n equal stretches and one document is taken at a random place of
each. The number is exact, and the held-out documents are as mixed as the corpus, whose last documents may be all of one
kind. The choice depends only on the number of documents and the shares, not on `train.seed`, `train.steps` or the
layout, so runs are comparable.
"""

import math

import numpy as np

from elas.errors import ConfigError

SCHEME = "spread"
"""Name of this scheme in checkpoints; checkpoints without a name held out the last documents."""
EVERYTHING = (1.0, 0.0, 0.0)


def parse_split(split: str) -> tuple[float, float, float]:
    """Parse `data.split` to `(train, valid, test)` shares that sum to 1.

    Raises:
        ConfigError: not one to three non-negative numbers, or all are 0.
    """
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(0 <= share < math.inf for share in shares) or not sum(shares):
        raise ConfigError("data.split", split, "is not a split", "write three shares, such as 99,1,0")
    train, valid, test = (*shares, 0.0, 0.0)[:3]
    return train / sum(shares), valid / sum(shares), test / sum(shares)


def held_out_counts(documents: int, shares: tuple[float, float, float]) -> tuple[int, int]:
    """Number of documents held out of training, and of those for validation (the others are the test share)."""
    train = round(shares[0] * documents)
    return documents - train, round((shares[0] + shares[1]) * documents) - train


def divide(documents: int, shares: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and the validation documents, each int64 and ascending; either may be empty."""
    out, for_validation = held_out_counts(documents, shares)
    held_out = _spread(out, documents)
    trained_on = np.ones(documents, dtype=bool)
    trained_on[held_out] = False
    return np.flatnonzero(trained_on), held_out[_spread(for_validation, out)]


def _spread(count: int, of: int) -> np.ndarray:
    """`count` of the integers below `of`, one from each of `count` equal stretches: int64, ascending."""
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    edges = np.arange(count + 1, dtype=np.int64) * of // count
    # RandomState, not Generator: only its stream is guaranteed to stay the same in future NumPy versions.
    places = np.random.RandomState(0).random_sample(count)
    return edges[:-1] + (places * np.diff(edges)).astype(np.int64)
