"""One truncated document a sample, as the papers of the field feed their models: for faithful comparisons.

A document longer than a sample is cut and its rest never seen; a shorter one is filled up, and what fills it is left
out of the loss (label −1). Packing, the default, sees every token and wastes none.
"""

from collections import OrderedDict

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from elas.data.token_files import TokenFiles

IGNORED = -1
"""Label of a position that has no next token."""


class TruncatedDocuments(torch.utils.data.Dataset):
    """The beginnings of documents, shuffled.

    Args:
        files: the corpus.
        documents: numbers of those in it, int64, ascending; those of one token or none make no sample.
        part: training or validation.
        seq_length: tokens in a sample.
        seed: of the order.
    """

    def __init__(self, files: TokenFiles, documents: np.ndarray, part: Split, seq_length: int, seed: int):
        self.prefix, self.seq_length = files.prefix, seq_length
        usable = documents[files.lengths_of(documents) > 1]
        self._order = np.random.default_rng((seed, part.value)).permutation(usable)
        self._tokens: IndexedDataset | None = None
        # What BlendedDataset asks of its parts.
        self.index_split = part
        facts = {"content": files.content(documents), "seq_length": seq_length, "seed": seed}
        self.unique_identifiers = OrderedDict(kind="elas-truncated-documents", part=part.name, **facts)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`tokens` and `labels`, int64 `[seq_length]`."""
        if self._tokens is None:
            self._tokens = IndexedDataset(self.prefix)
        begin, end = (int(n) for n in self._tokens.document_indices[self._order[index] : self._order[index] + 2])
        ids = np.concatenate([self._tokens[n] for n in range(begin, end)])[: self.seq_length + 1].astype(np.int64)
        tokens, labels = np.zeros(self.seq_length, np.int64), np.full(self.seq_length, IGNORED, np.int64)
        tokens[: len(ids) - 1], labels[: len(ids) - 1] = ids[:-1], ids[1:]
        return {"tokens": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}
