"""The files of a run that starts from foreign weights: its checkpoint at step 0, and its tokenizer."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from elas.checkpoint import storage
from elas.checkpoint.crossing import OnDemand
from elas.checkpoint.folder import file_facts, put_in_place
from elas.checkpoint.identity import of_model, versions
from elas.config import Config
from elas.data.tokenizer.huggingface import SOURCE_NAME
from elas.errors import UserError
from elas.export.safetensors_folder import SafetensorsFolder
from elas.hf.weights import hf_shapes, join
from elas.plan.shapes import Shape, weight_shapes

_TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", SOURCE_NAME,
)  # fmt: skip
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_LAYOUT = {
    "world_size": 1, "tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "sequence": False, "data": 1, "zero": 0,
    "written_by": "transformers",  # so that it is no layout of ours, whose random streams would be there
}  # fmt: skip


def check_tensors(files: SafetensorsFolder, config: Config) -> None:
    """Raise `UserError` unless a folder has exactly the tensors that its configuration says."""
    expected = hf_shapes(config)
    for name, shape in expected.items():
        if name not in files.shapes:
            raise UserError(f"{files.folder}: has no {name}, which config.json asks for; copy it again from its source")
        if files.shapes[name] != shape:
            what = f"{name} is {list(files.shapes[name])}, and {list(shape)} by config.json"
            raise UserError(f"{files.folder}: {what}; give a folder whose files belong together")
    more = [name for name in files.shapes if name not in expected and not name.endswith("rotary_emb.inv_freq")]
    if more == [_HEAD] and config.model.tie_embeddings:
        if not torch.equal(files.read(_HEAD), files.read(_EMBEDDING)):
            why = "config.json says tie_word_embeddings, but lm_head.weight is not the embedding"
            raise UserError(f"{files.folder}: {why}; set tie_word_embeddings to false there")
    elif more:
        raise UserError(f"{files.folder}: has {more[0]}, which our model does not have; give a model without it")


def write_start(folder: Path, config: Config, read: Callable[[str], torch.Tensor], source: Path) -> None:
    """Write `step_00000000`, with one tensor of ours in memory at a time.

    Args:
        folder: of the run's checkpoints; created.
        config: the run's.
        read: gives a tensor, fp32, by transformers' name.
        source: where they come from, for the manifest.

    Raises:
        UserError: as `read`.
        OSError: the folder cannot be written.
    """
    partial = folder / "step_00000000.partial"
    partial.mkdir(parents=True)
    shapes = weight_shapes(config)
    storage.write_alone(partial, {f"weight.{name}": _tensor(name, shapes[name], config, read) for name in shapes})
    manifest = {
        "step": 0,
        "tokens": 0,
        "consumed_samples": 0,
        "optimizer_step": 0,
        "identity": of_model(config),
        "layout": _LAYOUT,
        "versions": versions(),
        "config": config.to_dict(),
        "imported_from": str(source.resolve()),
        "weights_only": True,
        "files": {path.name: file_facts(path) for path in sorted(partial.iterdir())},
    }
    put_in_place(partial, folder / "step_00000000", manifest)


def _tensor(name: str, shape: Shape, config: Config, read: Callable[[str], torch.Tensor]) -> OnDemand:
    def make() -> torch.Tensor:
        return join(name, read, config).contiguous()

    return OnDemand(shape, torch.float32, {(0,) * len(shape): (shape, make)})


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a folder's tokenizer; `target` is created. Raises `OSError` if it cannot be written."""
    target.mkdir()
    for name in _TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
