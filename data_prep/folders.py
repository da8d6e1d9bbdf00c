"""Create result folders before the work starts, so a wrong path fails in seconds; remove them again on failure."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from elas.errors import UserError


@contextlib.contextmanager
def folders_for(folders: dict[str, Path]) -> Iterator[None]:
    """Create writable folders; on an exception, those created here are removed again if they are empty.

    Args:
        folders: path by the option that named it, for messages.

    Raises:
        UserError: a folder cannot be created or is not writable.
    """
    made: list[Path] = []
    try:
        for key, path in folders.items():
            missing = [p for p in (path, *path.parents) if not p.exists()]
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                why = f"cannot create the folder ({error.strerror})"
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
