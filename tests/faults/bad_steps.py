"""What the tests of bad steps run on each rank: training in which one rank makes a NaN now and then."""

import math

import torch
from support.parity_run import SMALL, _step


def train(overrides: dict, bad_rank: int, bad_steps: tuple[int, ...], steps: int = 8, where: str = "output") -> list:
    """Losses and norms of each step, and a digest of this rank's weights before and after the first bad step.

    Args:
        overrides: configuration by dotted key.
        bad_rank: the rank whose last layer gives a NaN.
        bad_steps: when.
        steps: in all.
        where: `output`, or `gradient` for one that shows in the backward pass alone.
    """
    from elas import parallel
    from elas.config import load_config
    from elas.engine.engine import Engine
    from elas.engine.nonfinite import name_bad_layer
    from elas.model.activation import set_sparse

    config = load_config(None, {**SMALL, **overrides})
    layout = parallel.initialize(config.parallel, seed=config.train.seed)
    engine = Engine(config, layout)
    now = {"bad": False}

    def spoil(_module, _inputs, output):
        if not now["bad"]:
            return None
        hidden = output[0]
        if where == "output":
            return (hidden * math.nan, *output[1:])
        hidden.register_hook(lambda grad: grad * math.nan)
        return None

    if layout.rank == bad_rank:
        engine.chunks[-1].decoder.layers[-1].register_forward_hook(spoil)
    results, states = [], []
    for step in range(steps):
        now["bad"] = step in bad_steps
        before = _digest(engine)
        results.append(_step(engine, step, set_sparse, None))
        if step in bad_steps:
            states.append(before == _digest(engine))
    now["bad"] = True
    _step(engine, steps, set_sparse, None)
    return [results, all(states), name_bad_layer(engine)]


def _digest(engine) -> tuple:
    from elas.engine.zero import base_state, fragments

    state = base_state(engine)
    held = fragments(engine)
    moments = [f.moment(state, "exp_avg").double().sum().item() for f in held.values() if state.get(f.flat)]
    weights = [p.ds_tensor if engine.stage == 3 else p.data for chunk in engine.chunks for p in chunk.parameters()]
    return tuple(torch.cat([w.double().flatten() for w in weights]).tolist()), tuple(moments)
