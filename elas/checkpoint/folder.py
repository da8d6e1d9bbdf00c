"""Checkpoint folders: which count, whether they are whole, which are kept.

    RUN_DIR/checkpoints/step_00000100/__0_0.distcp …  .metadata  manifest.json  manifest.sha256

A save writes into `step_N.partial`; when all ranks' files, their index and the manifest with every file's size and
SHA-256 are on the disk, the folder is renamed. So a run killed at any moment finds its last whole checkpoint, and any
byte that changed since is found: in the files by the manifest, in the manifest by `manifest.sha256`.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MANIFEST, SEAL = "manifest.json", "manifest.sha256"
FORMAT = 2
_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest is whole and whose files have their sizes: its folder and the manifest."""

    path: Path
    manifest: dict
    passed_over: tuple[str, ...] = ()
    """Newer checkpoints that are not whole, and why."""

    @property
    def step(self) -> int:
        """Optimizer steps taken when it was written."""
        return self.manifest["step"]


def read_checkpoint(path: Path) -> Checkpoint | str:
    """Read a checkpoint's manifest and compare the sizes of its files; a text says why it does not count."""
    try:
        data = (path / MANIFEST).read_bytes()
        seal = (path / SEAL).read_text(encoding="ascii")
        if seal != _seal(data):
            return f"{MANIFEST} is not the one that was written ({SEAL})"
        manifest = json.loads(data)
        if manifest["format"] != FORMAT:
            return f"is of format {manifest['format']}, which this version does not read"
        names = {name: facts["bytes"] for name, facts in manifest["files"].items()}
        named = _NAME.fullmatch(path.name)
        if named and int(named[1]) != manifest["step"]:
            return f"is named {path.name}, but holds step {manifest['step']}"
    except OSError as error:
        return f"no readable {Path(error.filename).name} ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is not a checkpoint's"
    for name, size in names.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or cut short"
    return Checkpoint(path, manifest)


def no_checkpoint(path: Path) -> str:
    """What a path is that was given as a checkpoint's folder and is something else; empty where it may be one."""
    if not path.exists():
        return "no such folder"
    if not path.is_dir():
        return "is a file, not a checkpoint's folder"
    if (path / MANIFEST).exists() or _NAME.fullmatch(path.name):
        return ""
    if (path / "checkpoints").is_dir():
        newest = next(checkpoints_in(path / "checkpoints"), None)
        return "is a run's folder, not a checkpoint" + (f"; its newest is {newest}" if newest else "")
    newest = next(checkpoints_in(path), None)
    if newest:
        return f"is a folder of checkpoints, the newest of which is {newest}"
    return f"holds no checkpoint: there is no {MANIFEST}"


def damaged_files(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> list[str]:
    """Read files and compare their SHA-256; what is wrong with those that are not as they were written."""
    found = []
    for name in checkpoint.manifest["files"] if names is None else names:
        try:
            with (checkpoint.path / name).open("rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest() == checkpoint.manifest["files"][name]["sha256"]
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
            continue
        if not whole:
            found.append(f"{name} is damaged")
    return found


def checkpoints_in(folder: Path) -> Iterator[Path]:
    """Folders of checkpoints, by their names the newest first; whole or not. Links do not count."""
    found = [(int(m[1]), path) for path in folder.glob("step_*") if (m := _NAME.fullmatch(path.name))]
    yield from (path for _, path in sorted(found, reverse=True) if not path.is_symlink())


def newer_than(folder: Path, step: int) -> set[str]:
    """Names of the folders of checkpoints after a step, intact or not."""
    return {path.name for path in checkpoints_in(folder) if int(_NAME.fullmatch(path.name)[1]) > step}


def file_facts(path: Path) -> dict:
    """Size and SHA-256 of a file, for the manifest."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def put_in_place(partial: Path, target: Path, manifest: dict) -> None:
    """Write the manifest of a folder whose files are all on the disk, and give the folder its name."""
    data = json.dumps({"format": FORMAT, **manifest}, indent=1).encode()
    for name, content in ((MANIFEST, data), (SEAL, _seal(data).encode())):
        with (partial / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    _flush(partial)
    if target.exists():
        remove(target)
    partial.rename(target)
    _flush(target.parent)


def remove(folder: Path) -> None:
    """Remove a checkpoint; its manifest goes first, so a half-removed one never counts."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def prune(newest: Path, keep: int, keep_every: int, left_alone: Collection[str] = ()) -> None:
    """Remove checkpoints older than the one just written.

    Args:
        newest: that one, which counts and stays.
        keep: how many of the newest intact ones stay; 0 for all.
        keep_every: checkpoints at multiples of this many steps stay too; 0 for none.
        left_alone: names of those that do not count and stay, such as damaged ones that a resume passed over: counted,
            they would push out the intact ones.
    """
    if not keep:
        return
    counted = [path for path in checkpoints_in(newest.parent) if path.name not in left_alone]
    whole = [found for path in counted if isinstance(found := read_checkpoint(path), Checkpoint)]
    step = next(found.step for found in whole if found.path == newest)
    for old in [found for found in whole if found.step <= step][keep:]:
        if not keep_every or old.step % keep_every:
            remove(old.path)


def _seal(data: bytes) -> str:
    """A line as sha256sum writes it."""
    return f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n"


def _flush(folder: Path) -> None:
    """Let renames and new names in a folder reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
