"""What the tests of loss spikes run on each rank: the training loop, in which one step reports too high a loss."""

import math


def train(settings: dict, spike_at: tuple[int, ...], bad_at: tuple[int, ...] = ()) -> tuple[str, list[int]]:
    """Train to the end.

    Args:
        settings: configuration by dotted key.
        spike_at: calls of the engine's step, from 1, whose loss comes out 5 nats higher.
        bad_at: the same, whose loss and norm come out as NaN.

    Returns:
        How it ended, and the rank's batches by their first token id, in the order they were trained on.
    """
    from elas import parallel
    from elas.checkpoint.choose import find_checkpoint
    from elas.config import load_config
    from elas.engine.engine import Engine
    from elas.train.loop import run

    config = load_config(None, settings)
    layout = parallel.initialize(config.parallel, seed=config.train.seed)
    real, seen = Engine.step, []

    def step(self, batches, flags):
        loss, norm = real(self, batches, flags)
        seen.append(hash(tuple(self._last[0][0].flatten().tolist())))
        if len(seen) in bad_at:
            return math.nan, math.nan
        return loss + 5 * (len(seen) in spike_at), norm

    Engine.step = step
    try:
        return repr(run(config, layout, find_checkpoint(config))), seen
    except (FloatingPointError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", seen
    finally:
        Engine.step = real
