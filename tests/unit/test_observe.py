"""What is said of the activation, layer by layer, against counting by hand."""

import pytest
import torch

from elas.model.observe import COLUMNS, Observer, by_layer, look_next, observers, shares, sum_over_ranks


def looked(x, weight, sparse, tokens=10**6, observer=None):
    observer = observer or Observer()
    observer.tokens = tokens
    observer.look(x, None if weight is None else lambda rows: torch.nn.functional.linear(rows, weight), sparse)
    return dict(zip(COLUMNS, observer.counts.tolist(), strict=True)), observer


def test_counts_are_those_of_the_groups():
    z = torch.tensor([[3.0, 1.0, 2.0, -1.0, 0.0, 5.0, -2.0, -3.0], [-1.0, -1.0, -1.0, -1.0, 4.0, 4.0, 4.0, 4.0]])
    counts, _ = looked(z, None, True)
    assert (counts["values"], counts["zeros"], counts["dropped"]) == (16, 8, 3)
    assert (counts["magnitude"], counts["lost"]) == (9 + 1 + 4 + 25 + 64, 1 + 32)
    found = shares(torch.tensor(list(counts.values())))
    assert found["sparsity"] == 0.5 and found["dropped"] == 3 / 8
    assert found["dropped_magnitude"] == pytest.approx(33 / 103) and found["mask_flips"] is None
    dense, _ = looked(z, None, False)
    assert dense["dropped"] == dense["lost"] == 0 and dense["zeros"] == 8


def test_flips_compare_the_same_inputs_under_the_next_weights():
    x, weight = torch.eye(4), torch.tensor([[4.0, 3, 2, 1], [3, 4, 1, 2], [2, 1, 4, 3], [1, 2, 3, 4]])  # z = weightᵀ
    counts, observer = looked(x, weight, True)
    assert counts["kept"] == 0  # nothing to compare with yet
    same, _ = looked(torch.randn(4, 4), weight, True, observer=observer)
    assert (same["kept"], same["flipped"]) == (8, 0)  # other inputs, the same weights
    observer = looked(x, weight, True)[1]
    moved = weight.clone()
    moved[0, 0] = 0.5  # token 0: features 0, 1 become 1, 2
    counts, _ = looked(x, moved, True, observer=observer)
    assert (counts["kept"], counts["flipped"]) == (8, 1)


def test_a_look_is_asked_for_once_and_sampled():
    observer = Observer()
    observer.look(torch.randn(8, 8), None, True)
    assert observer.counts is None
    counts, observer = looked(torch.randn(64, 8), None, True, tokens=10)
    assert counts["values"] == 10 * 8 and observer.tokens == 0


def test_layers_are_told_apart_and_summed(one_rank):
    def layer(number):
        module = torch.nn.Module()
        module.mlp = torch.nn.Module()
        module.mlp.observer, module.layer_number = Observer(), number
        return module

    model = torch.nn.ModuleList([torch.nn.ModuleList([layer(2), layer(3)])])  # in a wrapper, as DDP's
    look_next([model], 100)
    first, second = observers([model])
    first.look(torch.ones(2, 4), None, True)
    counts = sum_over_ranks([model], 4)
    assert counts[:, 0].tolist() == [0, 8, 0, 0] and second.tokens == 100
    assert by_layer(counts)["dropped"] == [None, 0.5, None, None]
