"""The configuration: typed dataclasses, read from YAML, overridden by `--section.key value`.

`schema` defines the settings; `reading` parses them with jsonargparse and turns each error into one line
(`elas.errors.ConfigError`); `rules` checks combinations of settings before any process group exists. Precedence, low to
high: dataclass default, YAML file, command line.
"""

from elas.config.reading import (
    flatten,
    from_flat,
    laid_over,
    load_config,
    presets,
    read_yaml,
    split_overrides,
    split_settings,
)
from elas.config.schema import (
    KEYS,
    SECTIONS,
    CheckpointConfig,
    Config,
    DataConfig,
    ExportConfig,
    LogConfig,
    LowRankConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    SparsityConfig,
    TrainConfig,
    ffn_width,
    recompute_of,
)

__all__ = [
    "KEYS",
    "SECTIONS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "ExportConfig",
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
    "laid_over",
    "load_config",
    "presets",
    "read_yaml",
    "recompute_of",
    "split_overrides",
    "split_settings",
]
