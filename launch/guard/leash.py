"""A rank's end of the leash: the rank ends when its guard, or the launcher in between, ends."""

import os
import stat
import sys
import threading

from elas.launch.guard.guard import VARIABLE
from elas.launch.guard.processes import end_with_parent


def end_with_launcher() -> None:
    """End this process when its parent or its guard ends; does nothing without a guard.

    The guard holds the write end of standard input and never writes to it, so end of input means that it is gone.
    """
    if VARIABLE not in os.environ or not stat.S_ISFIFO(os.fstat(0).st_mode):
        return
    end_with_parent()
    threading.Thread(target=_end_with_guard, name="leash", daemon=True).start()


def _end_with_guard() -> None:
    while os.read(0, 4096):
        continue
    print(f"error: rank {os.environ.get('RANK', '0')}: its guard is gone; ending", file=sys.stderr, flush=True)
    os._exit(1)
