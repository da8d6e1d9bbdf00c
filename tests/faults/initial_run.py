"""What the tests of `checkpoint.init_from` run on each rank: a run as `elas train` starts it."""

import contextlib
import io


def train(settings: dict) -> tuple[str, str]:
    """Train to the end; how it ended, and what the console showed on this rank."""
    from elas import parallel
    from elas.checkpoint.choose import find_checkpoint
    from elas.checkpoint.initial import find_initial
    from elas.config import load_config
    from elas.errors import UserError
    from elas.train.loop import run

    config = load_config(None, settings)
    resume = find_checkpoint(config)
    initial = find_initial(config, resume)
    layout = parallel.initialize(config.parallel, seed=config.train.seed)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            ended = repr(run(config, layout, resume, initial))
        except UserError as error:
            ended = str(error)
    return ended, shown.getvalue()
