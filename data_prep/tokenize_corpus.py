"""Tokenise text into Megatron token files: plan → tasks on an executor → merge.

Temporary files are in `PREFIX.work`. However a run ends, finished tasks are kept: the same command resumes with any
number of workers and any executor, and produces byte-identical files.
"""

import contextlib
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
from elas.files import FULL

OnProgress = Callable[[int, int, int], None]
_DEFAULTS = Options()


def tokenize_corpus(
    corpus: Corpus,
    tokenizer_path: str | Path,
    output_prefix: str | Path,
    options: Options = _DEFAULTS,
    *,
    on_progress: OnProgress = lambda size, documents, tasks: None,
) -> dict:
    """Write `output_prefix.{bin,idx,manifest.json,skipped.jsonl}`, and token files of the held-out documents.

    Args:
        corpus: the inputs.
        tokenizer_path: argument of `load_tokenizer`.
        output_prefix: path without extension; its folder is created if missing.
        options: how to tokenise.
        on_progress: called twice a second with bytes of text, documents and finished tasks so far; see `Progress`.

    Returns:
        `documents`, `tokens` and `bytes_in` (UTF-8) of `output_prefix`, and with prefix `valid_` of the held-out side;
        `skipped`, `skip_reasons`, `seconds`, `mb_per_s` (10⁶ bytes of written text per second of this call),
        `peak_rss_mb` and `peak_rss_worker_mb` (10⁶ bytes, sum and maximum of the peaks of all processes), `dtype`,
        `vocab_size`, `tokenizer_sha256`, `workers`, `tasks`, `tasks_done_before`, and with a held-out side `held_out`
        (see `held_out_share`). If the results are already complete: `already_done`, and no measurements. With slurm
        only `jobs` and `work`; with a share only `tasks` and `tasks_done`.

    Raises:
        UserError: no documents on one of the two sides, bad arguments, an unreadable tokenizer, inputs that changed
            since the work began, or another corpus at `output_prefix`.
        Failure: the disk is full, a worker was killed, or another process holds the lock.
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
    with folders_for(folders), _report_full_disk(plan):
        if options.share is not None:
            return _do_share(plan, options, options.share, on_progress)
        with _work(plan, options.overwrite):
            return _do_all(plan, options, on_progress, start)


def finish(plan: Plan) -> dict:
    """Merge the parts of a plan whose tasks are all finished, and remove the work folder.

    Returns:
        The facts of `merge`.

    Raises:
        Failure: tasks are missing.
        UserError: there is nothing to write; the work folder is removed.
        TooMuchUnread: too much could not be read; the work folder is kept.
    """
    from elas.data_prep.merge import merge
    from elas.data_prep.unread import TooMuchUnread

    try:
        facts = merge(plan)
    except TooMuchUnread:
        raise  # keep the work folder: the same command with a higher --max-skipped reuses it
    except UserError:
        shutil.rmtree(plan.work, ignore_errors=True)
        raise
    shutil.rmtree(plan.work, ignore_errors=True)
    return facts


def merge_work(output_prefix: str | Path) -> dict:
    """`finish` the work in `output_prefix.work`: the last job of a tokenisation under SLURM."""
    work = work_folder(Path(output_prefix).absolute())
    if not work.exists() and read_manifest(str(output_prefix)):
        raise UserError(f"{output_prefix}: already complete; nothing to do")
    plan = load_plan(work)
    with _report_full_disk(plan):
        return finish(plan)


def _do_all(plan: Plan, options: Options, on_progress: OnProgress, start: float) -> dict:
    """Run the unfinished tasks and merge, or submit jobs that do; `start`: when this call began (`perf_counter`)."""
    from elas.data_prep.executors import finished_tasks, run_slurm

    for path in plan.work.glob("share-*.lock"):
        with _lock(path):
            pass  # fails if a process is still working on that share
    before = len(finished_tasks(plan.work))
    if options.executor == "slurm":
        return {"jobs": run_slurm(plan, options.slurm | {"workers": options.workers or -1}), "work": str(plan.work)}
    peaks = _run(plan, options, on_progress)
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


def _do_share(plan: Plan, options: Options, share: tuple[int, int], on_progress: OnProgress) -> dict:
    """Run the tasks of one share; other processes may run other shares at the same time."""
    from elas.data_prep.executors import LocalExecutor, finished_tasks

    first, step = share
    with _work(plan, overwrite=False, timeout=60):
        pass  # writes the plan; the other shares need the lock for the same
    with _lock(plan.work / f"share-{first}-of-{step}.lock"):
        executor = LocalExecutor(plan.work, options.workers or _cores(), share)
        executor.run(lambda size, documents: on_progress(size, documents, len(finished_tasks(plan.work))))
    return {"tasks": len(range(first, len(plan.tasks), step)), "tasks_done": len(finished_tasks(plan.work))}


def _run(plan: Plan, options: Options, on_progress: OnProgress) -> dict[int, float]:
    """Run the unfinished tasks; returns the peak memory of every process in 10⁶ bytes, by process id."""
    from elas.data_prep.executors import LocalExecutor, finished_tasks, run_ray

    workers = options.workers or _cores()
    if options.executor == "ray":
        run_ray(plan, workers, lambda tasks: on_progress(0, 0, tasks))
        return {os.getpid(): peak_rss_mb()}
    executor = LocalExecutor(plan.work, workers)
    executor.run(lambda size, documents: on_progress(size, documents, len(finished_tasks(plan.work))))
    return executor.peaks | {os.getpid(): peak_rss_mb()}


def _finished(plan: Plan) -> dict | None:
    """Facts of complete results of the same plan, else None; raises `ConfigError` for results of another plan."""
    manifests = [read_manifest(prefix) for prefix in plan.outputs]
    existing = [prefix for prefix in plan.outputs if Path(f"{prefix}.bin").exists() or Path(f"{prefix}.idx").exists()]
    begun = saved_identity(plan.work)
    if begun is not None or not existing:
        return None
    if not all(manifest.get("plan") == plan.identity for manifest in manifests):
        why = "holds another corpus, or one from other inputs or settings"
        raise ConfigError("--output", existing[0], why, "give --overwrite to replace it, or another prefix")
    for manifest, prefix in zip(manifests, plan.outputs):
        for name, recorded in manifest.get("files", {}).items():
            file = Path(f"{prefix}{Path(name).suffix}")  # the manifest of a renamed corpus keeps the old names
            if not file.is_file() or file.stat().st_size != recorded["bytes"]:
                why = f"{file.name} is missing or truncated"
                raise ConfigError("--output", prefix, why, "give --overwrite to write it again, or another prefix")
    shutil.rmtree(plan.work, ignore_errors=True)  # an earlier run may have died while removing it
    facts = {key: manifests[0][key] for key in ("skipped", "skip_reasons", "dtype", "vocab_size", "tokenizer_sha256")}
    for manifest, prefix in zip(manifests, ("", "valid_")):
        facts |= {prefix + key: manifest[key] for key in ("documents", "tokens", "bytes_in")}
    facts["loss"] = {key: n for key, n in manifests[0]["loss"].items() if key != "example"}
    return facts | held_out_share(facts, plan.settings.valid_fraction) | {"already_done": True}


@contextlib.contextmanager
def _work(plan: Plan, overwrite: bool, timeout: float = 0) -> Iterator[None]:
    """Lock the work folder and write the plan into it; other processes may still hold the locks of shares."""
    plan.work.mkdir(parents=True, exist_ok=True)
    with _lock(plan.work / "lock", timeout):
        begun = saved_identity(plan.work)
        if overwrite:
            _clear(plan)
        elif begun is not None and begun != plan.identity:
            changed = ", ".join(key for key in plan.identity if begun.get(key) != plan.identity[key])
            why = f"unfinished work here has other {changed}"
            raise ConfigError("--output", plan.outputs[0], why, "give --overwrite to start over, or another prefix")
        plan.save()
        yield


@contextlib.contextmanager
def _lock(path: Path, timeout: float = 0) -> Iterator[None]:
    """Hold an exclusive lock file; raises `Failure` after `timeout` seconds."""
    try:
        lock = FileLock(path).acquire(timeout=timeout)
    except Timeout:
        raise Failure(f"{path.parent}: another process is working here; wait for it to finish") from None
    with lock:
        yield


def _clear(plan: Plan) -> None:
    """Remove all earlier work; finished token files stay until they are replaced."""
    for path in plan.work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


@contextlib.contextmanager
def _report_full_disk(plan: Plan) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        why = f"no space left on the disk ({plan.work}), finished tasks are kept"
        raise Failure(f"{why}; free some space and run the same command again") from error


def _cores() -> int:
    return len(os.sched_getaffinity(0))
