"""Bits per byte of the validation loss, so that runs with different tokenizers compare."""

import math

import numpy as np

from elas.config import Config
from elas.data.batches import Samples
from elas.data.tokenizer import load_tokenizer
from elas.data.tokenizer.byte_lengths import byte_lengths
from elas.data.tokenizer.found import tokenizer_of
from elas.errors import UserError


class BitsPerByte:
    """Of a run's validations, if the tokenizer of its corpora is known (`elas.data.tokenizer.found`).

    Exact as far as `elas.data.tokenizer.byte_lengths` is.

    Args:
        config: the run's.
        dataset: its validation samples; None if it does not validate.
    """

    def __init__(self, config: Config, dataset: Samples | None):
        self._config, self._dataset = config, dataset
        self._bytes: int | None = None

    def of(self, nats: float) -> dict[str, float]:
        """`bits_per_byte` of the summed loss of the whole set; empty if it is not known.

        The first call counts the bytes, in one pass over the set.
        """
        if self._bytes is None:
            self._bytes = self._count()
        return {"bits_per_byte": nats / math.log(2) / self._bytes} if self._bytes else {}

    def _count(self) -> int:
        try:
            tokenizer = load_tokenizer(tokenizer_of(self._config, None))
        except UserError:
            return 0
        lengths = byte_lengths(tokenizer, self._config.model.vocab_size)
        total, samples = 0, self._dataset
        assert samples is not None  # a loss was computed on them
        for index in range(len(samples)):
            labels = np.asarray(samples[index]["labels"])
            total += int(lengths[labels[labels >= 0]].sum())
        return total
