"""What the test of parameter counts runs on each rank."""

from support.parity_run import SMALL


def counts(layouts: list[dict]) -> list[int]:
    """The model's parameters as each layout counts them, after DeepSpeed has taken it over."""
    from elas import parallel
    from elas.config import load_config
    from elas.engine.engine import Engine
    from elas.model.provider import count_parameters

    found = []
    for overrides in layouts:
        config = load_config(None, {**SMALL, **overrides})
        layout = parallel.initialize(config.parallel, seed=config.train.seed)
        found.append(count_parameters(Engine(config, layout).chunks))
        parallel.shut_down()
    return found
