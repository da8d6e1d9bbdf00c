"""How much of a corpus could not be read, and when that is too much for a result.

Counted in bytes of the inputs: of a file of which nothing could be read all of it, of others the share of its lines or
rows. Documents that are empty, or that bounds, filters or `--deduplicate` leave out, are no loss. A field that is not
there is a mistake in the command, so a loss of more than `LIMIT` to that alone is refused, unless it is a few records
among others of their file; damage is warned of, and refused only beyond a bound that was given.
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
"""Share of the corpus that may lack the field where `--max-skipped` is not given."""
FEW = 100
"""Records without the field, in files where others have it, that are no more than damage."""
_WORTH_A_WARNING = 0.01
_NO_LOSS = ("empty", "holds no document", "no token is left of it")


class TooMuchUnread(UserError):
    """More than may be was left out; the tasks that are done stay done."""


class Unread:
    """What the finished tasks of a plan could not read.

    Args:
        plan: all of its tasks are done.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self._read = Counter()  # rows that were read, by file
        self._bad: dict[bool, Counter] = {True: Counter(), False: Counter()}  # rows that were not: no field, the rest
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
        """Share of the corpus that was not read: for want of the field (True), for other reasons (False), in all."""
        kinds = (True, False) if missing is None else (missing,)
        by_rows = any(file.kind == "hf" for file in self.plan.files)  # the hub does not say sizes
        lost = total = 0.0
        for index, file in enumerate(self.plan.files):
            rows = self._read[index] + self._bad[True][index] + self._bad[False][index]
            weight = rows if by_rows else file.size
            total += weight
            lost += weight * sum(self._bad[kind][index] for kind in kinds) / max(rows, 1)
        return lost / total if total else 0.0

    def check(self) -> None:
        """Raise `TooMuchUnread` if it is more than the plan allows."""
        bound = self.plan.max_skipped
        if bound is None and self._are_few():
            return
        share = self.share(True if bound is None else None)
        if share <= (LIMIT if bound is None else bound):
            return
        index, reason = self._example.get(True) or self._example[False]
        file = self.plan.files[index]
        fix = "accept the loss with --max-skipped 1"
        if is_missing(reason):
            fix = f"name the text with --field or --input {file.path}:FIELD, or {fix}"
        why = f"{share:.1%} of the corpus was not read, of {file.name} for instance: {reason}"
        kept = f"listed in {self.plan.work}/skipped.jsonl; finished tasks are kept"
        raise TooMuchUnread(f"--max-skipped={LIMIT if bound is None else bound}: {why}; {fix} ({kept})")

    def _are_few(self) -> bool:
        """Whether only a few records lack the field, and no file as a whole."""
        missing = self._bad[True]
        return all(self._read[file] for file in missing) and missing.total() < FEW

    def warn(self) -> None:
        """Say on stderr how much is missing from the result, where that is worth a line."""
        share = self.share()
        if share >= _WORTH_A_WARNING:
            where = f"{self.plan.outputs[0]}.skipped.jsonl"
            print(f"warning: {share:.1%} of the corpus could not be read; {where} lists it", file=sys.stderr)


def check_columns(corpus: Corpus, bound: float | None, fix: str = "") -> None:
    """Refuse, before any work, tables and datasets without the column where they are too much of a corpus.

    Args:
        corpus: of which only headers are read.
        bound: share of the corpus that may be lost; None for `LIMIT`.
        fix: what else could be done.

    Raises:
        ConfigError: it is more.
    """
    lacking = corpus.without_column()
    total = sum(file.size for file in corpus.files)
    lost = sum(file.size for file, _ in lacking)
    by_count = any(file.kind == "hf" for file in corpus.files)  # the hub does not say sizes
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
    why = f"not in {of}; {file.name}: {reason}"
    raise ConfigError("--field", file.field, why, f"name the text with --field or --input {source}:FIELD{fix}")
