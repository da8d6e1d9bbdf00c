"""One truncated document per sample, as in the papers that ELAS is compared with.

A document longer than a sample is truncated and its rest never seen; a shorter one is padded, and the padding is
ignored in the loss (label −1). Packing, the default, sees every token and needs no padding.
"""

from collections import OrderedDict

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from elas.data.token_files import TokenFiles

IGNORED = -1
"""Label of a position without a next token; ignored in the loss."""


class TruncatedDocuments(torch.utils.data.Dataset):
    """The first `seq_length` tokens of each document, shuffled.

    Args:
        files: the corpus.
        documents: numbers of the documents to use, int64, ascending; those with fewer than two tokens are left out.
        part: training or validation.
        seq_length: tokens in a sample.
        seed: of the order.
    """

    def __init__(self, files: TokenFiles, documents: np.ndarray, part: Split, seq_length: int, seed: int):
        self.prefix, self.seq_length = files.prefix, seq_length
        usable = documents[files.lengths_of(documents) > 1]
        self._order = np.random.default_rng((seed, part.value)).permutation(usable)
        self._tokens: IndexedDataset | None = None
        # Attributes that BlendedDataset requires of its parts.
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
