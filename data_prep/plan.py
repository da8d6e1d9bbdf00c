"""The plan of a tokenisation: settings and tasks, identical on every machine and for any number of workers.

A task is a run of neighbouring pieces of the input; tokens are written in the order of task numbers. The plan is stored
in the work folder, `PREFIX.work/plan.json`: workers on any machine read it, and a later run compares it with its own to
decide whether it can resume.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from elas.data_prep.sources import Corpus, SourceFile
from elas.errors import UserError
from elas.files import write_json

FORMAT = 3
SMALLEST_TASK, LARGEST_TASK = 2_000_000, 64_000_000
TASKS = 64
"""Tasks of a medium-sized corpus; for smaller and larger ones the bounds above decide."""


@dataclass(frozen=True)
class Encoding:
    """How a document becomes ids.

    Args:
        field: key or column of the text.
        tokenizer: absolute path of the tokenizer.
        tokenizer_sha256: digest of everything in it that determines ids.
        vocab_size: number of token ids.
        dtype: `uint16` or `int32`.
        eod: id appended to every document; None for none.
        bos: id prepended to every document; None for none.
    """

    field: str
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    dtype: str
    eod: int | None
    bos: int | None = None


@dataclass(frozen=True)
class Selection:
    """Which documents are kept, and which of them are held out.

    Args:
        valid_fraction: fraction of documents to hold out, by hash of their text.
        valid_max_bytes: documents of more bytes are never held out; None for no limit.
        filters: `[name, arguments]` of datatrove filters, from `elas.data_prep.quality.parse_filter`.
        min_chars, max_chars, min_tokens, max_tokens: documents outside these bounds are left out; None for no limit.
        deduplicate: keep only the first of documents with identical text.
    """

    valid_fraction: float = 0.0
    valid_max_bytes: int | None = None
    filters: list[list] = field(default_factory=list)
    min_chars: int | None = None
    max_chars: int | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    deduplicate: bool = False


@dataclass(frozen=True)
class Settings(Selection, Encoding):
    """Everything that determines the tokens, apart from the inputs.

    Dataclasses collect fields from the last base to the first; `Plan.identity` depends on that order.
    """


@dataclass(frozen=True)
class Plan:
    """Files, how they are cut into tasks, and how they are tokenised.

    Args:
        settings: how to tokenise.
        files: inputs in order.
        tasks: the pieces of each task, `(file index, begin, end)`; see `elas.data_prep.readers`.
        outputs: absolute prefixes of the results: training and, if there are two, held-out.
        source: description of the inputs, for the manifest.
        max_skipped: maximum unreadable share of the corpus; None for the default of `unread`. Not part of the
            identity: it decides whether there is a result, not what the result is.
    """

    settings: Settings
    files: list[SourceFile]
    tasks: list[list[tuple[int, int, int]]]
    outputs: list[str]
    source: dict
    max_skipped: float | None = None

    @property
    def work(self) -> Path:
        """Folder of all temporary files."""
        return work_folder(self.outputs[0])

    @cached_property
    def identity(self) -> dict[str, str]:
        """Digests of everything that must be unchanged for finished tasks to be reused, by category."""
        settings = {k: v for k, v in asdict(self.settings).items() if not k.startswith("tokenizer")}
        files = [(f.name, f.kind, f.size, f.mtime_ns, f.field) for f in self.files]
        parts = {"settings": settings, "files": files, "tasks": self.tasks, "format": FORMAT}
        parts["tokenizer"] = self.settings.tokenizer_sha256
        parts["held-out part"] = len(self.outputs)
        return {key: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16] for key, value in parts.items()}

    def save(self) -> None:
        """Write `plan.json` to the work folder."""
        facts = asdict(self) | {"identity": self.identity}
        write_json(self.work / "plan.json", facts)


def work_folder(prefix: str | Path) -> Path:
    """The work folder of an output prefix."""
    return Path(f"{prefix}.work")


def make_plan(
    corpus: Corpus, settings: Settings, outputs: list[Path], task_bytes: int | None, max_skipped: float | None = None
) -> Plan:
    """Cut a corpus into tasks.

    Args:
        corpus: the inputs.
        settings: how to tokenise.
        outputs: prefixes of the results.
        task_bytes: bytes per task on disk; None for 1/64 of the corpus, between 2 MB and 64 MB.
        max_skipped: see `Plan`.
    """
    total = sum(file.size for file in corpus.files)
    size = task_bytes or min(LARGEST_TASK, max(SMALLEST_TASK, -(-total // TASKS)))
    tasks = [[(index, *piece) for index, piece in group] for group in _grouped(corpus.pieces(size), size)]
    return Plan(settings, corpus.files, tasks, [str(p.absolute()) for p in outputs], corpus.describe(), max_skipped)


def _grouped(pieces: Iterator[tuple[int, tuple[int, int], int]], size: int) -> Iterator[list]:
    group, group_bytes = [], 0
    for index, piece, piece_bytes in pieces:
        if group and group_bytes + piece_bytes > size:
            yield group
            group, group_bytes = [], 0
        group.append((index, piece))
        group_bytes += piece_bytes
    if group:
        yield group


def load_plan(work: str | Path) -> Plan:
    """The plan in a work folder; read once per process.

    Raises:
        UserError: the plan is missing or damaged.
    """
    path = Path(work) / "plan.json"
    try:
        return _read_plan(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; start the work with elas prep tokenize") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove the folder and start over") from error


@lru_cache(maxsize=1)
def _read_plan(path: Path, _changed: int) -> Plan:
    facts = json.loads(path.read_text(encoding="utf-8"))
    tasks = [[tuple(piece) for piece in task] for task in facts["tasks"]]
    files = [SourceFile(**file) for file in facts["files"]]
    return Plan(Settings(**facts["settings"]), files, tasks, facts["outputs"], facts["source"], facts["max_skipped"])


def saved_identity(work: Path) -> dict[str, str] | None:
    """`Plan.identity` of the work started in a folder; None if there is none."""
    try:
        return json.loads((work / "plan.json").read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError):
        return None
