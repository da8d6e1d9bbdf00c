"""Files and folders that are whole or not there, flushing to disk, and reading of JSONL rows."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from elas.errors import Failure, UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk, or a quota, that is full."""
_OF_FOLDERS = ("config.json", "manifest.json", "index.json", "tokenizer.json", "vocab.json", "tokens_map.json")
_IN_TEXT = re.compile(r"\(os error (\d+)\)")


def write_json(path: Path | None, facts: dict) -> None:
    """Write `facts` to `path` atomically (a pipe or device: directly); does nothing if `path` is None.

    Raises:
        UserError: the file cannot be written.
    """
    if path is None:
        return
    text = json.dumps(facts, indent=2) + "\n"
    try:
        if path.exists() and not path.is_file():
            path.write_text(text)
            return
        target = path.resolve()  # so that a symbolic link is kept and its target replaced
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        partial.replace(target)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another path") from error


def check_is_no_input(path: Path | None, inputs: Iterable[Path | str]) -> None:
    """Raise `UserError` if a results file, which is written at the end, is one of a command's inputs.

    Args:
        path: of the results.
        inputs: files, prefixes of corpora, and folders of runs, models and tokenizers. Earlier results may be in those.
    """
    if path is None or not path.is_file():
        return
    real = path.resolve()
    for one in inputs:
        source = Path(one).resolve()
        files = (source, *(source.with_name(source.name + end) for end in (".bin", ".idx", ".manifest.json")))
        if real in files or (source in real.parents and real.name.endswith(_OF_FOLDERS)):
            raise UserError(f"--json {path}: is an input, which it would overwrite; give another file")


def check_readable(option: str, path: Path, fix: str) -> None:
    """Raise `UserError` with the fix unless the file that an option names can be opened."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read ({error.strerror}); {fix}") from error


def system_error(error: BaseException) -> OSError | None:
    """The system's error behind one of a library; None if there is none.

    torch's writer has it as a cause; the Rust of safetensors and tokenizers has its number in the text.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause
        if found := _IN_TEXT.search(str(cause)):
            number = int(found[1])
            return OSError(number, os.strerror(number))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, `TARGET.partial`, which becomes the target when the block ends without an error.

    What an earlier, killed process left there is removed first.

    Args:
        target: must not exist.

    Raises:
        UserError: the target exists, or cannot be written.
        Failure: the disk is full.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"{target}: exists; give a folder that does not")
    partial = target.with_name(target.name + ".partial")
    try:
        with contextlib.suppress(FileExistsError):
            partial.mkdir(parents=True)
        lock = os.open(partial, os.O_RDONLY)  # closed by the kernel when a killed process ends
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); give another folder") from error
    with contextlib.closing(_Lock(lock)):
        _lock(lock, partial, target)
        yield from _written(partial, target)


class _Lock:
    def __init__(self, handle: int):
        self._handle = handle

    def close(self) -> None:
        os.close(self._handle)


def _lock(handle: int, partial: Path, target: Path) -> None:
    """Raise `UserError` if another process is writing the folder; file systems without locks are trusted."""
    busy = UserError(f"{target}: another process is writing it; wait for that, or give another folder")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    except OSError:
        return
    if not partial.exists() or os.fstat(handle).st_ino != partial.stat().st_ino:  # that one has just ended
        raise busy


def _written(partial: Path, target: Path) -> Iterator[Path]:
    try:
        for path in partial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield partial
        mode = partial.stat().st_mode & 0o666
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(mode)  # safetensors makes files that only their owner reads
                sync(path)
        sync(partial)
        partial.rename(target)
        sync(target.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, UserError | Failure) or (why := system_error(error)) is None:
            raise
        if why.errno in FULL:
            raise Failure(f"{target}: the disk is full; nothing is left there") from error
        raise UserError(f"{target}: cannot be written ({why.strerror}); give another folder") from error


def sync(path: Path) -> None:
    """Flush a file to disk; of a folder, its new and renamed entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _as_it_is(row: dict[str, Any]) -> None:
    pass


def read_jsonl(path: Path, each: Callable[[dict[str, Any]], None] = _as_it_is) -> list[dict[str, Any]]:
    """Rows of a JSONL file; lines that are not a JSON object with an integer `step`, as after a kill, are skipped.

    Args:
        path: of the file.
        each: called with each row as it is read, and may change it.

    Returns:
        The rows; empty if the file does not exist.
    """
    if not path.exists():
        return []
    import orjson  # a quarter of the time of json

    rows = []
    with path.open("rb") as lines:
        for line in lines:
            try:
                row = orjson.loads(line)
            except ValueError:
                try:
                    row = json.loads(line)  # what orjson refuses: NaN, and integers above 64 bits
                except ValueError:
                    continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                each(row)
                rows.append(row)
    return rows
