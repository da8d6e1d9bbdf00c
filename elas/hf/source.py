"""Where a model comes from: a run's folder, a checkpoint, or a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from elas.checkpoint.choose import find, is_other_model
from elas.checkpoint.folder import Checkpoint, require_intact
from elas.checkpoint.identity import written_config
from elas.config import Config
from elas.data.tokenizer import Tokenizer, load_tokenizer
from elas.data.tokenizer.found import tokenizer_of
from elas.errors import UserError
from elas.hf.build import model_of, open_folder
from elas.hf.model_type import model_type


@dataclass(frozen=True)
class Source:
    """A model that can be opened.

    Attributes:
        path: of the checkpoint or the folder.
        checkpoint: None for a Hugging Face folder.
    """

    path: Path
    checkpoint: Checkpoint | None

    @property
    def passed_over(self) -> tuple[str, ...]:
        """A line for each newer checkpoint of the run that is not intact."""
        return () if self.checkpoint is None else self.checkpoint.passed_over

    @property
    def config(self) -> Config | None:
        """The run's; None for a Hugging Face folder."""
        return None if self.checkpoint is None else written_config(self.checkpoint)

    def of_run(self) -> tuple[Checkpoint, Config]:
        """The checkpoint and its run's configuration; not of a Hugging Face folder, which has neither."""
        assert self.checkpoint is not None
        return self.checkpoint, written_config(self.checkpoint)

    @property
    def is_custom(self) -> bool:
        """Whether it is an ELAS model, rather than a stock architecture."""
        return self.checkpoint is not None or model_type(self.path) == "elas"

    def model(self, dtype: torch.dtype | None = None, device: str = "cpu") -> PreTrainedModel:
        """The model, in evaluation mode.

        Args:
            dtype: of its weights; None for that of training, or of the folder.
            device: where they go.

        Raises:
            UserError: a damaged file, or a folder that cannot be read.
        """
        if self.checkpoint is None:
            return open_folder(self.path, dtype or "auto", device)
        require_intact(self.checkpoint)
        return model_of(self.checkpoint, dtype, device)

    def tokenizer(self, given: str | None = None) -> Tokenizer:
        """The tokenizer: the one given, the run's, or the one in the folder.

        Raises:
            UserError: there is none, or it is another than the model's.
        """
        if self.checkpoint is not None:
            return load_tokenizer(tokenizer_of(written_config(self.checkpoint), given))
        return load_tokenizer(given or self.path)


def source_of(path: Path) -> Source:
    """What is at a path: a run's folder (its newest complete checkpoint), a checkpoint, or a Hugging Face folder.

    Raises:
        UserError: none of these.
    """
    if is_other_model(path):
        if (path / "config.json").is_file():
            model_type(path)
            return Source(path, None)
        raise UserError(f"{path}: holds weights but no config.json; give the whole folder of a Hugging Face model")
    found = find(path)
    return Source(found.path, found)
