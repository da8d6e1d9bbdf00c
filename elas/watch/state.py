"""How a run stands, by what its files say and when they changed. Does not import torch.

The files may be those of another host: ages of what was there at the first look are by this host's clock, later ones by
when this process saw the change. A run that is killed leaves no marker, so silence is reported with its length and what
is usual, not as an end.
"""

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elas.checkpoint.folder import MANIFEST, age_s, checkpoints_in
from elas.config import Config
from elas.console import clock
from elas.errors import UserError
from elas.live import View, columns_of
from elas.run_dir import DONE, LOCK, REQUEUE, check_is_run, lock_holder
from elas.train import events
from elas.watch.pace import gaps_s, last_growth, usual_s
from elas.watch.tail import Tail

_BUSY, _LATE, _LEAST_S = 3.0, 5.0, 30.0
"""After `_BUSY` usual intervals without a line, a validation or a save that is due is taken for the reason. Silence of
`_LATE` intervals, at least `_LEAST_S` seconds, is unusual; where one is due, intervals as long as the longest seen."""
_STARTS_S = 600.0
"""Silence after a start that is reported as such: the first step may compile and wait for data."""
_AGAIN_S = 30.0
"""Seconds after a stop in which the stopped process may still hold its lock."""
_WHY = 160
"""Characters of an error that are shown."""
_COMING_S = 120.0
"""Seconds that a start may take from the launcher's look at the lock, or on another host, to its first file."""


@dataclass(frozen=True)
class State:
    """How a run stands.

    Attributes:
        kind: starting, training, validating, saving, silent, failed, stopped or done.
        text: the same in a line, with ages and reasons.
        view: the last known values, and `text` as their operation.
        silent_s: seconds since the last sign of the run; None before the first.
        usual_s: usual seconds between two lines; None if unknown.
    """

    kind: str
    text: str
    view: View
    silent_s: float | None = None
    usual_s: float | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the run said that it ended; of a failed one, so long ago that it would have been restarted."""
        failed = self.kind == "failed" and (self.silent_s or 0.0) > _COMING_S
        return failed or self.kind in ("done", "stopped")


class Run:
    """A run's folder; `read` looks at its files, `state` computes from what was read.

    Args:
        folder: RUN_DIR.

    Raises:
        UserError: it does not exist, is no run's folder, or cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.metrics, self.validation = (Tail(folder / f"{name}.jsonl") for name in ("metrics", "validation"))
        self._signs: tuple = ()
        self._age, self._at = 0.0, time.monotonic()
        check_is_run(folder)
        self.read()

    def read(self) -> list[dict[str, Any]]:
        """Look at the files; returns the new rows of both, in the order of their times."""
        try:
            if not self.folder.is_dir():
                raise UserError(f"{self.folder}: the folder is gone")
            new = sorted([*self.metrics.read(), *self.validation.read()], key=lambda row: row["time"])
            self._facts = {name: _json(self.folder / name) for name in ("config.json", "run.json", DONE, REQUEUE)}
            folders = self.folder / "checkpoints"
            self._checkpoint = next((path for path in checkpoints_in(folders) if (path / MANIFEST).exists()), None)
            self._saving = max((int(p.name[5:-8]) for p in folders.glob("step_*.partial") if p.is_dir()), default=None)
            self._process = lock_holder(self.folder)
            self._event = _last_row(self.folder / "events.jsonl")
            times = {name: _written_at(self.folder / name) for name in (LOCK, DONE, REQUEUE)}
            self._claimed = times[LOCK] if times[LOCK] > max(times[DONE], times[REQUEUE]) else None
        except OSError as error:
            where = error.filename or self.folder
            raise UserError(f"{where}: cannot be read ({error.strerror}); check the file system") from error
        self.config = config_of(self._facts["config.json"])
        self._note_signs()
        return new

    def _note_signs(self) -> None:
        """Note when the run last did something."""
        times = [tail.rows[-1]["time"] for tail in (self.metrics, self.validation) if tail.rows]
        times += [started] if (started := self._started) else []
        signs = (*times, self.saved)
        if signs == self._signs:
            return
        now = time.time()
        ages = [now - one for one in times] + ([age_s(self._checkpoint) or 0.0] if self._checkpoint else [])
        self._age = 0.0 if self._signs else max(0.0, min(ages, default=0.0))
        self._signs, self._at = signs, time.monotonic()

    @property
    def _started(self) -> float | None:
        """When the run was last started, as far as it got to its model."""
        started = (self._facts["run.json"] or {}).get("time")
        return started if isinstance(started, int | float) else None

    @property
    def steps(self) -> int:
        """Steps of the whole run; 0 if unknown."""
        return self.config.train.steps if self.config else 0

    @property
    def saved(self) -> int | None:
        """Step of the newest checkpoint that is complete, by its name."""
        return int(self._checkpoint.name.removeprefix("step_")) if self._checkpoint else None

    @property
    def age(self) -> float | None:
        """Seconds since the run's last sign."""
        return self._age + time.monotonic() - self._at if self._signs != (None,) else None

    def more_s(self, step: int) -> float:
        """Estimated seconds of the validations and saves after a step, by how long the last ones took."""
        if self.config is None:
            return 0.0
        due = events.Due(self.config.train, self.config.checkpoint)
        due.validation_s, due.save_s = (last_growth(self.metrics.rows, name) for name in ("validation_s", "save_s"))
        return due.seconds(step, over=False)

    def state(self) -> State:
        """How the run stands now."""
        rows, valid, age = self.metrics.rows, self.validation.rows, self.age
        usual = usual_s(rows, self.config)
        kind, text = self._ended() or self._failed() or self._running(age, usual)
        view = View(title=str(self.folder), steps=self.steps, now=text, checkpoint=self.saved)
        if self._checkpoint:
            view = replace(view, checkpoint_age_s=age_s(self._checkpoint))
        if valid:
            view = replace(view, ppl=valid[-1].get("ppl"), valid_step=valid[-1]["step"])
        if rows:
            view = replace(view, **columns_of(rows[-1]))
            if self.steps and rows[-1].get("step_s") and kind in ("training", "validating", "saving"):
                left = (self.steps - view.step) * rows[-1]["step_s"] + self.more_s(view.step)
                view = replace(view, left_s=max(0.0, left - (age or 0.0)))
        return State(kind, text, view, age, usual)

    def _ended(self) -> tuple[str, str] | None:
        """Kind and text by the markers; None without one."""
        for name, kind in ((DONE, "done"), (REQUEUE, "stopped")):
            facts = self._facts[name]
            if facts is None:
                continue
            ago = max(0.0, time.time() - facts["time"]) if isinstance(facts.get("time"), int | float) else None
            why = f" ({facts['stopped']})" if facts.get("stopped") else ""
            text = f"{kind} at step {facts.get('step', '?')}{why}" + ("" if ago is None else f", {clock(ago)} ago")
            again = self._starts_again(ago)
            return ("starting", f"starting again: {again}; {text}") if again else (kind, text)
        return None

    def _failed(self) -> tuple[str, str] | None:
        """Kind and text if an error that a rank saw was the last that happened, and no process of it is left here."""
        at = self._event.get("time")
        if self._event.get("event") != "failed" or not isinstance(at, int | float) or self._process:
            return None
        rows = [tail.rows[-1]["time"] for tail in (self.metrics, self.validation) if tail.rows]
        if at < max([self._started or 0.0, *rows]):
            return None
        why, ago = str(self._event.get("why", ""))[:_WHY], clock(max(0.0, time.time() - at))
        return "failed", f"failed at step {self._event.get('step', '?')}, {ago} ago{f': {why}' if why else ''}"

    def _starts_again(self, ago: float | None) -> str:
        """What shows that a run whose marker was written so long ago is starting again; empty for nothing."""
        if self._process and (self._claimed or (ago is not None and ago > _AGAIN_S)):
            return f"process {self._process} on this host holds its lock"
        if self._claimed and (since := max(0.0, time.time() - self._claimed)) < _COMING_S:
            return f"its lock was taken {clock(since)} ago"
        return ""

    def _running(self, age: float | None, usual: float | None) -> tuple[str, str]:
        """Kind and text without a marker."""
        held = f"; process {self._process} on this host holds its lock" if self._process else ""
        rows, started = self.metrics.rows, self._started
        if not rows or (started or 0.0) > rows[-1]["time"]:
            since = "" if age is None or not started else f", {clock(age)} after its start or last validation"
            text = f"starting: no step is logged{' since its last start' if rows else ' yet'}{since}{held}"
            if age is None or age < _STARTS_S:
                return "starting", text
            return "silent", text.replace("starting: ", f"silent for {clock(age)}: ", 1)
        assert age is not None  # there is a row
        if usual is None:
            return "training", f"training: last line {clock(age)} ago{held}"
        kind, what = self._due()
        known = sum(last_growth(rows, name) for name in ("validation_s", "save_s"))
        longest = max(usual + known, *gaps_s(rows)) if what else usual
        if what and _BUSY * usual < age <= max(_LATE * longest, _LEAST_S):
            return kind, f"{kind}: {what}; no line for {clock(age)}{held}"
        if age <= max(_LATE * usual, _LEAST_S):
            return "training", f"training: last line {clock(age)} ago, usually one every {_interval(usual)}{held}"
        more = f"; {what}" if what else ""
        return "silent", (
            f"silent for {clock(age)}, usually a line every {_interval(usual)}{more}; "
            f"it may hang, or have ended without a marker{held}"
        )

    def _due(self) -> tuple[str, str]:
        """What follows the last logged step and its files do not show yet: a kind, and words; empty for nothing."""
        row, config = self.metrics.rows[-1], self.config
        saved = self.saved or 0
        if self._saving is not None and self._saving > saved:
            return "saving", f"step {self._saving} is being saved, or was killed in that"
        if config is None:
            return "", ""
        step, every = row["step"], config.log.every_steps
        between = range(step, max(step + 1, min(config.train.steps, (step // every + 1) * every)))
        validated = self.validation.rows[-1]["step"] if self.validation.rows else -1
        validates = next((one for one in between if events.validates(config, one) and validated < one), None)
        saves = next((one for one in between if events.saves(config, one) and saved < one), None)
        if validates is not None:
            return "validating", f"a validation is due after step {validates}"
        return ("", "") if saves is None else ("saving", f"a save is due after step {saves}")


def config_of(values: Mapping[str, Any] | None) -> Config | None:
    """The configuration in config.json, with the defaults for what another version did not write; None without one."""
    if values is None:
        return None
    config = Config()
    for section, keys in values.items():
        part = getattr(config, section, None)
        for key, value in keys.items() if isinstance(keys, dict) else ():
            if part is not None and hasattr(part, key):
                setattr(part, key, value)
    return config


def _written_at(path: Path) -> float:
    """When a file was last written, by its file system's clock; 0 without one."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _last_row(path: Path) -> dict[str, Any]:
    """The last object of a JSONL file; empty without one. For short files."""
    with contextlib.suppress(FileNotFoundError):
        for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()):
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                return found if isinstance(found, dict) else {}
    return {}


def _interval(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)


def _json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if there is no such file, an empty object if it holds something else."""
    with contextlib.suppress(FileNotFoundError):
        text = path.read_text(encoding="utf-8", errors="replace")
        with contextlib.suppress(ValueError):
            found = json.loads(text)
            return found if isinstance(found, dict) else {}
        return {}
    return None
