"""Dense steps in loops of one's own: each step counts once, and no layer is left dense in silence."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from elas.errors import ConfigError
from elas.nn import LORO, LowRankFFN, LowRankLinear, count_steps, set_step

pytestmark = pytest.mark.any_device


def model(layers: int = 2, dense_steps: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(LowRankFFN(8, 16, 4, dense_steps=dense_steps) for _ in range(layers)))


def sgd(module: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=1e-3)


def trained(module: nn.Module, optimizers: list, steps: int) -> list[list[int]]:
    """One row for each step: where 2:4 was on in training."""
    seen = []
    for _ in range(steps):
        for _ in range(2):  # micro-batches
            module(torch.randn(6, 8)).sum().backward()
        seen.append([int(layer.sparse) for layer in module])
        for optimizer in optimizers:
            optimizer.step()
    return seen


def test_calls_again_do_not_count_twice():
    one = model()
    optimizer = sgd(one)
    for wrapped in (one, [one], nn.Sequential(one), one[1]):
        count_steps(wrapped, optimizer)
    assert trained(one, [optimizer], 4) == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert [layer.step for layer in one] == [4, 4]


def test_optimizers_of_parts_and_in_turn_count_a_step_once():
    one = model(dense_steps=3)
    parts = [sgd(one[0]), sgd(one[1])]
    for optimizer in parts:
        count_steps(one, optimizer)
    assert trained(one, parts, 2) == [[0, 0]] * 2
    other = sgd(one)
    count_steps(one, other)
    assert trained(one, [other], 3) == [[0, 0], [1, 1], [1, 1]]  # steps 3, 4, 5
    assert one[0].step == 5


def test_parts_counted_apart_are_counted_together():
    one = model()
    parts = [sgd(one[0]), sgd(one[1])]
    for layer, optimizer in zip(one, parts):
        count_steps(layer, optimizer)
    trained(one, parts, 1)
    count_steps(one, parts[0])
    trained(one, parts, 1)
    assert [layer.step for layer in one] == [2, 2]


def test_a_layer_put_in_later_raises_until_it_is_counted():
    one = model()
    optimizer = sgd(one)
    count_steps(one, optimizer)
    trained(one, [optimizer], 3)
    one[1] = LowRankFFN(8, 16, 4, dense_steps=2)
    with pytest.raises(ConfigError, match=r"^dense_steps=2: .*elas\.nn\.count_steps\(model, optimizer\), again"):
        one(torch.randn(6, 8))
    count_steps(one, optimizer)
    assert trained(one, [optimizer], 1) == [[1, 1]]
    assert [layer.step for layer in one] == [4, 4]


def test_copies_do_not_train_uncounted():
    one = model()
    optimizer = sgd(one)
    count_steps(one, optimizer)
    trained(one, [optimizer], 3)
    x = torch.randn(6, 8)
    for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        with pytest.raises(ConfigError, match="dense_steps=2: "):
            twin(x)
        assert torch.equal(twin.eval()(x), one.eval()(x)) and twin[0].sparse
        its = sgd(twin.train())
        count_steps(twin, its)
        assert trained(twin, [its], 1) == [[1, 1]] and twin[0].step == 4
    assert one[0].step == 3


def test_averages_evaluate_as_their_model():
    one = model()
    optimizer = sgd(one)
    count_steps(one, optimizer)
    average = AveragedModel(one, use_buffers=False).eval()
    for want in (False, False, True):
        trained(one, [optimizer], 1)
        average.update_parameters(one)
        average(torch.randn(6, 8))
        assert average.module[0].sparse == want


def test_loading_goes_on_from_there():
    one = model(dense_steps=3)
    optimizer = sgd(one)
    count_steps(one, optimizer)
    trained(one, [optimizer], 2)
    saved = copy.deepcopy(one.state_dict())
    trained(one, [optimizer], 3)
    one.load_state_dict(saved)  # back to two steps taken
    assert trained(one, [optimizer], 3) == [[0, 0], [1, 1], [1, 1]]
    one.load_state_dict(saved)
    assert not one.eval()[0].sparse
    for layer in one:
        layer.reset_parameters()
    assert one[0].sparsity_step.item() == one[0].step == 0


def test_compiled_steps_are_counted_without_a_graph_each():
    """More steps than torch recompiles for: an error with fullgraph if any graph depended on the step."""
    one = model(1)
    optimizer = sgd(one)
    count_steps(one, optimizer)
    torch._dynamo.reset()
    compiled = torch.compile(one, backend="aot_eager", fullgraph=True)
    seen = []
    for _ in range(torch._dynamo.config.recompile_limit + 3):
        compiled(torch.randn(6, 8)).sum().backward()
        seen.append(one[0].sparse)
        optimizer.step()
    assert seen == [False] * 2 + [True] * (len(seen) - 2)


def test_between_factors_and_under_loro():
    one = nn.Sequential(LowRankLinear(8, 8, 4, activation="relu2", dense_steps=1))
    with pytest.raises(ConfigError, match=r"^dense_steps=1: "):
        one(torch.randn(2, 8))
    two = model(1, dense_steps=1)
    optimizer = LORO(two, lr=1e-3)
    count_steps(two, optimizer)
    assert trained(two, [optimizer], 2) == [[0], [1]]


def test_nothing_is_kept_alive():
    one = model()
    gone, optimizer = weakref.ref(one), sgd(one)
    count_steps(one, optimizer)
    del one
    gc.collect()
    assert gone() is None
    optimizer.step()


def test_a_step_that_is_said_counts_too():
    one = model()
    set_step([one], 2)
    one(torch.randn(2, 8))
    assert not one[0].sparse
    optimizer = sgd(one)
    count_steps(one, optimizer)  # two steps were taken
    assert trained(one, [optimizer], 1) == [[1, 1]]


REFUSED = {
    "none": (lambda one: count_steps(one, None), "^optimizer='NoneType': "),
    "parameters": (lambda one: count_steps(one, one.parameters()), "^optimizer='generator': "),
    "another's": (lambda one: count_steps(one, sgd(model())), "^optimizer='SGD': holds none of the model's parameters"),
    "swapped": (lambda one: count_steps(sgd(one), one), "^models='SGD': "),
    "names": (lambda one: count_steps(["model"], sgd(one)), "^models='list': "),
}


@pytest.mark.parametrize("call, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_count_is_refused(call, message):
    with pytest.raises(ConfigError, match=message) as said:
        call(model())
    assert "\n" not in str(said.value)
