"""The tokenizer of an exported folder; see `elas.hf.tokenizer`."""

from elas.hf.tokenizer import write_tokenizer

__all__ = ["write_tokenizer"]
