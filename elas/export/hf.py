"""A checkpoint as a Hugging Face folder."""

import inspect
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig

from elas.checkpoint.folder import Checkpoint
from elas.checkpoint.identity import written_config
from elas.config import Config
from elas.export.dense import check_can_be_dense, dense_config, dense_shapes, multiply_out
from elas.export.folder import write_tensors
from elas.hf import configuration_elas, modeling_elas
from elas.hf.build import hf_config, hf_tensors, sparse_at
from elas.hf.weights import hf_shapes
from elas.plan.shapes import Shape

CODE = (configuration_elas, modeling_elas)
AUTO_MAP = {
    "AutoConfig": "configuration_elas.ElasConfig",
    "AutoModel": "modeling_elas.ElasModel",
    "AutoModelForCausalLM": "modeling_elas.ElasForCausalLM",
}


@dataclass(frozen=True)
class Export:
    """What is to be written.

    Args:
        checkpoint: intact, of any layout.
        form: `elas` or `dense`.
        dtype: of the weights.
        shard_bytes: largest size of a file of weights.

    Raises:
        UserError: `dense`, of a model that has no dense form.
    """

    checkpoint: Checkpoint
    form: str
    dtype: torch.dtype
    shard_bytes: int

    def __post_init__(self):
        if self.form == "dense":
            check_can_be_dense(self._elas_config())

    @property
    def config(self) -> Config:
        """Of the run."""
        return written_config(self.checkpoint)

    @property
    def drops_sparsity(self) -> bool:
        """Whether the model is 2:4 sparse and its folder would not be."""
        return self.form == "dense" and sparse_at(self.config, self.checkpoint.step)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of the folder's tensors, by name."""
        shapes = hf_shapes(self.config)
        return dense_shapes(shapes) if self.form == "dense" else shapes

    @property
    def parameters(self) -> int:
        """In the folder."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def write(self, folder: Path, tokens: dict[str, int | None]) -> None:
        """Write weights, configurations and code; reads the checkpoint in place, a file of weights in memory.

        Args:
            folder: exists.
            tokens: `bos_token_id`, `eos_token_id` and `pad_token_id`.
        """
        made = self.hf_config(tokens)
        write_tensors(folder, self._tensors(), self.shapes, self.dtype, self.shard_bytes)
        made.save_pretrained(folder)
        if self.form == "elas":
            _add_auto_map(folder / "config.json")
            for module in CODE:
                file = Path(inspect.getfile(module))
                shutil.copyfile(file, folder / file.name)
        GenerationConfig(**{name: value for name, value in tokens.items() if value is not None}).save_pretrained(folder)

    def hf_config(self, tokens: dict[str, int | None]) -> PreTrainedConfig:
        """Configuration of the folder's model."""
        made = self._elas_config()
        for name, value in tokens.items():
            setattr(made, name, value)
        return dense_config(made) if self.form == "dense" else made

    def _elas_config(self) -> configuration_elas.ElasConfig:
        return hf_config(self.config, self.checkpoint.step, self.dtype)

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self.form == "elas":
            return hf_tensors(self.checkpoint, self.config, self.dtype)
        return multiply_out(hf_tensors(self.checkpoint, self.config, torch.float32), self.dtype)


def _add_auto_map(path: Path) -> None:
    """Say which classes of the folder's code to use; transformers writes it only for classes it loaded from there."""
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"auto_map": AUTO_MAP}, indent=2) + "\n")
