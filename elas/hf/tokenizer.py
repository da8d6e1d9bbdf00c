"""Writes a tokenizer into an exported folder, for `transformers.AutoTokenizer`, and compares the ids.

The folder gets a complete `tokenizer.json` and a generic tokenizer class, so that no class of transformers rebuilds
parts of it by rules of its own; neither sentencepiece nor remote code is required to open it. A text's ids are those of
our tokenizer, without beginning or end ids, with these exceptions:

- A text that spells a special token (`</s>`) yields that token's id, as with every Hugging Face tokenizer. Prompts rely
  on it; `split_special_tokens=True` encodes it as ordinary text, as `elas prep` does.
- SentencePiece's unigram models add scores in single precision, `tokenizers` in double. Where cuts of a text have equal
  scores (runs of one character), the two may choose different ones: in 4 of 100,000 tokens of Python source. The
  comparison counts them (`ties`).
"""

import json
import shutil
from pathlib import Path

from elas.data.tokenizer import MODEL_NAME, HFTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from elas.data.tokenizer.huggingface import SOURCE_NAME, auto_tokenizer
from elas.errors import UserError
from elas.files import write_json
from elas.hf.tokenizer_check import compare

CLASS = "PreTrainedTokenizerFast"  # transformers 4 and 5 read it from tokenizer.json alone
_ROLES = ("bos", "eos", "pad")


def write_tokenizer(path: Path, folder: Path, model_max_length: int, eod: int | None = None) -> dict:
    """Write the files with which `AutoTokenizer.from_pretrained(folder)` yields the ids of the tokenizer at `path`.

    Args:
        path: for `load_tokenizer`.
        folder: exists; files of a tokenizer in it are replaced.
        model_max_length: longest text in tokens, the model's context.
        eod: the id that ends documents, if the corpora were made with another than the tokenizer's own.

    Returns:
        `vocab_size`, `bos_token_id`, `eos_token_id`, `pad_token_id` (None without one), `sha256` (of the source),
        `files` (names), `texts` that were compared and `ties` (texts whose ids differ by equal scores only).

    Raises:
        UserError: no tokenizer there, one that has no `tokenizer.json` form, or one whose ids differ.
    """
    ours = load_tokenizer(path)
    roles = {role: _id(ours, role) for role in _ROLES}
    if eod is not None:
        roles["eos"] = eod
        roles["pad"] = None if roles["pad"] == eod else roles["pad"]
    # An ordinary piece that ends documents, such as a newline, stays ordinary: decoding would leave it out.
    named = {role: i for role, i in roles.items() if i is not None and i in ours.special_ids}
    names = {f"{role}_token": ours.token_of(i) for role, i in named.items()}
    if ours.unk is not None and ours.unk >= 0:
        names["unk_token"] = ours.token_of(ours.unk)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    if isinstance(ours, SentencePieceTokenizer):
        _write_sentencepiece(ours, folder)
    else:
        _write_huggingface(ours, folder)
    _write_config(folder, names, model_max_length)
    theirs = HFTokenizer(folder)
    compared = compare(ours, theirs, folder)
    write_json(folder / SOURCE_NAME, {"sha256": theirs.sha256, "source_sha256": ours.sha256})
    written = sorted(f.name for f in folder.iterdir() if before.get(f.name) != f.stat().st_mtime_ns)
    ids = {f"{role}_token_id": i for role, i in roles.items()}
    return {"vocab_size": ours.vocab_size, **ids, "sha256": ours.sha256, "files": written, **compared}


def _id(tokenizer: Tokenizer, role: str) -> int | None:
    """Id of a role; None without one."""
    try:
        return getattr(tokenizer, role)
    except (NotImplementedError, UserError):
        return None


def _write_sentencepiece(ours: SentencePieceTokenizer, folder: Path) -> None:
    from elas.hf.sentencepiece_json import to_backend

    unknown = set() if ours.unk is None else {ours.unk}
    to_backend(ours.model, ours.added, ours.special_ids | unknown).save(str(folder / "tokenizer.json"))
    # For readers of SentencePiece files, such as llama.cpp's converter; transformers prefers tokenizer.json.
    shutil.copyfile(ours.path, folder / MODEL_NAME)


def _write_huggingface(ours: HFTokenizer, folder: Path) -> None:
    """Save with the library, without the ids that a post-processor adds to every text."""
    hf = auto_tokenizer(ours.path)
    backend = getattr(hf, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        why = f"{type(hf).__name__} is Python code and has no tokenizer.json"
        raise UserError(f"tokenizer {ours.path}: {why}; convert it with a class of transformers that is fast")
    hf.save_pretrained(folder)
    file = folder / "tokenizer.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    facts |= {"post_processor": _without_ids(facts.get("post_processor")), "truncation": None, "padding": None}
    file.write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


def _without_ids(processor: dict | None) -> dict | None:
    """The parts of a post-processor that add no ids."""
    if processor is None:
        return None
    if processor["type"] == "Sequence":
        parts = [part for p in processor["processors"] if (part := _without_ids(p)) is not None]
        return {"type": "Sequence", "processors": parts} if parts else None
    return processor if processor["type"] == "ByteLevel" else None


def _write_config(folder: Path, names: dict[str, str], model_max_length: int) -> None:
    """`tokenizer_config.json`: what the source has there, and the settings that the ids and the model require."""
    file = folder / "tokenizer_config.json"
    facts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for key in ("auto_map", "backend", "is_local", "tokenizer_file", "pad_token"):
        facts.pop(key, None)
    facts |= {
        "tokenizer_class": CLASS,
        "model_max_length": model_max_length,
        "model_input_names": ["input_ids", "attention_mask"],  # not token_type_ids, which a decoder does not take
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        **names,
    }
    write_json(file, facts)
