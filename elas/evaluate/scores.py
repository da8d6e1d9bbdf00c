"""Sums of losses over documents and batches, and the figures made of them.

Legend: D documents, N predicted tokens, n batches, L the mean loss in nats.

loss: L = Σ nats / N over all predicted tokens. ppl: exp L.
loss_stderr: of L, over documents, whose losses are independent while the tokens of one are not:
    sqrt(D/(D−1) · Σ_d (nats_d − L·N_d)²) / N, the standard error of a ratio of two sums. None with a single document.
ppl_n_plus_1: what the research code that ELAS is compared with reports: it divides the sum of the batches' mean losses
    by n + 1 (its counter starts at 1), so its figure is lower, the more so the fewer the batches.
bits_per_byte: Σ nats / ln 2 / bytes of the text predicted, so that models with different tokenizers compare. Special
    tokens have no bytes, but their nats count.
"""

import math

import numpy as np
import torch

from elas.evaluate.rows import Documents


class Scores:
    """Of one corpus, on one rank until `add_up`.

    Args:
        documents: evaluated.
        batches: n, over all ranks.
        byte_lengths: bytes of each token id, int64 `[vocabulary]`; None if unknown.
    """

    def __init__(self, documents: Documents, batches: int, byte_lengths: np.ndarray | None):
        self._documents, self._byte_lengths = documents, byte_lengths
        self.nats, self.tokens, self.bytes = (np.zeros(len(documents)) for _ in range(3))
        self.batches = np.zeros(batches)

    def add(self, batch: int, losses: np.ndarray, labels: np.ndarray, owners: np.ndarray) -> None:
        """Add the predictions of a batch.

        Args:
            batch: its number.
            losses: nats of each label, `[m]`.
            labels: token ids, `[m]`.
            owners: document of each label, `[m]`.
        """
        losses = losses.astype(np.float64)
        self.batches[batch] = losses.mean()
        np.add.at(self.nats, owners, losses)
        np.add.at(self.tokens, owners, 1.0)
        if self._byte_lengths is not None:
            np.add.at(self.bytes, owners, self._byte_lengths[labels])

    @property
    def mean(self) -> float:
        """Mean loss of what this rank has added; NaN before that."""
        tokens = self.tokens.sum()
        return float(self.nats.sum() / tokens) if tokens else math.nan

    def add_up(self, device: torch.device) -> None:
        """Sum over all ranks; each must have added other batches. Every rank calls it."""
        sums = np.concatenate([self.nats, self.tokens, self.bytes, self.batches])
        summed = torch.from_numpy(sums).to(device)
        torch.distributed.all_reduce(summed)
        count = len(self.nats)
        self.nats, self.tokens, self.bytes, self.batches = np.split(summed.cpu().numpy(), [count, 2 * count, 3 * count])

    def predicted_bytes(self) -> int | None:
        """Bytes of the text of all predicted tokens; exact where the documents' own sizes are known."""
        if self._byte_lengths is None:
            return None
        bytes_of, documents = self.bytes.copy(), self._documents
        if documents.sizes is not None:
            missing = documents.lengths - self.tokens
            whole, but_first = missing == 0, missing == 1  # the first token of a row with nothing before it
            bytes_of[whole] = documents.sizes[whole]
            first = self._byte_lengths[documents.ids[documents.starts[but_first]]]
            bytes_of[but_first] = documents.sizes[but_first] - first
        return int(bytes_of.sum())


def figures(scores: list[Scores]) -> dict:
    """The figures of some corpora together; see the module.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    nats, tokens, batches = (np.concatenate([getattr(s, k) for s in scores]) for k in ("nats", "tokens", "batches"))
    seen = tokens > 0
    nats, tokens = nats[seen], tokens[seen]
    if not np.isfinite(nats).all():
        bad = int((~np.isfinite(nats)).sum())
        raise FloatingPointError(f"the loss is not finite in {bad:,} of {len(nats):,} documents; check the checkpoint")
    total, count, documents = float(nats.sum()), int(tokens.sum()), len(nats)
    loss = total / count
    stderr = None
    if documents > 1:
        stderr = math.sqrt(documents / (documents - 1) * float(((nats - loss * tokens) ** 2).sum())) / count
    sizes = [one.predicted_bytes() for one in scores]
    known = [one for one in sizes if one is not None]
    size = sum(known) if len(known) == len(sizes) else None
    return {
        "loss": loss,
        "loss_stderr": stderr,
        "ppl": _exp(loss),
        "ppl_n_plus_1": _exp(float(batches.sum()) / (len(batches) + 1)),
        "bits_per_byte": total / math.log(2) / size if size else None,
        "tokens": count,
        "documents": documents,
        "bytes": size,
        "batches": len(batches),
    }


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
