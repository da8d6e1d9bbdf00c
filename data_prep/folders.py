"""Folders of results: made before work begins, so that a wrong path costs seconds, and gone again if it fails."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from elas.errors import UserError


@contextlib.contextmanager
def folders_for(folders: dict[str, Path]) -> Iterator[None]:
    """Make folders that can be written to; an exception removes those it made, where nothing lies in them.

    Args:
        folders: path by the option that gave it, for messages.

    Raises:
        UserError: one cannot be made, or not be written to.
    """
    made: list[Path] = []
    try:
        for key, path in folders.items():
            missing = [p for p in (path, *path.parents) if not p.exists()]
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                why = f"cannot be made a folder ({error.strerror})"
                raise UserError(f"{key} {path}: {why}; choose another place") from error
            finally:
                made += missing
            if not os.access(path, os.W_OK):
                raise UserError(f"{key} {path}: not writable; choose another place")
        yield
    except BaseException:
        for path in sorted(made, key=lambda p: len(p.parts), reverse=True):
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
