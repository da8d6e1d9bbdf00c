"""Which documents of a corpus are trained on, and which `data.split` holds out: spread over the whole corpus.

The held-out documents are one from each of as many equal stretches of the corpus, at a random place in its stretch:
exact in number, and as mixed as the corpus, where its last documents may be of one kind. The choice depends on the
number of documents and on the shares alone: not on `train.seed`, `train.steps` or the layout, so runs compare.
"""

import math

import numpy as np

from elas.errors import ConfigError

SCHEME = "spread"
"""Name of this choice in checkpoints; those without one held out the last documents."""
EVERYTHING = (1.0, 0.0, 0.0)


def parse_split(split: str) -> tuple[float, float, float]:
    """`data.split` as shares that add up to 1.

    Raises:
        ConfigError: not one to three numbers of 0 or more, or all are 0.
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
    """Documents held out of training, and how many of them are for validation (the others are the test share)."""
    train = round(shares[0] * documents)
    return documents - train, round((shares[0] + shares[1]) * documents) - train


def divide(documents: int, shares: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the documents to train and to validate on, each int64 and ascending; either may be empty."""
    out, for_validation = held_out_counts(documents, shares)
    held_out = _spread(out, documents)
    trained_on = np.ones(documents, dtype=bool)
    trained_on[held_out] = False
    return np.flatnonzero(trained_on), held_out[_spread(for_validation, out)]


def _spread(count: int, of: int) -> np.ndarray:
    """`count` of the numbers below `of`, one from each of `count` equal stretches: int64, ascending."""
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    edges = np.arange(count + 1, dtype=np.int64) * of // count
    places = np.random.RandomState(0).random_sample(count)  # NumPy keeps this stream as it is, a Generator's it may not
    return edges[:-1] + (places * np.diff(edges)).astype(np.int64)
