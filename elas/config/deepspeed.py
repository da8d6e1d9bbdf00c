"""Read the user's DeepSpeed JSON, which sets DeepSpeed's own knobs only.

A `ds_configs/zeroN.json` configures ZeRO (stage, buckets, overlap, offload). Batch sizes, dtype, clipping, optimizer
and schedule belong to ELAS's own configuration; a JSON that sets them is rejected, so that two sources never disagree.
`elas.config.deepspeed_knobs` lists which of DeepSpeed's own knobs are supported.
"""

import functools
import json
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

from elas.config import Config
from elas.config.deepspeed_knobs import KEY, OURS, TOP_LEVEL, supported_knobs
from elas.errors import ConfigError


def read_deepspeed_json(config: Config) -> dict:
    """The user's DeepSpeed JSON, or the shipped one for `parallel.zero`.

    Raises:
        ConfigError: the JSON is unreadable, or sets something that belongs to ELAS's configuration or is unsupported.
    """
    source = config.parallel.deepspeed_config
    if source is None:
        stage = 1 if config.parallel.zero is None else config.parallel.zero
        return json.loads(_shipped(stage))
    try:
        values = json.loads(Path(source).read_text(encoding="utf-8"), object_pairs_hook=_once)
    except OSError as error:
        raise ConfigError(KEY, source, error.strerror or "cannot be read", "give a DeepSpeed JSON") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(KEY, source, f"is not JSON ({error})", "fix the file") from None
    if not isinstance(values, dict):
        raise ConfigError(KEY, source, "does not hold an object", "give a DeepSpeed JSON")
    zero = values.get("zero_optimization", {})
    if not isinstance(zero, dict):
        why = "zero_optimization is not an object"
        raise ConfigError(KEY, source, why, 'write {"zero_optimization": {"stage": 1}}')
    if type(zero.get("stage", 0)) is not int:
        raise ConfigError(KEY, source, f"zero_optimization.stage is {zero['stage']!r}", "give 0, 1, 2 or 3")
    if zero.get("stage", 0) not in range(4):
        raise ConfigError(KEY, source, f"there is no ZeRO stage {zero['stage']}", "use 0 to 3")
    for name in values:
        if name in OURS:
            raise ConfigError(KEY, source, f"sets {name}", f"remove it there and set {OURS[name]}")
        if name not in TOP_LEVEL:
            near = get_close_matches(name, TOP_LEVEL, n=1)
            fix = f"did you mean {near[0]}?" if near else "remove it"
            raise ConfigError(KEY, source, f"sets {name}, which is not a DeepSpeed knob supported here", fix)
    return supported_knobs(source, values)


@functools.cache
def _shipped(stage: int) -> str:
    return (resources.files("elas.ds_configs") / f"zero{stage}.json").read_text()


def _once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; raises `ValueError` if a name occurs twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is given twice")
    return values


def choose_zero_stage(config: Config, world_size: int) -> None:
    """Set `parallel.zero` if neither it nor a DeepSpeed JSON is given: 1, or 0 with one data-parallel rank.

    One rank has nothing to partition, and ZeRO 1's flat copies would cost a third of a step's time.
    """
    parallel = config.parallel
    if parallel.zero is None and parallel.deepspeed_config is None:
        parallel.zero = 0 if world_size <= parallel.tensor * parallel.pipeline else 1


def zero_stage(values: dict) -> int:
    """The ZeRO stage that a DeepSpeed JSON sets."""
    return values.get("zero_optimization", {}).get("stage", 0)


def offloads_optimizer(values: dict) -> bool:
    """Whether a DeepSpeed JSON offloads optimizer state to the CPU."""
    offload = values.get("zero_optimization", {}).get("offload_optimizer") or {}
    return isinstance(offload, dict) and offload.get("device", "none") != "none"
