"""Run the tasks on datatrove's executors: local processes, SLURM or Ray.

Every executor marks a finished task with a file in `PREFIX.work/datatrove/completions`, so work started with one can be
finished with another.
"""

import contextlib
import ctypes
import importlib.util
import logging
import multiprocessing
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from pathlib import Path
from threading import Thread

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor, launch_slurm_job
from loguru import logger

from elas.data_prep import encoder, steps
from elas.data_prep.memory import peak_rss_mb
from elas.data_prep.plan import Plan, load_plan
from elas.errors import Failure, UserError
from elas.slurm import check_slurm

_PR_SET_PDEATHSIG = 1


def logging_folder(work: Path) -> Path:
    """datatrove's folder: completions, statistics and logs of the tasks."""
    return work / "datatrove"


def finished_tasks(work: Path) -> set[int]:
    """Numbers of the finished tasks."""
    folder = logging_folder(work) / "completions"
    return {int(path.name) for path in folder.iterdir()} if folder.is_dir() else set()


def check_executor(kind: str, partition: str | None = None) -> None:
    """Raise `UserError` unless the executor is available here."""
    if kind == "slurm":
        check_slurm("--executor slurm", "local", partition=partition, partition_option="--slurm-partition")
    if kind == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError("--executor ray: Ray is not installed; pip install 'elas[ray]', or use local")
    if kind == "ray":
        _check_ray_address(os.environ.get("RAY_ADDRESS"))


def _check_ray_address(address: str | None) -> None:
    """Raise `UserError` unless something listens at `RAY_ADDRESS`; Ray itself retries for minutes."""
    if address in (None, "auto", "local"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise UserError(f"RAY_ADDRESS={address}: not an address; give HOST:PORT, ray://HOST:PORT or auto")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(f"RAY_ADDRESS={address}: no connection ({error}); start Ray, or unset it") from None


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's local executor with forked workers, which import nothing again and die with this process.

    datatrove's own pool waits forever when a worker is killed; this one raises `Failure`.

    Args:
        work: the work folder.
        workers: processes; with 1, tasks run in this process.
        share: `(i, n)` runs only every n-th task, starting with task i.
    """

    def __init__(self, work: Path, workers: int, share: tuple[int, int] = (0, 1)):
        tasks = len(load_plan(work).tasks)
        super().__init__(steps.pipeline(work), tasks=tasks, workers=workers, logging_dir=str(logging_folder(work)))
        self.work, self.share = work, share
        self.peaks: dict[int, float] = {}
        """Peak resident memory in 10⁶ bytes of every worker, by process id."""

    def run(self, on_progress: Callable[[int, int], None] = lambda size, documents: None) -> None:
        """Run the unfinished tasks.

        Args:
            on_progress: called twice a second with bytes of text and documents so far.

        Raises:
            Failure: a worker was killed; finished tasks stay finished.
        """
        logger.disable("datatrove")
        first, step = self.share
        tasks = [task for task in self.get_incomplete_ranks() if task % step == first]
        try:
            if self.workers == 1 or len(tasks) < 2:
                self._run_here(tasks, on_progress)
            else:
                self._run_in_pool(tasks, on_progress)
        finally:
            logger.enable("datatrove")
            encoder.progress = None

    def run_task(self, task: int) -> tuple[int, float]:
        """Run one task on a copy of the pipeline; returns this process's id and peak memory in 10⁶ bytes."""
        executor = deepcopy(self)
        executor._run_for_rank(task, local_rank=1)
        return os.getpid(), peak_rss_mb()

    def _run_here(self, tasks: list[int], on_progress: Callable[[int, int], None]) -> None:
        encoder.progress = multiprocessing.get_context("fork").Array("q", 2)
        for task in tasks:
            pid, peak = self.run_task(task)
            self.peaks[pid] = peak
            on_progress(*encoder.progress)

    def _run_in_pool(self, tasks: list[int], on_progress: Callable[[int, int], None]) -> None:
        context = multiprocessing.get_context("fork")
        encoder.progress = context.Array("q", 2)
        steps.prepare(load_plan(self.work))  # before forking, so the workers share one tokenizer in memory
        pool = ProcessPoolExecutor(min(self.workers, len(tasks)), context, initializer=_start_worker)
        _Job.executor = self
        try:
            pending = {pool.submit(_Job.run, task) for task in tasks}
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    pid, peak = future.result()
                    self.peaks[pid] = max(peak, self.peaks.get(pid, 0.0))
                on_progress(*encoder.progress)
        except BrokenProcessPool as error:
            done = len(finished_tasks(self.work))
            why = f"a worker was killed, possibly out of memory; {done} of {self.tasks} tasks are done"
            raise Failure(f"{why}; run the same command again, with fewer --workers if memory is short") from error
        finally:
            _Job.executor = None
            if sys.exc_info()[0] is not None:  # the workers may be in the middle of tasks
                for process in list((pool._processes or {}).values()):  # kill_workers() is public from Python 3.14 on
                    process.kill()
            # Its thread must have ended before the interpreter does, which may otherwise write to a pipe that the
            # thread is just closing.
            pool.shutdown(wait=True, cancel_futures=True)


class _Job:
    """State that forked workers inherit."""

    executor: LocalExecutor | None = None

    @staticmethod
    def run(task: int) -> tuple[int, float]:
        assert _Job.executor is not None  # set before the workers are forked
        return _Job.executor.run_task(task)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C and ends the pool
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def slurm_executor(plan: Plan, options: dict) -> SlurmPipelineExecutor:
    """datatrove's SLURM executor: an array job of the unfinished tasks.

    Args:
        plan: the plan, saved in a folder on a file system shared by all nodes.
        options: `workers`, `partition`, `time`, `mem_gb`, `qos`, and `sbatch`: further sbatch options by name.
    """
    return SlurmPipelineExecutor(
        steps.pipeline(plan.work),
        tasks=len(plan.tasks),
        time=options["time"],
        partition=options["partition"],
        qos=options["qos"],
        mem_per_cpu_gb=options["mem_gb"],
        workers=options["workers"],
        job_name=f"prep-{Path(plan.outputs[0]).name}",
        logging_dir=str(logging_folder(plan.work)),
        env_command=f"export PATH={shlex.quote(os.path.dirname(sys.executable))}:$PATH",
        sbatch_args=options["sbatch"],
    )


def run_slurm(plan: Plan, options: dict) -> list[str]:
    """Submit the tasks and a dependent job that merges their results.

    Returns:
        The ids of both jobs, or only of the merge job if all tasks are done.

    Raises:
        UserError: sbatch refuses a job; its own message precedes on stderr.
    """
    logger.disable("datatrove")
    executor = slurm_executor(plan, options)
    executor.launch_merge_stats = lambda: None  # datatrove's extra job for a statistics table
    with _refused_by_sbatch():
        executor.launch_job()
    tasks = [] if executor.job_id in (None, -1) else [str(executor.job_id)]
    arguments = {
        "job-name": f"merge-{Path(plan.outputs[0]).name}",
        "partition": options["partition"],
        "time": options["time"],
        "mem-per-cpu": f"{options['mem_gb']}G",
        "output": str(logging_folder(plan.work) / "merge.log"),
        **({"qos": options["qos"]} if options["qos"] else {}),
        **options["sbatch"],
    }
    command = f"{shlex.quote(sys.executable)} -m elas.cli prep merge {shlex.quote(plan.outputs[0])}"
    script = executor.get_launch_file_contents(arguments, command)
    (plan.work / "merge.slurm").write_text(script)
    after = [f"--dependency=afterok:{tasks[0]}", "--kill-on-invalid-dep=yes"] if tasks else []
    with _refused_by_sbatch(*tasks):
        return [*tasks, str(launch_slurm_job(script, executor.job_id_retriever, *after))]


@contextlib.contextmanager
def _refused_by_sbatch(*queued: str) -> Iterator[None]:
    """Raise `UserError` if sbatch refuses a job; `queued`: ids of the jobs that it has accepted before."""
    try:
        yield
    except subprocess.CalledProcessError as error:
        left = "".join(f"; job {job} is queued: scancel {job}" for job in queued)
        fix = "correct the --slurm-… and --sbatch options"
        raise UserError(f"--executor slurm: sbatch refused the job (status {error.returncode}); {fix}{left}") from None


def run_ray(plan: Plan, workers: int, on_progress: Callable[[int], None]) -> None:
    """Run the unfinished tasks with Ray: on the cluster at `RAY_ADDRESS`, else on this machine.

    Args:
        plan: the plan, saved in a folder on a file system shared by all nodes.
        workers: parallel tasks.
        on_progress: called twice a second with the number of finished tasks.

    Raises:
        Failure: tasks failed; the message names a log.
    """
    import ray
    from datatrove.executor.ray import RayPipelineExecutor

    address = os.environ.get("RAY_ADDRESS")
    here = {} if address else {"num_cpus": workers, "include_dashboard": False}
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True, **here)
    logger.disable("datatrove")
    executor = RayPipelineExecutor(
        steps.pipeline(plan.work),
        tasks=len(plan.tasks),
        workers=workers,
        logging_dir=str(logging_folder(plan.work)),
        mem_per_cpu_gb=1,
    )
    try:
        thread = Thread(target=executor.run, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.5)
            on_progress(len(finished_tasks(plan.work)))
    finally:
        logger.enable("datatrove")
        ray.shutdown()
    missing = sorted(set(range(len(plan.tasks))) - finished_tasks(plan.work))
    if missing:
        log = logging_folder(plan.work) / "logs" / f"task_{missing[0]:05d}.log"
        raise Failure(f"{len(missing)} of {len(plan.tasks)} tasks failed; see {log}, and run the same command again")
