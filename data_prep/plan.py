"""What a tokenisation is to do, cut into tasks: the same on every machine and for any number of workers.

A task is a run of neighbouring pieces of the input; its number says where its tokens belong. The plan lies in the work
folder, `PREFIX.work/plan.json`, where workers on any machine read it, and where a later start finds out whether it is
still the same work.
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
"""How many tasks a corpus of middling size is cut into; smaller and larger ones keep to the bounds above."""


@dataclass(frozen=True)
class Settings:
    """What decides which tokens come out; all of it is part of the plan.

    Args:
        field: key or column of the text.
        tokenizer: path of the tokenizer, absolute.
        tokenizer_sha256: of all of it that decides ids.
        vocab_size: number of token ids.
        dtype: `uint16` or `int32`.
        eod: id that ends every document, None for none.
        bos: id that begins every document, None for none.
        valid_fraction: fraction of documents to hold out, by hash of their text.
        valid_max_bytes: longer documents are never held out; None for no bound.
        filters: names of datatrove's filters, and their arguments.
        min_chars, max_chars, min_tokens, max_tokens: documents outside are left out; None for no bound.
        deduplicate: keep only the first of documents with the same text.
    """

    field: str
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    dtype: str
    eod: int | None
    bos: int | None = None
    valid_fraction: float = 0.0
    valid_max_bytes: int | None = None
    filters: list[list] = field(default_factory=list)
    min_chars: int | None = None
    max_chars: int | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    deduplicate: bool = False


@dataclass(frozen=True)
class Plan:
    """Files, how they are cut into tasks, and what is done with them.

    Args:
        settings: see there.
        files: what is read, in order.
        tasks: for each task its pieces: index of the file, begin and end (see `elas.data_prep.readers`).
        outputs: prefixes of the results, absolute: trained on, and held out if there are two.
        source: facts for the manifest.
        max_skipped: share of the corpus that may be left out as unreadable; None for what `unread` finds too much.
            No part of the identity: it decides whether there is a result, not what it is.
    """

    settings: Settings
    files: list[SourceFile]
    tasks: list[list[tuple[int, int, int]]]
    outputs: list[str]
    source: dict
    max_skipped: float | None = None

    @property
    def work(self) -> Path:
        """Folder of everything that is temporary."""
        return work_folder(self.outputs[0])

    @cached_property
    def identity(self) -> dict[str, str]:
        """Digests of what must be the same for finished tasks to count, by what it is."""
        settings = {k: v for k, v in asdict(self.settings).items() if not k.startswith("tokenizer")}
        files = [(f.name, f.kind, f.size, f.mtime_ns, f.field) for f in self.files]
        parts = {"settings": settings, "files": files, "tasks": self.tasks, "format": FORMAT}
        parts["tokenizer"] = self.settings.tokenizer_sha256
        parts["held-out part"] = len(self.outputs)
        return {key: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16] for key, value in parts.items()}

    def save(self) -> None:
        """Write it to the work folder."""
        facts = asdict(self) | {"identity": self.identity}
        write_json(self.work / "plan.json", facts)


def work_folder(prefix: str | Path) -> Path:
    """Where the work for an output prefix lies."""
    return Path(f"{prefix}.work")


def make_plan(
    corpus: Corpus, settings: Settings, outputs: list[Path], task_bytes: int | None, max_skipped: float | None = None
) -> Plan:
    """Cut a corpus into tasks.

    Args:
        corpus: what to read.
        settings: what to do with it.
        outputs: prefixes of the results.
        task_bytes: size of a task on disk; None for a 64th of the corpus, within 2 MB and 64 MB.
        max_skipped: see `Plan`.
    """
    total = sum(file.size for file in corpus.files)
    size = task_bytes or min(LARGEST_TASK, max(SMALLEST_TASK, -(-total // TASKS)))
    tasks = [[(index, *piece) for index, piece in group] for group in _grouped(corpus.pieces(size), size)]
    return Plan(settings, corpus.files, tasks, [str(p.absolute()) for p in outputs], corpus.describe(), max_skipped)


def _grouped(pieces: Iterator[tuple[int, tuple[int, int], int]], size: int) -> Iterator[list]:
    group, held = [], 0
    for index, piece, held_by_piece in pieces:
        if group and held + held_by_piece > size:
            yield group
            group, held = [], 0
        group.append((index, piece))
        held += held_by_piece
    if group:
        yield group


def load_plan(work: str | Path) -> Plan:
    """The plan in a work folder; read once a process.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(work) / "plan.json"
    try:
        return _read_plan(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        raise UserError(f"{path}: not there; start the work with elas prep tokenize") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove the folder and start again") from error


@lru_cache(maxsize=1)
def _read_plan(path: Path, _changed: int) -> Plan:
    facts = json.loads(path.read_text(encoding="utf-8"))
    tasks = [[tuple(piece) for piece in task] for task in facts["tasks"]]
    files = [SourceFile(**file) for file in facts["files"]]
    return Plan(Settings(**facts["settings"]), files, tasks, facts["outputs"], facts["source"], facts["max_skipped"])


def saved_identity(work: Path) -> dict[str, str] | None:
    """`Plan.identity` of the work begun in a folder; None where none was."""
    try:
        return json.loads((work / "plan.json").read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError):
        return None
