"""Saves checkpoints, synchronously or in the background; one is complete once all ranks have written their part."""

import shutil
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from elas.checkpoint import selfcheck, state, storage
from elas.checkpoint.folder import Checkpoint, file_facts, newer_than, prune, put_in_place
from elas.checkpoint.tensors import PartOfTensor
from elas.config import CheckpointConfig
from elas.console import Console
from elas.engine.engine import Engine
from elas.errors import Failure
from elas.files import system_error


class Saver:
    """Writes the checkpoints of a run; every rank has one and must call its methods at the same steps.

    With `checkpoint.async_save`, `save` copies this rank's part and returns while a thread writes it; `finish`
    completes the checkpoint once all ranks are `ready`. Only one checkpoint is written at a time.

    Args:
        settings: `checkpoint.*`.
        folder: the run's checkpoints.
        engine: the engine whose state is saved.
        facts: entries of every manifest, from `elas.checkpoint.identity.manifest_facts`.
        resumed: the checkpoint that the run resumed from; newer ones were skipped and never count for `keep`.

    Attributes:
        blocked_s: seconds that the last `save` blocked training.
        last: folder of the last complete checkpoint.
        last_step: the step that it holds.
    """

    def __init__(
        self, settings: CheckpointConfig, folder: Path, engine: Engine, facts: dict, resumed: Checkpoint | None = None
    ):
        self.settings, self.folder, self.engine, self.facts = settings, folder, engine, facts
        self.blocked_s = 0.0
        self.last = resumed.path if resumed else None
        self.last_step = resumed.step if resumed else 0
        self._left_alone = newer_than(folder, resumed.step) if resumed else set()
        self._plan: storage.Plan | None = None
        self._copies: storage.Tensors | None = None
        self._writing: _Writing | None = None

    @property
    def ready(self) -> bool:
        """Whether this rank has written its part of the checkpoint in progress."""
        return self._writing is not None and self._writing.done

    @property
    def under_way(self) -> bool:
        """Whether a checkpoint is in progress; the same on every rank."""
        return self._writing is not None

    @property
    def copy_bytes(self) -> int:
        """Bytes of host memory that asynchronous saves keep allocated."""
        tensors = (self._copies or {}).values()
        return sum(
            sum(part.nbytes for part in t.parts.values()) if isinstance(t, PartOfTensor) else t.nbytes for t in tensors
        )

    def save(self, step: int, tokens: int, facts: dict | None = None) -> None:
        """Save the state after `step`; first waits for the previous checkpoint if that is still being written.

        Args:
            step: optimizer steps taken.
            tokens: tokens trained on.
            facts: further entries of the manifest, such as `consumed_samples`.

        Raises:
            Failure: it could not be written, or the fp32 masters differ from the model's weights; raised on every rank.
                Earlier checkpoints are kept.
        """
        start = time.perf_counter()
        self.finish()
        target = self.folder / f"step_{step:08d}"
        self._check(target)
        partial = target.with_name(target.name + ".partial")
        manifest = self._manifest(step, tokens, facts or {})
        self._begin(partial)
        tensors = state.capture(self.engine) | {state.random_name(): state.capture_random()}
        if self._plan is None:
            self._plan = storage.make_plan(tensors)
        if self.settings.async_save:
            tensors = self._copy(tensors)
        sample = selfcheck.Sample(self.engine, step) if dist.get_rank() == 0 else None
        self._writing = _Writing(partial, target, manifest, self._plan, tensors, sample)
        if self.settings.async_save:
            self._writing.start()
        else:
            self._writing.run()
            self.finish()
        self.blocked_s = time.perf_counter() - start

    def finish(self) -> Path | None:
        """Wait for the checkpoint in progress and complete it; every rank must call it.

        Returns:
            Its folder; None if none was in progress.

        Raises:
            Failure: a rank could not write; raised on every rank.
        """
        if self._writing is None:
            return None
        writing, self._writing = self._writing, None
        results = writing.wait()
        gathered: list = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (results, writing.problem))
        problems = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(gathered) if problem]
        problem = [None]
        if dist.get_rank() == 0:
            problem = ["; ".join(problems) or self._put_in_place(writing, [results for results, _ in gathered])]
        dist.broadcast_object_list(problem, src=0)
        if problem[0]:
            raise Failure(f"checkpoint {writing.target.name} could not be written ({problem[0]}); {self._kept()}")
        self.last, self.last_step = writing.target, writing.manifest["step"]
        return writing.target

    def _kept(self) -> str:
        return f"the last intact one is {self.last}" if self.last else "there is none before it"

    def _check(self, target: Path) -> None:
        """Raise `Failure` on every rank if the fp32 masters differ from the model's weights on any of them."""
        wrong: list = [None] * dist.get_world_size()
        dist.all_gather_object(wrong, selfcheck.scrambled_weight(self.engine))
        for rank, name in enumerate(wrong):
            if name:
                what = f"the optimizer's fp32 copy of {name} on rank {rank} differs from the model's weight"
                raise Failure(f"checkpoint {target.name} was not written: {what}; {self._kept()}")

    def _put_in_place(self, writing: "_Writing", results: list) -> str | None:
        """Write the index and the manifest and rename the folder; returns the problem, or None."""
        files = {name: facts for of_rank, _ in results for name, facts in of_rank.items()}
        try:
            storage.write_index(writing.partial, writing.plan, [written for _, written in results])
            files[storage.INDEX] = file_facts(writing.partial / storage.INDEX)
            for name, facts in files.items():
                if not (writing.partial / name).is_file():
                    return f"rank 0 does not see {name}: train.run_dir must lie on a file system that all hosts share"
                if (writing.partial / name).stat().st_size != facts["bytes"]:
                    return f"{name} is truncated"
            assert writing.sample is not None  # on rank 0
            if difference := writing.sample.difference(writing.partial):
                return f"rank 0: {difference}"
            put_in_place(writing.partial, writing.target, writing.manifest | {"files": files})
        except OSError as error:
            return f"rank 0: {error.strerror or error}"
        try:
            self._left_alone.discard(writing.target.name)
            prune(writing.target, self.settings.keep, self.settings.keep_every, self._left_alone)
        except OSError as error:  # not an error of the save: the new checkpoint is complete
            Console("err").say(f"warning: an old checkpoint could not be removed ({error})")
        return None

    def _begin(self, partial: Path) -> None:
        """Create the folder on rank 0; an error there is raised on every rank."""
        problem = [None]
        if dist.get_rank() == 0:
            try:
                for stale in partial.parent.glob("*.partial"):
                    shutil.rmtree(stale)
                partial.mkdir(parents=True)
            except OSError as error:
                problem = [f"{partial} cannot be created ({error.strerror})"]
        dist.broadcast_object_list(problem, src=0)
        if problem[0]:
            raise Failure(problem[0])

    def _manifest(self, step: int, tokens: int, facts: dict) -> dict:
        return {
            "step": step,
            "tokens": tokens,
            "optimizer_step": state.step_count(self.engine),
            **facts,
            "layout": state.layout_facts(self.engine),
            **self.facts,
        }

    def _copy(self, tensors: storage.Tensors) -> storage.Tensors:
        """Copy the tensors to host memory, which stays allocated for the next save."""
        if self._copies is None:
            self._copies = {
                name: tensor.copied() if isinstance(tensor, PartOfTensor) else tensor.clone()
                for name, tensor in tensors.items()
            }
            return self._copies
        for name, tensor in tensors.items():
            copy = self._copies[name]
            if isinstance(tensor, PartOfTensor):
                assert isinstance(copy, PartOfTensor)
                for offsets, part in tensor.parts.items():
                    copy.parts[offsets].copy_(part, non_blocking=True)
            else:
                copy.copy_(tensor)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return self._copies


def _why(error: BaseException) -> str:
    """The system's message of an underlying `OSError`, which torch's writer wraps; else the error itself."""
    if (system := system_error(error)) is not None and system.strerror:
        return system.strerror
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class _Writing:
    """One rank's part of a checkpoint in progress."""

    def __init__(
        self,
        partial: Path,
        target: Path,
        manifest: dict,
        plan: storage.Plan,
        tensors: storage.Tensors,
        sample: selfcheck.Sample | None,
    ):
        self.partial, self.target, self.manifest, self.sample = partial, target, manifest, sample
        self.problem: str | None = None
        self.plan, self._tensors = plan, tensors
        self._results: tuple[dict, list] = ({}, [])
        self._thread = threading.Thread(target=self.run, name="checkpoint", daemon=True)
        self._started = False

    def start(self) -> None:
        """Write in a background thread."""
        self._started = True
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def run(self) -> None:
        """Write this rank's part, and record every file's size and checksum."""
        try:
            written = storage.write(self.partial, self.plan, self._tensors)
            names = sorted({result.storage_data.relative_path for result in written})
            self._results = {name: file_facts(self.partial / name) for name in names}, written
        except Exception as error:  # in a thread; `Saver.finish` raises it on every rank
            self.problem = _why(error)
        self._tensors = {}

    def wait(self) -> tuple[dict, list]:
        """Wait until it is written; returns the facts of the files, and DCP's results."""
        if self._started:
            self._thread.join()
        return self._results
