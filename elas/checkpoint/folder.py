"""Checkpoint folders: writing, reading, checking and pruning them.

    RUN_DIR/checkpoints/step_00000100/__0_0.distcp …  .metadata  manifest.json  manifest.sha256

A save writes into `step_N.partial`. The folder is renamed when all ranks' files, their index, and the manifest with
every file's size and SHA-256 are on disk, so a run killed at any moment still finds its last intact checkpoint. Any
byte that changes later is detected: in the files by the manifest, in the manifest by `manifest.sha256`.
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from elas.errors import ConfigError, UserError
from elas.files import sync

MANIFEST, SEAL = "manifest.json", "manifest.sha256"
FORMAT = 2
_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is intact by its manifest and file sizes; checksums of the files may still be unchecked."""

    path: Path
    manifest: dict
    passed_over: tuple[str, ...] = ()
    """Newer checkpoints that were skipped because they are not intact: a line `PATH: why` for each."""

    @property
    def step(self) -> int:
        """Optimizer steps taken when it was written."""
        return self.manifest["step"]

    @property
    def is_start(self) -> bool:
        """Whether it holds weights from elsewhere that a run starts with, without moments; no run saves step 0."""
        return self.step == 0 and bool(self.manifest.get("weights_only"))


def read_checkpoint(path: Path) -> Checkpoint | str:
    """Read a checkpoint's manifest and compare the sizes of its files; returns a reason if it is not intact."""
    try:
        data = (path / MANIFEST).read_bytes()
        seal = (path / SEAL).read_text(encoding="ascii")
        if seal != _seal(data):
            return f"{MANIFEST} does not match {SEAL}"
        manifest = json.loads(data)
        if manifest["format"] != FORMAT:
            return f"has format {manifest['format']}, which this version cannot read"
        names = {name: facts["bytes"] for name, facts in manifest["files"].items()}
        named = _NAME.fullmatch(path.name)
        if named and int(named[1]) != manifest["step"]:
            return f"is named {path.name}, but holds step {manifest['step']}"
    except OSError as error:
        return f"no readable {Path(error.filename).name} ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is not a checkpoint's manifest"
    for name, size in names.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or truncated"
    return Checkpoint(path, manifest)


def no_checkpoint(path: Path) -> str:
    """Why a path cannot be a checkpoint's folder; empty if it may be one."""
    if not path.exists():
        return "no such folder"
    if not path.is_dir():
        return "is a file, not a checkpoint's folder"
    if (path / MANIFEST).exists() or _NAME.fullmatch(path.name):
        return ""
    if (path / "checkpoints").is_dir():
        newest = next(checkpoints_in(path / "checkpoints"), None)
        return "is a run's folder, not a checkpoint" + (f"; its newest one is {newest}" if newest else "")
    newest = next(checkpoints_in(path), None)
    if newest:
        return f"is a folder of checkpoints; the newest one is {newest}"
    return f"holds no checkpoint: there is no {MANIFEST}"


def newest_intact(folders: Iterable[Path], passed_over: Iterable[str] = ()) -> Checkpoint | str:
    """The first of some checkpoints that is intact by its manifest and file sizes.

    Args:
        folders: of checkpoints, newest first.
        passed_over: a line `PATH: why` for each newer one that is known to be damaged.

    Returns:
        The checkpoint; a reason if there is none, which is empty if there are no folders at all.
    """
    skipped = list(passed_over)
    for path in folders:
        found = read_checkpoint(path)
        if isinstance(found, Checkpoint):
            return replace(found, passed_over=tuple(skipped))
        skipped.append(f"{path}: {found}")
    return f"none of its checkpoints is intact ({'; '.join(skipped)})" if skipped else ""


def unusable(path: Path | str, why: str, fix: str, key: str | None = None) -> UserError:
    """The error of a checkpoint that cannot be used: of a path, or of the setting `key` that names it."""
    return ConfigError(key, str(path), why, fix) if key else UserError(f"{path}: {why}; {fix}")


def require_intact(checkpoint: Checkpoint) -> None:
    """Compare every byte of a checkpoint with its checksums; raises `UserError` if a file is damaged."""
    if problems := damaged_files(checkpoint):
        raise unusable(checkpoint.path, ", ".join(problems), "give an older one (elas checkpoint list RUN)")


def damaged_files(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> list[str]:
    """Compare the SHA-256 of a checkpoint's files (default: all); returns a line for each damaged one."""
    found = []
    for name in checkpoint.manifest["files"] if names is None else names:
        try:
            with (checkpoint.path / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
            continue
        if digest != checkpoint.manifest["files"][name]["sha256"]:
            found.append(f"{name} is damaged")
    return found


def checkpoints_in(folder: Path) -> Iterator[Path]:
    """Folders of checkpoints, newest first by name, intact or not; symbolic links are ignored."""
    yield from (path for _, path in _numbered(folder))


def age_s(checkpoint: Path) -> float | None:
    """Seconds since a checkpoint was complete, by its manifest's time; None if it has none."""
    try:
        return max(0.0, time.time() - (checkpoint / MANIFEST).stat().st_mtime)
    except OSError:
        return None


def newer_than(folder: Path, step: int) -> set[str]:
    """Names of the checkpoint folders after a step, intact or not."""
    return {path.name for number, path in _numbered(folder) if number > step}


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Folders of checkpoints with the steps that their names give, newest first."""
    found = [(int(m[1]), path) for path in folder.glob("step_*") if (m := _NAME.fullmatch(path.name))]
    return [(step, path) for step, path in sorted(found, reverse=True) if not path.is_symlink()]


def file_facts(path: Path) -> dict:
    """Size and SHA-256 of a file, for the manifest."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def put_in_place(partial: Path, target: Path, manifest: dict) -> None:
    """Write the manifest of a folder whose files are all on disk, and rename the folder to `target`."""
    data = json.dumps({"format": FORMAT, **manifest}, indent=1).encode()
    for name, content in ((MANIFEST, data), (SEAL, _seal(data).encode())):
        (partial / name).write_bytes(content)
        sync(partial / name)
    sync(partial)
    if target.exists():
        remove(target)
    partial.rename(target)
    sync(target.parent)


def remove(folder: Path) -> None:
    """Remove a checkpoint, its manifest first, so that a partly removed one never counts as intact."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def prune(newest: Path, keep: int, keep_every: int, left_alone: Collection[str] = ()) -> None:
    """Remove checkpoints older than the one just written.

    Args:
        newest: the checkpoint just written; kept, and counted.
        keep: number of newest intact checkpoints to keep; 0 for all.
        keep_every: also keep checkpoints at multiples of this many steps; 0 for none.
        left_alone: names of checkpoints to keep without counting them, such as damaged ones that a resume skipped;
            counted, they would displace intact ones.
    """
    if not keep:
        return
    counted = [path for path in checkpoints_in(newest.parent) if path.name not in left_alone]
    intact = [found for path in counted if isinstance(found := read_checkpoint(path), Checkpoint)]
    step = next(found.step for found in intact if found.path == newest)
    for old in [found for found in intact if found.step <= step][keep:]:
        if not keep_every or old.step % keep_every:
            remove(old.path)


def _seal(data: bytes) -> str:
    """The manifest's checksum, in the format of sha256sum."""
    return f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n"
