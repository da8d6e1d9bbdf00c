"""Rows hold every predicted token once, or exactly as many as asked for, spread over the corpus."""

import numpy as np
import pytest

from elas.evaluate.rows import Documents, rows_of


def corpus(lengths: list[int]) -> Documents:
    """Documents with gaps between them, as a held-out share has; each id says where it stands."""
    starts = np.cumsum([0, *(n + 3 for n in lengths)])[:-1]
    return Documents("x", np.arange(starts[-1] + lengths[-1]), starts, np.array(lengths))


LENGTHS = [5, 1, 64, 33, 2, 7, 100, 1]


@pytest.mark.parametrize("protocol", ("packed", "papers"))
def test_rows_are_the_documents(protocol):
    documents = corpus(LENGTHS)
    rows = rows_of(documents, protocol, 32, None)
    held = [rows[i] for i in range(len(rows))]
    whole = [np.arange(start, start + n) for start, n in zip(documents.starts, LENGTHS)]
    if protocol == "packed":
        chained = np.concatenate(whole)
        assert all((ids == chained[32 * i : 32 * i + 33]).all() for i, (ids, _) in enumerate(held))
        assert sum(len(owners) for _, owners in held) == sum(LENGTHS) - 1
        owners = np.repeat(np.arange(len(LENGTHS)), LENGTHS)[1:]
    else:
        usable = [i for i, n in enumerate(LENGTHS) if n > 1]
        assert [ids.tolist() for ids, _ in held] == [whole[i][:33].tolist() for i in usable]
        owners = np.concatenate([np.full(min(LENGTHS[i] - 1, 32), i) for i in usable])
    assert np.concatenate([of for _, of in held]).tolist() == owners.tolist()
    assert rows.lengths().tolist() == [len(of) for _, of in held]


@pytest.mark.parametrize("protocol", ("packed", "papers"))
def test_a_limit_is_exact_and_spread(protocol):
    documents = corpus(LENGTHS * 9)
    every = rows_of(documents, protocol, 32, None)
    total, single = int(every.lengths().sum()), {every[i][0][0] for i in range(len(every))}
    for limit in (1, 2, 31, 32, 33, 64, 500, total - 1, total, 10 * total):
        rows = rows_of(documents, protocol, 32, limit)
        assert rows.lengths().sum() == min(limit, total) and (rows.lengths() > 0).all()
        assert {rows[i][0][0] for i in range(len(rows))} <= single, "rows of the whole, not others"
    first, last = (rows_of(documents, protocol, 32, 500)[i][1][0] for i in (0, -1))
    assert first < 8 and last > 7 * 8, "spread over the corpus"


def test_nothing_to_predict_is_no_row():
    for protocol in ("packed", "papers"):
        assert len(rows_of(corpus([1]), protocol, 32, None)) == 0
