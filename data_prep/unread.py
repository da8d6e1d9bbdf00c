"""How much of a corpus could not be read, and whether that is too much.

The loss is measured in bytes of the inputs; a partly read file counts by the share of its lines or rows that were
lost. Empty documents and those dropped by bounds, filters or `--deduplicate` are not a loss. A missing field is most
likely a mistake in the command, so losing more than `LIMIT` to it is an error, unless only a few records lack the field
in files where others have it. Damage gives a warning, and is an error only above an explicit `--max-skipped`.
"""

import json
import sys
from collections import Counter

from elas.data_prep.fields import is_missing
from elas.data_prep.hub import HUB
from elas.data_prep.plan import Plan
from elas.data_prep.shards import part_path
from elas.data_prep.sources import Corpus, kind_of
from elas.errors import ConfigError, UserError

LIMIT = 0.25
"""Maximum share of the corpus without the field when `--max-skipped` is not given."""
FEW = 100
"""Fewer records than this without the field, in files where others have it, count as damage."""
_WORTH_A_WARNING = 0.01
_NO_LOSS = ("empty", "holds no document", "yields no tokens")


class TooMuchUnread(UserError):
    """The unreadable share exceeds the bound; finished tasks are kept."""


class Unread:
    """Counts what the tasks of a plan could not read.

    Args:
        plan: a plan whose tasks are all finished.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self._read = Counter()  # rows read, by file
        # Rows not read, by file: without the field (True), or for another reason (False).
        self._bad: dict[bool, Counter] = {True: Counter(), False: Counter()}
        self._example: dict[bool, tuple[int, str]] = {}
        for task in range(len(plan.tasks)):
            facts = json.loads(part_path(plan.work, task, "json").read_text())
            self._read.update({int(file): rows for file, rows in facts["read"].items()})
            with open(part_path(plan.work, task, "skipped.jsonl"), encoding="utf-8") as rows:
                for row in map(json.loads, rows):
                    if kind_of(row["reason"]) not in _NO_LOSS:
                        lacks = is_missing(row["reason"])
                        self._bad[lacks][row["file"]] += 1
                        self._example.setdefault(lacks, (row["file"], row["reason"]))

    def share(self, missing: bool | None = None) -> float:
        """Unread share of the corpus, 0 to 1: lacking the field (True), for other reasons (False), or both (None)."""
        kinds = (True, False) if missing is None else (missing,)
        by_rows = any(file.kind == "hf" for file in self.plan.files)  # sizes of hub datasets are unknown
        lost = total = 0.0
        for index, file in enumerate(self.plan.files):
            rows = self._read[index] + self._bad[True][index] + self._bad[False][index]
            weight = rows if by_rows else file.size
            total += weight
            lost += weight * sum(self._bad[kind][index] for kind in kinds) / max(rows, 1)
        return lost / total if total else 0.0

    def check(self) -> None:
        """Raise `TooMuchUnread` if the unread share exceeds the plan's bound."""
        bound = self.plan.max_skipped
        if bound is None and self._is_negligible():
            return
        share = self.share(True if bound is None else None)
        if share <= (LIMIT if bound is None else bound):
            return
        index, reason = self._example.get(True) or self._example[False]
        file = self.plan.files[index]
        fix = "accept the loss with --max-skipped 1"
        if is_missing(reason):
            fix = f"name the text with --field or --input {file.path}:FIELD, or {fix}"
        why = f"{share:.1%} of the corpus was not read, for example in {file.name}: {reason}"
        kept = f"listed in {self.plan.work}/skipped.jsonl; finished tasks are kept"
        raise TooMuchUnread(f"--max-skipped={LIMIT if bound is None else bound}: {why}; {fix} ({kept})")

    def _is_negligible(self) -> bool:
        """Whether only a few records lack the field, and no whole file does."""
        missing = self._bad[True]
        return all(self._read[file] for file in missing) and missing.total() < FEW

    def warn(self) -> None:
        """Warn on stderr if at least 1 % of the corpus could not be read."""
        share = self.share()
        if share >= _WORTH_A_WARNING:
            where = f"{self.plan.outputs[0]}.skipped.jsonl"
            print(f"warning: {share:.1%} of the corpus could not be read; listed in {where}", file=sys.stderr)


def check_columns(corpus: Corpus, bound: float | None, fix: str = "") -> None:
    """Check before any work that tables and datasets without the text column are not too much of the corpus.

    Args:
        corpus: only headers are read.
        bound: maximum share of the corpus that may be lost; None for `LIMIT`.
        fix: a further fix, appended to the message.

    Raises:
        ConfigError: the share exceeds the bound.
    """
    lacking = corpus.without_column()
    total = sum(file.size for file in corpus.files)
    lost = sum(file.size for file, _ in lacking)
    by_count = any(file.kind == "hf" for file in corpus.files)  # sizes of hub datasets are unknown
    share = len(lacking) / len(corpus.files) if by_count else lost / max(total, 1)
    if not lacking or share <= (LIMIT if bound is None else bound):
        return
    file, reason = lacking[0]
    of = (
        f"{len(lacking)} of {len(corpus.files)} files, {share:.0%} of the corpus"
        if len(corpus.files) > 1
        else "the input"
    )
    source = f"{HUB}{file.path}" if file.kind == "hf" else file.path if len(lacking) == 1 else file.source
    why = f"missing in {of}; {file.name}: {reason}"
    raise ConfigError("--field", file.field, why, f"name the text with --field or --input {source}:FIELD{fix}")
