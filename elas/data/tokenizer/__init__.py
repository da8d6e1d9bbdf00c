"""SentencePiece models and Hugging Face tokenizer folders behind one interface.

Both have the attributes that Megatron-core's `GPTDatasetConfig(tokenizer=…)` reads (`eod`, `pad`, `vocab_size`,
`unique_identifiers`) without deriving from its classes, whose import takes seconds in every worker process.
"""

from pathlib import Path

from elas.data.tokenizer.huggingface import HFTokenizer
from elas.data.tokenizer.sentencepiece_model import SentencePieceTokenizer
from elas.data.tokenizer.special_tokens import named_tokens
from elas.errors import UserError

__all__ = ["MODEL_NAME", "HFTokenizer", "SentencePieceTokenizer", "Tokenizer", "load_tokenizer"]

MODEL_NAME = "tokenizer.model"
Tokenizer = SentencePieceTokenizer | HFTokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer.

    Args:
        path: a SentencePiece `.model` file, a folder with `tokenizer.model`, or a Hugging Face tokenizer folder (or its
            `tokenizer.json`). A folder with a `tokenizer.json` is opened with Hugging Face's library. With only a
            `tokenizer.model`, `tokenizer_config.json` and `special_tokens_map.json` still name the special tokens.

    Raises:
        UserError: no readable tokenizer.
    """
    path = Path(path)
    if path.name == "tokenizer.json" and path.is_file():
        return HFTokenizer(path.parent)
    if path.is_file():
        return SentencePieceTokenizer(path)
    if (path / "tokenizer.json").is_file():
        return HFTokenizer(path)
    if (path / MODEL_NAME).is_file():
        tokenizer = SentencePieceTokenizer(path / MODEL_NAME, named_tokens(path))
        # SentencePiece would not find added tokens that may occur in text; AutoTokenizer does.
        return HFTokenizer(path) if tokenizer.has_ordinary_added_tokens else tokenizer
    if (path / "tokenizer_config.json").is_file():
        return HFTokenizer(path)
    raise UserError(f"tokenizer {path}: no {MODEL_NAME} or tokenizer.json there; train one with elas prep tokenizer")
