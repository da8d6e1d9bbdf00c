"""The configuration: typed dataclasses, read from YAML, overridden by `--section.key value`.

`schema` holds the settings, `reading` reads them; parsing is jsonargparse's, what is ours is that each mistake becomes
one line (`elas.errors.ConfigError`). What combinations can work is checked in `elas.config.rules`, before any process
group exists. Precedence, low to high: dataclass default, YAML file, command line.
"""

from elas.config.reading import flatten, from_flat, load_config, presets, read_yaml, split_overrides, split_settings
from elas.config.schema import (
    KEYS,
    SECTIONS,
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    LowRankConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    SparsityConfig,
    TrainConfig,
    ffn_width,
)

__all__ = [
    "KEYS",
    "SECTIONS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LogConfig",
    "LowRankConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ScheduleConfig",
    "SparsityConfig",
    "TrainConfig",
    "ffn_width",
    "flatten",
    "from_flat",
    "load_config",
    "presets",
    "read_yaml",
    "split_overrides",
    "split_settings",
]
