"""Text to Megatron token files: plan → tasks, on an executor → merge.

Everything that is temporary lies in `PREFIX.work`. Whatever ends a run, the tasks that are done stay done: the same
command goes on from there, with any number of workers and any executor, and its files are the same to the last byte.
"""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from elas.data.token_files import read_manifest
from elas.data_prep.folders import folders_for
from elas.data_prep.held_out import held_out_share
from elas.data_prep.memory import peak_rss_mb
from elas.data_prep.options import Options, check_options, make_settings
from elas.data_prep.plan import Plan, load_plan, make_plan, saved_identity, work_folder
from elas.data_prep.sources import Corpus
from elas.errors import ConfigError, Failure, UserError

Tell = Callable[[int, int, int], None]
_DEFAULTS = Options()


def tokenize_corpus(
    corpus: Corpus,
    tokenizer_path: str | Path,
    output_prefix: str | Path,
    options: Options = _DEFAULTS,
    *,
    tell: Tell = lambda size, documents, tasks: None,
) -> dict:
    """Write `output_prefix.{bin,idx,manifest.json,skipped.jsonl}`, and token files of the held-out documents.

    Args:
        corpus: what to read.
        tokenizer_path: what `load_tokenizer` reads.
        output_prefix: path without ending; its folder is made when missing.
        options: see there.
        tell: called twice a second with bytes of text, documents and finished tasks so far; see `Progress`.

    Returns:
        `documents`, `tokens` and `bytes_in` (UTF-8) of `output_prefix`, the same with `valid_` before them, `skipped`
        and `skip_reasons`, `seconds`, `mb_per_s` (10⁶ bytes of text that came out, over the whole time of this call),
        `peak_rss_mb` and `peak_rss_worker_mb` (10⁶ bytes, sum and maximum of the peaks of all processes), `dtype`,
        `vocab_size`, `tokenizer_sha256`, `workers`, `tasks` and `tasks_done_before`; with a held-out side
        `held_out`, see `held_out_share`. Of results that are there already `already_done`, and nothing measured. With
        slurm `jobs` instead, with a share `tasks` and `tasks_done`.

    Raises:
        UserError: no document at all on one of the two sides, bad arguments, a tokenizer that cannot be read, inputs
            that changed since the work began, or another corpus at `output_prefix`.
        Failure: the disk is full, a worker was killed, or somebody else is at it.
    """
    start = time.perf_counter()
    from elas.data_prep.executors import check_executor

    prefixes = check_options(output_prefix, options)
    check_executor(options.executor, options.slurm.get("partition"))
    settings = make_settings(corpus, tokenizer_path, options)
    plan = make_plan(corpus, settings, prefixes, options.task_bytes, options.max_skipped)
    done = None if options.overwrite else _finished(plan)
    if done is not None:
        return done
    folders = {key: prefix.parent for key, prefix in zip(("--output", "--valid-output"), prefixes)}
    if options.share is not None:
        with folders_for(folders), _telling_of_full_disks(plan):
            return _do_share(plan, options, tell)
    with folders_for(folders), _work(plan, options.overwrite), _telling_of_full_disks(plan):
        for path in plan.work.glob("share-*.lock"):
            with _held(path):
                pass  # nobody is at that share
        from elas.data_prep.executors import finished_tasks

        before = len(finished_tasks(plan.work))
        if options.executor == "slurm":
            from elas.data_prep.executors import run_slurm

            return {"jobs": run_slurm(plan, options.slurm | {"workers": options.workers or -1}), "work": str(plan.work)}
        peaks = _run(plan, options, tell)
        facts = finish(plan)
    seconds = time.perf_counter() - start
    size = facts["bytes_in"] + facts.get("valid_bytes_in", 0)
    return facts | {
        "workers": options.workers or _cores(),
        "tasks": len(plan.tasks),
        "tasks_done_before": before,
        "seconds": round(seconds, 3),
        "mb_per_s": round(size / 1e6 / seconds, 3),
        "peak_rss_mb": round(sum(peaks.values()), 1),
        "peak_rss_worker_mb": round(max(peaks.values()), 1),
    }


def finish(plan: Plan) -> dict:
    """Merge the parts of a plan whose tasks are all done, and remove the work folder.

    Returns:
        What `merge` says.

    Raises:
        Failure: tasks are missing.
        UserError: there is nothing to write; the work folder goes too.
    """
    from elas.data_prep.merge import merge
    from elas.data_prep.unread import TooMuchUnread

    try:
        facts = merge(plan)
    except TooMuchUnread:
        raise  # the same command with another bound goes on with what is done
    except UserError:
        shutil.rmtree(plan.work, ignore_errors=True)
        raise
    shutil.rmtree(plan.work, ignore_errors=True)
    return facts


def merge_work(output_prefix: str | Path) -> dict:
    """`finish` what lies in `output_prefix.work`: the last job of a tokenisation under SLURM."""
    work = work_folder(Path(output_prefix).absolute())
    if not work.exists() and read_manifest(str(output_prefix)):
        raise UserError(f"{output_prefix}: already there and complete; nothing to do")
    plan = load_plan(work)
    with _telling_of_full_disks(plan):
        return finish(plan)


def _do_share(plan: Plan, options: Options, tell: Tell) -> dict:
    """Do the tasks of `options.share`, beside others that do the other shares."""
    from elas.data_prep.executors import LocalExecutor, finished_tasks

    first, step = options.share
    with _work(plan, overwrite=False, patience=60):
        pass  # the plan is there now
    with _held(plan.work / f"share-{first}-of-{step}.lock"):
        executor = LocalExecutor(plan.work, options.workers or _cores(), options.share)
        executor.run(lambda size, documents: tell(size, documents, len(finished_tasks(plan.work))))
    return {"tasks": len(range(first, len(plan.tasks), step)), "tasks_done": len(finished_tasks(plan.work))}


def _run(plan: Plan, options: Options, tell: Tell) -> dict[int, float]:
    """Run what is not done; returns the peak memory of every process in 10⁶ bytes."""
    from elas.data_prep.executors import LocalExecutor, finished_tasks, run_ray

    workers = options.workers or _cores()
    if options.executor == "ray":
        run_ray(plan, workers, lambda tasks: tell(0, 0, tasks))
        return {os.getpid(): peak_rss_mb()}
    executor = LocalExecutor(plan.work, workers)
    executor.run(lambda size, documents: tell(size, documents, len(finished_tasks(plan.work))))
    return executor.peaks | {os.getpid(): peak_rss_mb()}


def _finished(plan: Plan) -> dict | None:
    """Facts of the same plan's results, where they lie already; an error where another's do."""
    manifests = [read_manifest(prefix) for prefix in plan.outputs]
    there = [prefix for prefix in plan.outputs if Path(f"{prefix}.bin").exists() or Path(f"{prefix}.idx").exists()]
    begun = saved_identity(plan.work)
    if begun is not None or not there:
        return None
    if not all(manifest.get("plan") == plan.identity for manifest in manifests):
        why = "holds another corpus, or one from other inputs or settings"
        raise ConfigError("--output", there[0], why, "give --overwrite to replace it, or another prefix")
    for manifest, prefix in zip(manifests, plan.outputs):
        for name, said in manifest.get("files", {}).items():
            file = Path(f"{prefix}{Path(name).suffix}")  # a corpus that was renamed keeps the old names inside
            if not file.is_file() or file.stat().st_size != said["bytes"]:
                why = f"{file.name} is missing or cut short"
                raise ConfigError("--output", prefix, why, "give --overwrite to make it again, or another prefix")
    shutil.rmtree(plan.work, ignore_errors=True)  # ended in the middle of removing it
    facts = {key: manifests[0][key] for key in ("skipped", "skip_reasons", "dtype", "vocab_size", "tokenizer_sha256")}
    for manifest, prefix in zip(manifests, ("", "valid_")):
        facts |= {prefix + key: manifest[key] for key in ("documents", "tokens", "bytes_in")}
    facts["loss"] = {key: n for key, n in manifests[0]["loss"].items() if key != "example"}
    return facts | held_out_share(facts, plan.settings.valid_fraction) | {"already_done": True}


@contextlib.contextmanager
def _work(plan: Plan, overwrite: bool, patience: float = 0) -> Iterator[None]:
    """The work folder with the plan in it, held by this process alone; shares of it may be in the hands of others."""
    plan.work.mkdir(parents=True, exist_ok=True)
    with _held(plan.work / "lock", patience):
        begun = saved_identity(plan.work)
        if overwrite:
            _clear(plan)
        elif begun is not None and begun != plan.identity:
            changed = ", ".join(key for key in plan.identity if begun.get(key) != plan.identity[key])
            why = f"work was begun here with other {changed}"
            raise ConfigError("--output", plan.outputs[0], why, "give --overwrite to start afresh, or another prefix")
        plan.save()
        yield


@contextlib.contextmanager
def _held(path: Path, patience: float = 0) -> Iterator[None]:
    """A lock file, held by this process alone."""
    try:
        lock = FileLock(path).acquire(timeout=patience)
    except Timeout:
        raise Failure(f"{path.parent}: another process is at this work; wait for it") from None
    with lock:
        yield


def _clear(plan: Plan) -> None:
    """Forget what was done; finished files stay until they are replaced."""
    for path in plan.work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


@contextlib.contextmanager
def _telling_of_full_disks(plan: Plan) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        why = f"no space left on the disk ({plan.work}); what is done so far is kept"
        raise Failure(f"{why}: make room and run the same command again") from error


def _cores() -> int:
    return len(os.sched_getaffinity(0))
