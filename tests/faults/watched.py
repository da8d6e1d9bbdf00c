"""What the tests of the watchdog run on each rank."""

import time


def one_stands_still(folder: str, timeout: float) -> list:
    """Rank 1 stops making progress before rank 0 does; what the watchdogs end the processes with."""
    import torch.distributed as dist

    from elas.config import load_config
    from elas.train.watchdog import Watchdog

    ended = []
    config = load_config(None, {"train.run_dir": folder, "train.timeout_seconds": timeout})
    with Watchdog(config.train, end=ended.append) as watchdog:
        for step in range(5 - 3 * dist.get_rank()):
            watchdog.mark(step, "forward and backward")
        start = time.monotonic()
        while not ended and time.monotonic() < start + 5 * timeout:
            time.sleep(0.05)
    return [ended, time.monotonic() - start]
