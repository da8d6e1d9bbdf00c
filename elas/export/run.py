"""Runs an export: checks, writing, and the comparison of the two models."""

import copy
import dataclasses
import time
from pathlib import Path

import torch

from elas.checkpoint.choose import find
from elas.checkpoint.folder import Checkpoint, require_intact
from elas.config import Config
from elas.console import Console, Heartbeat
from elas.data.tokenizer.found import document_ids, tokenizer_of
from elas.errors import ConfigError, UserError
from elas.export.card import model_card
from elas.export.hf import Export
from elas.files import new_folder
from elas.hf.tokenizer import write_tokenizer

STRETCHES, TOKENS = 8, 256
NO_TOKENIZER = "none"


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for; see `elas export hf --help`."""

    checkpoint: Path
    out: Path
    form: str = "elas"
    dtype: str | None = None
    tokenizer: str | None = None
    data: str | None = None
    shard_gb: float = 5.0
    compare: bool = True


def export_hf(request: Request, console: Console) -> dict:
    """Write a checkpoint as a Hugging Face folder.

    Returns:
        Facts: `checkpoint`, `step`, `form`, `dtype`, `parameters`, `bytes`, `folder`, and by the comparison
        `max_logit_diff`, `ppl_ours`, `ppl_exported`, `compared_tokens`.

    Raises:
        UserError: no intact checkpoint, no such tokenizer, a target that exists, a form that the model does not have.
        Failure: the disk is full.
    """
    if not 0 < request.shard_gb < float("inf"):
        raise UserError(f"--shard-gb {request.shard_gb}: must be above 0")
    if request.data is not None and not request.compare:
        raise UserError(f"--data {request.data}: not with --no-compare, which compares nothing; leave one of them out")
    found = find(request.checkpoint)
    for line in found.passed_over:
        console.say(f"skipped {line}")
    with Heartbeat(f"checking {found.path}"):
        require_intact(found)
    export = _export(found, request)
    config, start = export.config, time.monotonic()
    with new_folder(request.out) as folder:
        console.say(f"writing {request.out} from {found.path} (step {found.step:,})")
        with Heartbeat(f"writing {request.out}"):
            export.write(folder, _tokenizer(config, request, folder, console))
        facts = _facts(export, request, folder)
        if request.compare:
            with Heartbeat("comparing the two models"):
                facts |= _compare(export, request, folder, console)
        name = request.out.name
        card = model_card(name, request.form, found, config, export.parameters, _scores(found, facts))
        (folder / "README.md").write_text(card, encoding="utf-8")
    return facts | {"seconds": round(time.monotonic() - start, 1)}


def _export(found: Checkpoint, request: Request) -> Export:
    from elas.checkpoint.identity import written_config

    dtype = getattr(torch, request.dtype or written_config(found).train.dtype)
    return Export(found, request.form, dtype, int(request.shard_gb * 1e9))


def _tokenizer(config: Config, request: Request, folder: Path, console: Console) -> dict[str, int | None]:
    """Write the tokenizer; returns the ids of its special tokens."""
    bos, eod = document_ids(config)
    if request.tokenizer == NO_TOKENIZER:
        console.say("without a tokenizer, as asked: AutoTokenizer finds none in the folder")
        return {"bos_token_id": bos, "eos_token_id": eod, "pad_token_id": None}
    longest = config.model.max_position_embeddings or config.model.seq_length
    written = write_tokenizer(_tokenizer_path(config, request), folder, longest, eod)
    if written["ties"]:
        console.say(
            f"tokenizer: {written['ties']} of {written['texts']} texts have other ids in the folder, of equal score"
        )
    return {f"{role}_token_id": written[f"{role}_token_id"] for role in ("bos", "eos", "pad")}


def _tokenizer_path(config: Config, request: Request) -> Path:
    try:
        return tokenizer_of(config, request.tokenizer)
    except ConfigError as error:
        if request.tokenizer is None and error.key == "--tokenizer":
            raise UserError(f"{error}, or --tokenizer {NO_TOKENIZER} to export without one") from error
        raise


def _facts(export: Export, request: Request, folder: Path) -> dict:
    return {
        "folder": str(request.out),
        "checkpoint": str(export.checkpoint.path),
        "step": export.checkpoint.step,
        "form": request.form,
        "dtype": str(export.dtype).removeprefix("torch."),
        "parameters": export.parameters,
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
    }


def _compare(export: Export, request: Request, folder: Path, console: Console) -> dict:
    import elas

    elas.prepare()
    from elas.export.check import compare

    config = copy.deepcopy(export.config)
    tokens = _tokens(config, request, console)
    found = compare(export.checkpoint, config, folder, tokens, export.dtype if export.form == "elas" else None)
    if export.drops_sparsity:
        change = found.ppl_exported / found.ppl_ours - 1
        console.say(
            f"without 2:4 the perplexity is {found.ppl_exported:.4g}, with it {found.ppl_ours:.4g} ({change:+.2%})"
        )
    return {
        "max_logit_diff": found.max_logit_diff,
        "ppl_ours": found.ppl_ours,
        "ppl_exported": found.ppl_exported,
        "compared_tokens": found.tokens,
    }


def _tokens(config: Config, request: Request, console: Console) -> torch.Tensor:
    """Tokens to compare on: of the corpus given, or of the run's; random ones if there is none."""
    from elas.data.corpus import parse_blend
    from elas.data.token_files import read_token_files
    from elas.export.check import sample_tokens

    length = min(TOKENS, config.model.seq_length)
    if request.data is not None:
        return sample_tokens(read_token_files("--data", request.data), STRETCHES, length)
    key = "data.train" if config.data.valid is None else "data.valid"
    given = config.data.train if config.data.valid is None else config.data.valid
    try:
        prefixes, _ = parse_blend(key, given) if given else ([], None)
        return sample_tokens(read_token_files(key, prefixes[0]), STRETCHES, length)
    except (UserError, IndexError):
        console.say(f"{key}={given!r} cannot be read: comparing on random tokens; give --data PREFIX for others")
        generator = torch.Generator().manual_seed(0)
        return torch.randint(config.model.vocab_size, (STRETCHES, length + 1), generator=generator)


def _scores(found: Checkpoint, facts: dict) -> dict[str, str]:
    scores = {}
    if "ppl_ours" in facts:
        scores["perplexity as trained"] = f"{facts['ppl_ours']:.4f}"
        scores["perplexity of this folder"] = f"{facts['ppl_exported']:.4f}"
        scores["predicted tokens"] = f"{facts['compared_tokens']:,}"
        scores["largest difference of a logit"] = f"{facts['max_logit_diff']:.2e}"
    return scores
