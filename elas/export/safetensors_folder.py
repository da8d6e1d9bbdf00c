"""Reads the safetensors of a Hugging Face folder one by one; runs no code from it."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from elas.errors import UserError
from elas.export.folder import INDEX
from elas.plan.shapes import Shape

_ONE = "model.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")
_PICKLES = ("*.bin", "*.pt", "*.pth")


class SafetensorsFolder:
    """The tensors of a model, in one file or in shards with an index.

    Args:
        folder: of the model.

    Attributes:
        folder: of the model.
        shapes: of every tensor, by name, from the files' own headers.
        bytes: of the files.

    Raises:
        UserError: no safetensors there, a file is missing or damaged, or weights are quantised.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, Shape] = {}
        self._files: dict[str, Path] = {}
        self._open: tuple[Path, safe_open] | None = None
        files = self._listed()
        for path in files:
            self._read_header(path)
        self.bytes = sum(path.stat().st_size for path in files)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, fp32.

        Raises:
            UserError: it cannot be read, or has values that are not finite.
        """
        path = self._files[name]
        try:
            if self._open is None or self._open[0] != path:
                self._open = path, safe_open(path, "pt")  # one file stays open: tensors of a layer are mostly in one
            tensor = self._open[1].get_tensor(name).float()
        except (OSError, SafetensorError, RuntimeError) as error:
            raise _damaged(path, error) from error
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} has values that are not finite; give another model")
        return tensor

    def _listed(self) -> list[Path]:
        """The files of weights."""
        index = self.folder / INDEX
        if index.is_file():
            try:
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(f"{index}: is no index of weights ({error}); copy it again from its source") from error
            files = [self.folder / str(name) for name in sorted(names)]
        else:
            files = [self.folder / _ONE]
        for path in files:
            if not path.is_file():
                raise UserError(self._missing(path))
        return files

    def _missing(self, path: Path) -> str:
        if path.name != _ONE:
            return f"{path}: is missing, but {INDEX} names it; copy it again from its source"
        if any(found for pattern in _PICKLES for found in self.folder.glob(pattern)):
            save = f"AutoModelForCausalLM.from_pretrained({str(self.folder)!r}).save_pretrained(FOLDER)"
            why = "its weights are pickles, which can run code when they are read"
            return f"{self.folder}: {why}; if you trust it, convert it by transformers: {save}"
        return f"{self.folder}: holds no safetensors; give a folder with model.safetensors, or shards and {INDEX}"

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  no mapping
                    part = file.get_slice(name)
                    if part.get_dtype() not in _FLOATS and not name.endswith("inv_freq"):
                        why = f"{name} is {part.get_dtype()}, and quantised weights cannot be trained"
                        raise UserError(f"{path}: {why}; give the model in {', '.join(_FLOATS)}")
                    self.shapes[name] = tuple(part.get_shape())
                    self._files[name] = path
        except (OSError, SafetensorError, RuntimeError) as error:
            raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read as safetensors ({error}); copy it again from its source")
