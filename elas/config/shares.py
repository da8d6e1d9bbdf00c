"""Convert steps given as a share of the run, `sparsity.dense_steps: 0.2`, to steps; this is the only place."""

from elas.config.kinds import Range, range_of
from elas.config.schema import KEYS, Config, field_type

SHARES = [key for key in KEYS if getattr(range_of(field_type(key)), "share_of", None)]
"""Keys that may be a share of `train.steps`."""


def resolve_shares(config: Config) -> None:
    """Replace every share by the nearest whole number of steps, at least 1.

    A float outside 0 to 1 is left unchanged and rejected by `elas.config.rules`. All later code sees steps, so that
    config.json, checkpoints and `--show-config` record what was trained; `config.shares` keeps the shares as given.
    """
    shares = {}
    for key in SHARES:
        section, name = key.split(".")
        part = getattr(config, section)
        value, allowed = getattr(part, name), range_of(field_type(key))
        if isinstance(value, float) and isinstance(allowed, Range) and allowed.holds(value):
            setattr(part, name, max(1, round(value * config.train.steps)))
            shares[key] = value
    config.shares = shares
