"""ELAS: pre-training of low-rank transformers with 2:4 activation sparsity (arXiv 2605.03667).

The library is imported part by part (`elas.config`, `elas.model`, `elas.train` …); importing `elas` itself is cheap
and pulls in neither torch nor Megatron-core. docs/api.md is a tour of the public names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing them takes seconds
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from elas.data.tokenizer import Tokenizer

__all__ = ["__version__", "load", "load_tokenizer", "prepare"]
__version__ = "0.1.0"


def prepare() -> bool:
    """Make this process ready to train: our extensions folder, quiet imports, and shims where there is no CUDA.

    Nothing else changes the process: importing any part of the library leaves it as it is. Every `elas` command and
    `elas.parallel.initialize` call this; a script of your own on a machine without CUDA calls it first.

    Returns:
        True if shims for want of CUDA are in place; see `elas.accelerator`.
    """
    from elas import accelerator

    return accelerator.prepare()


def load(path: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> PreTrainedModel:
    """The model at a path, as transformers' class, in evaluation mode: call it, or its `generate`.

    Needs no process group, Megatron-core or DeepSpeed. Newer checkpoints of a run that are skipped since they are not
    intact are named in a warning.

    Args:
        path: a run's folder (its newest intact checkpoint), a checkpoint of any layout, or a Hugging Face folder.
        dtype: of the weights; None for that of training, or of the folder.
        device: where they go.

    Raises:
        UserError: there is no model, or a file of it is damaged; one line with path, reason and fix.
    """
    import warnings
    from pathlib import Path

    from elas.hf.source import source_of

    source = source_of(Path(path))
    for line in source.passed_over:
        warnings.warn(f"skipped {line}", stacklevel=2)
    return source.model(dtype, device)


def load_tokenizer(path: str | Path, tokenizer: str | None = None) -> Tokenizer:
    """The tokenizer of the model at a path: `encode(text)` gives ids, `decode(ids)` text, `eod` ends a document.

    Args:
        path: as of `load`.
        tokenizer: one to use instead, where the run's has moved; it must be the one that its corpora were made with.

    Raises:
        UserError: there is none, or it is another than the model's.
    """
    from pathlib import Path

    from elas.hf.source import source_of

    return source_of(Path(path)).tokenizer(tokenizer)
