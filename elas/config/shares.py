"""Steps that are given as a share of the run, `sparsity.dense_steps: 0.2`, made steps: here and nowhere else."""

from elas.config.kinds import Range, range_of
from elas.config.schema import KEYS, Config, field_type

SHARES = [key for key in KEYS if getattr(range_of(field_type(key)), "share_of", None)]
"""Keys that may be a share of `train.steps`."""


def resolve_shares(config: Config) -> None:
    """Replace every share by whole steps: the nearest number of them, at least 1.

    A number outside of 0 to 1 stays, for `elas.config.rules` to refuse. Everything after reading sees steps, so that
    config.json, checkpoints and `--show-config` say what was trained; `config.shares` keeps what was given.
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
