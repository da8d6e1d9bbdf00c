"""A rank's end of the leash: it never outlives the guard that runs it, nor the launcher between."""

import os
import stat
import sys
import threading

from elas.launch.guard.guard import VARIABLE
from elas.launch.guard.processes import end_with_parent


def end_with_launcher() -> None:
    """Under `elas.launch.guard.guard`, end this process when its parent or the guard is gone; else nothing.

    The guard holds the other end of standard input, over which nothing ever comes, and its death closes it.
    """
    if VARIABLE not in os.environ or not stat.S_ISFIFO(os.fstat(0).st_mode):
        return
    end_with_parent()
    threading.Thread(target=_wait_for_the_end, name="leash", daemon=True).start()


def _wait_for_the_end() -> None:
    while os.read(0, 4096):
        continue
    print(f"error: rank {os.environ.get('RANK', '0')}: its guard is gone; it ends too", file=sys.stderr, flush=True)
    os._exit(1)
