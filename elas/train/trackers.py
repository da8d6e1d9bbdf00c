"""Trackers: where the scalars of a run also go (`log.trackers`): TensorBoard, Weights & Biases, Trackio.

Rank 0 hands each logged row to every tracker, as values by tag against the step. A tracker may neither end nor delay a
run. TensorBoard writes into the run's folder, as metrics.jsonl does, in this process. `Wandb` and `Trackio` use the
network, print, start threads and exit handlers; each runs in a process of its own (`elas.train.tracker_process`), which
can be killed when it hangs. Does not import torch.
"""

import importlib.util
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from elas.config import Config
from elas.errors import ConfigError
from elas.files import write_json

OPEN_S, CLOSE_S = 120.0, 30.0
"""Longest time in seconds that a tracker may take to start, which the run does not wait for, and to end."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is given of a run.

    Attributes:
        folder: RUN_DIR.
        project, name: what the run is called.
        config: the whole configuration, as nested dicts.
        id: the tracker's own name of the run; None if the tracker has yet to choose it.
        step: of the checkpoint resumed from; 0 for a new run.
    """

    folder: str
    project: str
    name: str
    config: dict[str, Any]
    id: str | None
    step: int


class Tracker(Protocol):
    """What takes the values of a run; every method may raise."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take the values by tag of a step; steps may repeat after a rollback or resume."""
        ...

    def close(self, failed: bool) -> None:
        """Write what is left, and mark the run as completed (or stopped to be resumed), or as failed."""
        ...


class TensorBoard:
    """Event files in RUN_DIR/tensorboard; what an earlier start wrote after the checkpoint is hidden."""

    def __init__(self, run: TrackedRun):
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(Path(run.folder) / "tensorboard"), purge_step=run.step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """See `Tracker`."""
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        self._board.close()


class Wandb:
    """A run of Weights & Biases, in RUN_DIR/wandb until it is uploaded; offline if there is no API key.

    W&B's own steps must increase, and a run repeats steps; so `step` is logged as a value, the axis of
    all others.

    Args:
        run: its id is set.
        say: takes a line for the run's console.
    """

    def __init__(self, run: TrackedRun, say: Callable[[str], None]):
        import wandb  # pyright: ignore[reportMissingImports]

        set_by_user = wandb.setup().settings.mode  # by WANDB_MODE, or in W&B's settings
        mode, why = None, f"W&B's mode is {set_by_user}"
        if set_by_user not in ("offline", "dryrun", "disabled") and not wandb.login(prompt=False):
            mode, why = "offline", "no API key: `wandb login`, or WANDB_API_KEY"
        # W&B's variables take precedence over what is only a default here.
        defaults = {"console": "off", "x_stats_pid": os.getppid()}
        settings = {key: value for key, value in defaults.items() if f"WANDB_{key.upper()}" not in os.environ}
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            config=run.config,
            dir=None if "WANDB_DIR" in os.environ else run.folder,
            mode=mode,
            settings=wandb.Settings(**settings),
        )
        self.id = self._run.id
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        if self._run.disabled:
            say(f"records nothing ({why})")
        elif self._run.offline:
            folder = Path(self._run.dir).parent
            say(f"offline in {folder} ({why}); to upload all of this run: wandb sync {folder.parent}")
        else:
            say(f"{self._run.url}")

    def log(self, step: int, values: dict[str, float]) -> None:
        """See `Tracker`."""
        self._run.log({"step": step, **values})

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of Trackio: in this machine's Trackio folder (TRACKIO_DIR), or where TRACKIO_SPACE_ID or _SERVER_URL says.

    Trackio resumes the newest run of a name. If another run folder of the same name has been tracked since, that is not
    this run, and a line says so.
    """

    def __init__(self, run: TrackedRun, say: Callable[[str], None]):
        import trackio  # pyright: ignore[reportMissingImports]

        resume = "allow" if run.id else "never"
        self._run = trackio.init(run.project, name=run.name, config=run.config, resume=resume, embed=False)
        self.id, self._finish = self._run.id, trackio.finish
        if run.id not in (None, self.id):
            say(f"warning: {run.name} is now another run in the project {run.project}, to which this one is appended")
        folder = trackio.TRACKIO_DIR  # pyright: ignore[reportPrivateImportUsage]
        say(self._run.url or f"in {folder}; to see it: trackio show --project {run.project}")

    def log(self, step: int, values: dict[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        self._finish()


IN_A_PROCESS: dict[str, Callable[[TrackedRun, Callable[[str], None]], Any]] = {"wandb": Wandb, "trackio": Trackio}
"""Trackers that run in a process of their own, by name."""


def check_trackers(config: Config) -> None:
    """Check that the packages of a run's trackers are installed.

    Raises:
        ConfigError: one is not.
    """
    for name in config.log.trackers:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without an origin: a folder of that name, such as W&B's own `wandb`
            what = f"elas[{name}]" if name in IN_A_PROCESS else name
            fix = f"pip install '{what}', or remove {name} from the list"
            raise ConfigError("log.trackers", config.log.trackers, f"the package {name} is not installed", fix)


class Trackers:
    """The trackers of a run. One that fails is reported in one line and not used again.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None] = print):
        self._say = say
        self._open: dict[str, Tracker] = {}

    def add(self, name: str, start: Callable[[], Tracker]) -> None:
        """Start a tracker."""
        try:
            self._open[name] = start()
        except Exception as error:
            self._failed(name, "at its start", error)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Hand the values by tag of a step to every tracker."""
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(step, values)
            except Exception as error:
                self._failed(name, f"at step {step}", error)

    def close(self, failed: bool) -> None:
        """Close every tracker; the second call does nothing."""
        for name, tracker in list(self._open.items()):
            try:
                tracker.close(failed)
            except Exception as error:
                self._failed(name, "at its end", error)
        self._open.clear()

    def _failed(self, name: str, when: str, error: Exception) -> None:
        self._open.pop(name, None)
        why = " ".join(f"{error}".split()) or type(error).__name__
        self._say(f"warning: {name} failed {when} and is switched off ({why}); metrics.jsonl has all values")


def open_trackers(config: Config, step: int, say: Callable[[str], None]) -> Trackers:
    """Start the trackers of a run; call it on rank 0 only.

    Args:
        config: of the run.
        step: of the checkpoint resumed from, whose tracked runs are continued; 0 begins new ones.
        say: prints a line.
    """
    trackers = Trackers(say)
    for name in config.log.trackers:
        trackers.add(name, partial(_start, name, config, step, say))
    return trackers


def _start(name: str, config: Config, step: int, say: Callable[[str], None]) -> Tracker:
    from elas.train.tracker_process import TrackerProcess

    folder = Path(config.train.run_dir).absolute()
    names = folder / "trackers" / "ids.json"

    def ids() -> dict[str, str]:
        return json.loads(names.read_text()) if names.exists() else {}

    def keep(own: str) -> None:
        write_json(names, ids() | {name: own})

    own = ids().get(name) if step else None
    if name == "wandb" and own is None:  # chosen here, so that it is kept before the first row
        own = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        keep(own)
    run = TrackedRun(str(folder), config.log.project, folder.name or "elas", config.to_dict(), own, step)
    if name not in IN_A_PROCESS:
        return TensorBoard(run)
    limit = CLOSE_S if config.train.timeout_seconds is None else min(CLOSE_S, config.train.timeout_seconds / 10)
    return TrackerProcess(name, run, say, keep, open_s=OPEN_S, close_s=limit)
