"""What can be known of token files before anything starts: they exist, hold tokens, and fit the model's vocabulary.

Reads the fixed-size header of Megatron's `.idx` and the optional `PREFIX.manifest.json` that `elas prep tokenize`
writes; imports neither torch nor Megatron-core.
"""

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from elas.config import Config
from elas.errors import ConfigError

MAGIC = b"MMIDIDX\x00\x00"
TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # Megatron's dtype codes of integer tokens


@dataclass(frozen=True)
class TokenFiles:
    """A `.bin/.idx` pair: its prefix, and how many documents and tokens it holds."""

    prefix: str
    documents: int
    tokens: int


def parse_blend(key: str, value: str | list[str]) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of a data setting.

    Args:
        key: `data.train` or `data.valid`, for messages.
        value: a prefix, prefixes, or `[weight, prefix, …]`; a text may hold the same, separated by blanks.

    Returns:
        Prefixes, and their weights or None.

    Raises:
        ConfigError: no prefix, or weights that are not positive numbers.
    """
    parts = value.split() if isinstance(value, str) and not os.path.exists(f"{value}.idx") else value
    parts = [parts] if isinstance(parts, str) else list(parts)
    weights = [_weight(part) for part in parts[::2]]
    if not parts:
        raise ConfigError(key, value, "names no corpus", "give the prefix of a .bin/.idx pair")
    if all(weight is None for weight in weights):
        return parts, None
    if len(parts) % 2 or any(weight is None or weight <= 0 for weight in weights):
        raise ConfigError(key, value, "is not a blend", "write [WEIGHT, PREFIX, WEIGHT, PREFIX, …], weights above 0")
    return parts[1::2], [float(weight) for weight in weights]


def _weight(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def read_token_files(key: str, prefix: str) -> TokenFiles:
    """Read and check a `.bin/.idx` pair's header.

    Raises:
        ConfigError: a file is missing, is not Megatron's, or holds no tokens.
    """
    for end in (".idx", ".bin"):
        if not Path(prefix + end).is_file():
            raise ConfigError(
                key,
                prefix,
                f"there is no {prefix + end}",
                "give the prefix of a .bin/.idx pair, see elas prep tokenize",
            )
    with open(f"{prefix}.idx", "rb") as file:
        header = file.read(len(MAGIC) + 25)
    if len(header) < len(MAGIC) + 25 or not header.startswith(MAGIC):
        raise ConfigError(key, prefix, f"{prefix}.idx is no Megatron index", "write it with elas prep tokenize")
    _version, code, sequences, entries = struct.unpack("<QBQQ", header[len(MAGIC) :])
    if code not in TOKEN_BYTES:
        raise ConfigError(key, prefix, f"{prefix}.idx holds no integer tokens", "write it with elas prep tokenize")
    tokens = os.path.getsize(f"{prefix}.bin") // TOKEN_BYTES[code]
    if sequences == 0 or entries <= 1:
        raise ConfigError(key, prefix, "the corpus is empty", "tokenise some text into it with elas prep tokenize")
    if os.path.getsize(f"{prefix}.idx") < len(header) + 12 * sequences + 8 * entries:
        raise ConfigError(key, prefix, f"{prefix}.idx is cut short", "write it again with elas prep tokenize")
    if tokens < _indexed_tokens(prefix, len(header), sequences, TOKEN_BYTES[code]):
        raise ConfigError(key, prefix, f"{prefix}.bin is cut short", "write it again with elas prep tokenize")
    return TokenFiles(prefix, entries - 1, tokens)


def _indexed_tokens(prefix: str, header: int, sequences: int, token_bytes: int) -> int:
    """Tokens up to the end of the last sequence, from the index's lengths (int32) and byte offsets (int64)."""
    with open(f"{prefix}.idx", "rb") as file:
        file.seek(header + 4 * (sequences - 1))
        (length,) = struct.unpack("<i", file.read(4))
        file.seek(header + 4 * sequences + 8 * (sequences - 1))
        (offset,) = struct.unpack("<q", file.read(8))
    return offset // token_bytes + length


def _manifest_vocabulary(prefix: str) -> int | None:
    try:
        return json.loads(Path(f"{prefix}.manifest.json").read_text()).get("vocab_size")
    except (OSError, json.JSONDecodeError):
        return None


def check_corpus(config: Config) -> None:
    """Check every data setting against the files and the model.

    Raises:
        ConfigError: no or missing or empty files, too few tokens for one sample, or a vocabulary that does not fit.
    """
    data, model = config.data, config.model
    if data.train is None:
        raise ConfigError("data.train", None, "no corpus to train on", "give the prefix of a .bin/.idx pair")
    if data.tokenizer is not None:
        from elas.data_prep.tokenizer import load_tokenizer

        _check_vocabulary(config, load_tokenizer(data.tokenizer).vocab_size, data.tokenizer)
    for key, value in (("data.train", data.train), ("data.valid", data.valid)):
        if value is None:
            continue
        for prefix in parse_blend(key, value)[0]:
            files = read_token_files(key, prefix)
            if files.tokens <= model.seq_length:
                why = (
                    f"{files.tokens} tokens do not make one sample of model.seq_length={model.seq_length} and its label"
                )
                raise ConfigError(key, prefix, why, "use a larger corpus or shorter sequences")
            vocabulary = _manifest_vocabulary(prefix)
            if vocabulary is not None:
                _check_vocabulary(config, vocabulary, prefix)
    _check_split(config)


def _check_vocabulary(config: Config, vocabulary: int, source: str) -> None:
    if config.model.vocab_size < vocabulary:
        why = f"smaller than the {vocabulary} tokens of the tokenizer ({source})"
        raise ConfigError("model.vocab_size", config.model.vocab_size, why, f"set it to {-(-vocabulary // 128) * 128}")


def _check_split(config: Config) -> None:
    split = config.data.split
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares, default=-1) < 0 or sum(shares) <= 0:
        raise ConfigError("data.split", split, "is not a split", "write three shares, such as 99,1,0")
    wants_valid = config.data.valid is None and config.train.eval_batches > 0
    fix = "give data.valid, a larger validation share, or train.eval_batches=0"
    if wants_valid and (len(shares) < 2 or shares[1] == 0):
        raise ConfigError("data.split", split, "leaves nothing to validate on", fix)
    shares = [share / sum(shares) for share in (*shares, 0, 0)[:3]]
    for prefix in parse_blend("data.train", config.data.train)[0] if config.data.valid is None else ():
        documents = read_token_files("data.train", prefix).documents
        # Megatron cuts at rounded documents, and looks for samples in an empty part forever.
        first, second = round(shares[0] * documents), round((shares[0] + shares[1]) * documents)
        if first == 0 or (wants_valid and second <= first):
            part = "train" if first == 0 else "validate"
            raise ConfigError("data.split", split, f"leaves no document of {prefix} ({documents}) to {part} on", fix)
