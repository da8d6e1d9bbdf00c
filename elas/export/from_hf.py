"""A Hugging Face folder as a run that has not trained yet.

RUN/checkpoints/step_00000000   the weights; moments are zero, no sample is consumed
RUN/config.yaml, config.json    the settings: of the model, and of a run in this folder
RUN/tokenizer                   the folder's, if it has one
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elas.checkpoint.identity import of_model, typed
from elas.config import Config, flatten, from_flat, laid_over, read_yaml
from elas.config.rules import validate
from elas.config.writing import to_yaml
from elas.console import Console, Heartbeat
from elas.data.corpus import open_tokenizer
from elas.errors import ConfigError, UserError
from elas.export.factored import EnergyTable, Factored
from elas.export.safetensors_folder import SafetensorsFolder
from elas.export.settings import choose_low_rank, read_settings
from elas.export.start import check_tensors, copy_tokenizer, has_tokenizer, write_start
from elas.files import new_folder
from elas.plan.counts import parameter_count

LONGEST = 2048
"""Tokens of a sample unless given; fewer where the model's longest sequence is shorter."""
_HERE = ("train.run_dir", "checkpoint.resume", "checkpoint.init_from")
"""Settings of where a run is, which the import makes."""


@dataclass(frozen=True)
class Request:
    """What the user asked for; see `elas import hf --help`.

    Args:
        source: Hugging Face folder.
        out: the run's folder, which must not exist.
        rank: of the factors; None for the folder's own.
        low_rank: `none` or `lowrank`; None for the folder's own kind, or `lowrank` if there is a rank.
        config: YAML file or preset with further settings.
        overrides: settings by dotted key, which take precedence over it.
    """

    source: Path
    out: Path
    rank: int | None = None
    low_rank: str | None = None
    config: str | None = None
    overrides: dict[str, Any] | None = None

    @property
    def home(self) -> Path:
        """The run's folder from the root, so that its settings hold wherever they are read."""
        return self.out.absolute()


def import_hf(request: Request, console: Console) -> dict:
    """Write a run's folder from a Hugging Face folder.

    Returns:
        Facts: `checkpoint`, `config`, `tokenizer`, `parameters`; `energy_kept` by linear, and its mean
        `mean_energy_kept`, 1 where nothing was factored.

    Raises:
        UserError: a folder without a model that ours computes, a rank that does not fit it, a target that exists.
        Failure: the disk is full.
    """
    source, out = request.source, request.out
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out}: exists; give a folder that does not")
    settings = read_settings(source)
    written_as, config = from_flat(settings), _config(request, settings)
    files = SafetensorsFolder(source)
    check_tensors(files, written_as)
    copies = _copies_tokenizer(config, request)
    parameters = parameter_count(config)
    console.say(f"{source}: {files.bytes / 1e9:,.2f} GB, for {parameters / 1e6:,.1f} M parameters")
    table = EnergyTable(console)
    with new_folder(out) as folder, Heartbeat(f"importing {source}"):
        weights = Factored(files, _rank_to_make(written_as, config), table.add)
        write_start(folder / "checkpoints", config, weights.read, source)
        if copies:
            copy_tokenizer(source, folder / "tokenizer")
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    return {
        "checkpoint": str(out / "checkpoints" / "step_00000000"),
        "config": str(out / "config.yaml"),
        "tokenizer": config.data.tokenizer,
        "parameters": parameters,
        "energy_kept": table.kept,
        "mean_energy_kept": table.mean,
    }


def _config(request: Request, source: dict[str, Any]) -> Config:
    """The run's settings: the folder's for the model, and what was given for the rest.

    Raises:
        ConfigError: what was given is of another model, or does not fit it.
    """
    overrides = flatten(request.overrides or {})
    for key in _HERE:
        if key in overrides:
            raise ConfigError(key, overrides[key], "is made by the import", "leave it out")
    for key, option, value in (("rank", "--rank", request.rank), ("kind", "--low-rank", request.low_rank)):
        if value is not None and f"low_rank.{key}" in overrides:
            raise ConfigError(f"low_rank.{key}", overrides[f"low_rank.{key}"], f"{option} sets it", "leave one out")
    given = laid_over(read_yaml(request.config) if request.config else {}, overrides)
    given = {key: value for key, value in given.items() if key not in _HERE}
    own = {
        **source,
        "model.seq_length": min(LONGEST, source["model.max_position_embeddings"]),
        "data.tokenizer": str(request.home / "tokenizer") if has_tokenizer(request.source) else None,
        "train.run_dir": str(request.home),
    }
    low_rank = choose_low_rank(request.source, request.low_rank, request.rank, given, source)
    config = from_flat({**own, **given, **low_rank})
    for key, value in of_model(from_flat({**own, **low_rank})).items():
        if of_model(config)[key] != value:
            why = f"{request.source} has {value!r}"
            raise ConfigError(key, typed(config, key), why, "leave it out, or give settings of that model")
    validate(config, None)
    return config


def _rank_to_make(written_as: Config, config: Config) -> int | None:
    """Rank to factor weights at; None where they are taken as they are, or multiplied out."""
    there, here = written_as.low_rank, config.low_rank
    if here.kind == "none" or (there.kind, there.rank) == (here.kind, here.rank):
        return None
    return here.rank


def _copies_tokenizer(config: Config, request: Request) -> bool:
    """Whether the folder's tokenizer is to be the run's; raises `ConfigError` for one that does not fit the model."""
    path = config.data.tokenizer
    if path is None:
        return False
    copies = has_tokenizer(request.source) and path == str(request.home / "tokenizer")
    path = str(request.source) if copies else path
    size = open_tokenizer("data.tokenizer", path).vocab_size
    if size > config.model.vocab_size:
        why = f"has {size:,} tokens, and the model an embedding of {config.model.vocab_size:,}"
        raise ConfigError("data.tokenizer", path, why, "give --data.tokenizer PATH, or null for none")
    return copies
