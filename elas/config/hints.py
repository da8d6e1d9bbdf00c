"""Suggestions for unknown keys, options without a section, and values with units."""

import difflib
import re
import typing
from typing import Any

from elas.config.kinds import LARGEST, choices_of, name_of, parts_of, range_of
from elas.config.replaced import REPLACED, successor
from elas.config.schema import KEYS, SECTIONS, field_type
from elas.errors import ConfigError

OTHER_NAMES = {
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.eps",
    "adam_lr": "optimizer.lr_other",
    "batch_size": "train.global_batch_size",
    "bf16": "train.dtype",
    "d_ff": "model.ffn_hidden_size",
    "d_model": "model.hidden_size",
    "data_path": "data.train",
    "depth": "model.num_layers",
    "eval_interval": "train.eval_every",
    "eval_steps": "train.eval_every",
    "fp16": "train.dtype",
    "gradient_clipping": "optimizer.clip_grad",
    "heads": "model.num_attention_heads",
    "intermediate_size": "model.ffn_hidden_size",
    "layers": "model.num_layers",
    "learning_rate": "optimizer.lr",
    "load": "checkpoint.resume",
    "loro": "optimizer.kind",
    "log_interval": "log.every_steps",
    "logging_steps": "log.every_steps",
    "lr_decay_style": "schedule.kind",
    "lr_scheduler_type": "schedule.kind",
    "lr_warmup_iters": "schedule.warmup_steps",
    "max_grad_norm": "optimizer.clip_grad",
    "max_steps": "train.steps",
    "muon": "optimizer.kind",
    "muon_lr": "optimizer.lr",
    "muon_momentum": "optimizer.momentum",
    "n_heads": "model.num_attention_heads",
    "n_layers": "model.num_layers",
    "nesterov": "optimizer.momentum",
    "ns_steps": "optimizer.muon_steps",
    "num_epochs": "train.steps",
    "num_key_value_heads": "model.num_query_groups",
    "optimizer.name": "optimizer.kind",
    "optimizer.type": "optimizer.kind",
    "output_dir": "train.run_dir",
    "per_device_train_batch_size": "train.micro_batch_size",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "pp": "parallel.pipeline",
    "precision": "train.dtype",
    "resume_from_checkpoint": "checkpoint.resume",
    "report_to": "log.trackers",
    "rope_theta": "model.rotary_base",
    "save": "train.run_dir",
    "save_interval": "checkpoint.every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "seq_len": "model.seq_length",
    "sequence_length": "model.seq_length",
    "sequence_parallel": "parallel.sequence",
    "sp": "parallel.sequence",
    "spectron": "optimizer.normalize",
    "stage": "parallel.zero",
    "tensor_model_parallel_size": "parallel.tensor",
    "tensorboard": "log.trackers",
    "tp": "parallel.tensor",
    "train_iters": "train.steps",
    "valid_path": "data.valid",
    "vp": "parallel.virtual_pipeline",
    "wandb": "log.trackers",
    "wandb_project": "log.project",
    "warmup": "schedule.warmup_steps",
    "warmup_ratio": "schedule.warmup_steps",
    "wd": "optimizer.weight_decay",
    "zero_stage": "parallel.zero",
}
"""Names of the settings in other trainers: Megatron-LM, Hugging Face, papers."""


def likely_keys(word: str) -> list[str]:
    """Keys that a word may mean, best first: the same name in a section, another trainer's name, or a misspelling."""
    key = word.strip("-").replace("-", "_").lower()
    last = key.split(".")[-1]
    same = sorted(one for one in KEYS if one.split(".")[-1] == last)
    if same:  # most similar section first, so modle.activation suggests model.activation
        section = key.split(".")[0]
        return sorted(same, key=lambda one: -difflib.SequenceMatcher(None, one.split(".")[0], section).ratio())
    for name in (key, last, key.replace(".", "_")):
        if name in OTHER_NAMES:
            return [OTHER_NAMES[name]]
    section = key.split(".")[0]
    if section in SECTIONS and "." in key:  # else the section alone would make keys similar
        own = [one for one in KEYS if one.startswith(f"{section}.")]
        near = difflib.get_close_matches(last, [one.split(".")[1] for one in own], n=1, cutoff=0.5)
        return [f"{section}.{name}" for name in near]
    if "." in key:
        return difflib.get_close_matches(key, KEYS, n=1, cutoff=0.5)
    names = [one.split(".")[-1] for one in KEYS]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.7)
    return sorted(one for one in KEYS if one.split(".")[-1] in near)


def unknown_key(key: str, value: object) -> ConfigError:
    """The error for a key that does not exist, with a suggestion; for an earlier version's key, what to write today."""
    if key in REPLACED:
        new, values = REPLACED[key]
        try:
            given = [successor(key, value)[1]]
        except (KeyError, TypeError):  # never a value of it
            given = list(values.values())
        fix = " or ".join(f"{new}: [{', '.join(one)}]" for one in given)
        return ConfigError(key, value, f"was replaced by {new}", f"write {fix}")
    near = [] if "." in key else difflib.get_close_matches(key, SECTIONS, n=1, cutoff=0.6)
    near = near or likely_keys(key)[:1]
    section, known = key.split(".")[0], f"sections are {', '.join(SECTIONS)}; see elas config"
    if section in SECTIONS:
        known = f"elas config {section} lists its keys"
    return ConfigError(key, value, "unknown key", f"did you mean {near[0]}?" if near else known)


def meant_option(word: str) -> str | None:
    """A suggestion for an unknown option of a command that accepts settings; None without one.

    Args:
        word: as typed: `--lr`, `--lr=0.1` or `train.steps=5`.
    """
    name = word.partition("=")[0]
    if name.lstrip("-") in KEYS:
        return f"settings start with two dashes: --{name.lstrip('-')}"
    if name.lstrip("-") in SECTIONS:
        return f"{name.lstrip('-')} is a section: --{name.lstrip('-')}.KEY VALUE, see elas config {name.lstrip('-')}"
    near = likely_keys(name)
    return f"did you mean {' or '.join(f'--{key}' for key in near)}?" if near else None


def wrong_type(key: str, value: Any) -> ConfigError:
    """The error for a value of the wrong type or not among the choices, with the range or a suggestion."""
    kind = field_type(key)
    fix = f"give {name_of(kind)}"
    if {int, float} & set(parts_of(kind)):
        meant = _number(key, value, whole=float not in parts_of(kind)) if isinstance(value, str | float) else None
        fix = f"write {meant}" if meant is not None else f"{fix}: {range_of(kind)}"
    elif isinstance(value, str):
        near = difflib.get_close_matches(value, choices_of(kind), n=1)
        meant = f"[{near[0]}]" if near and any(typing.get_origin(part) is list for part in parts_of(kind)) else None
        fix += f"; did you mean {meant or repr(near[0])}?" if near else ""
    return ConfigError(key, value, "wrong type or choice", fix)


_SCALES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "%": 0.01}
_TIMES = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "hours": 3600, "d": 86400, "days": 86400}


def _number(key: str, value: str | float, *, whole: bool) -> str | None:
    """A value with a unit, separators or an exponent as a plain number in the key's unit; None if not a number."""
    match = re.fullmatch(r"([-+]?[\d_,]*\.?\d*(?:[eE][-+]?\d+)?)\s*([a-zA-Z%]*)", str(value).strip())
    if match is None or not re.search(r"\d", match[1]):
        return None
    unit = match[2].lower() if match[2].lower() in (*_SCALES, *_TIMES) else match[2].lower().rstrip("s")
    own = next((seconds for end, seconds in (("_seconds", 1), ("_minutes", 60)) if key.endswith(end)), None)
    factor = 1.0 if not unit else _TIMES.get(unit) if own else _SCALES.get(unit)
    if factor is None:
        return None
    number = float(re.sub("[_,]", "", match[1])) * factor / (own if own and unit else 1)
    if not whole:
        return f"{number:g}"
    return str(int(number)) if number == int(number) and abs(number) <= LARGEST else None
