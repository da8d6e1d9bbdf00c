"""Where the tasks run: datatrove's executors, each with what it needs here.

A task that is done has a file in `PREFIX.work/datatrove/completions`, whoever ran it: work begun on one machine can be
finished under SLURM, and the other way round.
"""

import ctypes
import importlib.util
import multiprocessing
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from pathlib import Path
from threading import Thread

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from loguru import logger

from elas.data_prep import encoder, steps
from elas.data_prep.memory import peak_rss_mb
from elas.data_prep.plan import Plan, load_plan
from elas.errors import Failure, UserError
from elas.slurm import check_slurm

_PR_SET_PDEATHSIG = 1


def logging_folder(work: Path) -> Path:
    """datatrove's own folder: completions, statistics and logs of the tasks."""
    return work / "datatrove"


def finished_tasks(work: Path) -> set[int]:
    """Numbers of the tasks that are done."""
    folder = logging_folder(work) / "completions"
    return {int(path.name) for path in folder.iterdir()} if folder.is_dir() else set()


def check_executor(kind: str, partition: str | None = None) -> None:
    """Raise `UserError` unless what the executor needs is here."""
    if kind == "slurm":
        check_slurm("--executor slurm", "local", partition=partition, partition_option="--slurm-partition")
    if kind == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError("--executor ray: Ray is not installed; pip install 'elas[ray]', or use local")
    if kind == "ray":
        _check_ray_address(os.environ.get("RAY_ADDRESS"))


def _check_ray_address(address: str | None) -> None:
    """Raise `UserError` unless something listens where `RAY_ADDRESS` says; Ray itself tries for minutes."""
    if address in (None, "auto", "local"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise UserError(f"RAY_ADDRESS={address}: no address; give HOST:PORT, ray://HOST:PORT or auto")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(f"RAY_ADDRESS={address}: nothing answers there ({error}); start Ray, or unset it") from None


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's, with processes that are forked (nothing to import again), and end when this one does.

    Its own pool waits for ever when a worker is killed; this one says so.

    Args:
        work: the work folder.
        workers: processes; 1 for none but this one.
        share: `(i, n)` for every n-th task only, beginning with task i.
    """

    def __init__(self, work: Path, workers: int, share: tuple[int, int] = (0, 1)):
        tasks = len(load_plan(work).tasks)
        super().__init__(steps.pipeline(work), tasks=tasks, workers=workers, logging_dir=str(logging_folder(work)))
        self.share = share
        self.peaks: dict[int, float] = {}
        """Peak resident memory in 10⁶ bytes of every process that worked."""

    def run(self, tell: Callable[[int, int], None] = lambda size, documents: None) -> None:
        """Run what is not done.

        Args:
            tell: called twice a second with bytes of text and documents so far.

        Raises:
            Failure: a worker was killed; what is done stays done.
        """
        logger.disable("datatrove")
        first, step = self.share
        tasks = [task for task in self.get_incomplete_ranks() if task % step == first]
        try:
            if self.workers == 1 or len(tasks) < 2:
                self._run_here(tasks, tell)
            else:
                self._run_in_pool(tasks, tell)
        finally:
            logger.enable("datatrove")
            encoder.progress = None

    def run_task(self, task: int) -> tuple[int, float]:
        """Run one task on a copy of the pipeline; returns this process's id and its peak memory."""
        executor = deepcopy(self)
        executor._run_for_rank(task, local_rank=1)
        return os.getpid(), peak_rss_mb()

    def _run_here(self, tasks: list[int], tell: Callable[[int, int], None]) -> None:
        encoder.progress = multiprocessing.get_context("fork").Array("q", 2)
        for task in tasks:
            pid, peak = self.run_task(task)
            self.peaks[pid] = peak
            tell(*encoder.progress)

    def _run_in_pool(self, tasks: list[int], tell: Callable[[int, int], None]) -> None:
        context = multiprocessing.get_context("fork")
        encoder.progress = context.Array("q", 2)
        steps.prepare(load_plan(self.pipeline[0].work))  # before forking: one tokenizer in memory, shared
        pool = ProcessPoolExecutor(min(self.workers, len(tasks)), context, initializer=_start_worker)
        _Job.executor = self
        try:
            pending = {pool.submit(_Job.run, task) for task in tasks}
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    pid, peak = future.result()
                    self.peaks[pid] = max(peak, self.peaks.get(pid, 0.0))
                tell(*encoder.progress)
        except BrokenProcessPool as error:
            done = len(finished_tasks(Path(self.pipeline[0].work)))
            why = f"a worker was killed, for want of memory perhaps; {done} of {self.tasks} tasks are done"
            raise Failure(f"{why}; run the same command again, with fewer --workers if memory is short") from error
        finally:
            _Job.executor = None
            processes = list((pool._processes or {}).values())  # public only from Python 3.14 on: kill_workers
            failed = sys.exc_info()[0] is not None
            pool.shutdown(wait=not failed, cancel_futures=True)
            for process in processes if failed else ():  # in the middle of tasks that nobody waits for
                process.kill()
                process.join()


class _Job:
    """What workers inherit by being forked."""

    executor: LocalExecutor | None = None

    @staticmethod
    def run(task: int) -> tuple[int, float]:
        return _Job.executor.run_task(task)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the calling process ends the pool
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def slurm_executor(plan: Plan, options: dict) -> PipelineExecutor:
    """datatrove's for SLURM: an array job of the tasks that are not done.

    Args:
        plan: the plan, saved in a folder that all nodes see.
        options: `workers`, `partition`, `time`, `mem_gb`, `qos`, and `sbatch`: further options of sbatch, by name.
    """
    from datatrove.executor.slurm import SlurmPipelineExecutor

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
        mail_user=None,
    )


def run_slurm(plan: Plan, options: dict) -> list[str]:
    """Submit the tasks, and a job after them that puts the results together.

    Returns:
        The ids of the two jobs, or of the last alone where all tasks are done.
    """
    from datatrove.executor.slurm import launch_slurm_job

    logger.disable("datatrove")
    executor = slurm_executor(plan, options)
    executor.launch_merge_stats = lambda: None  # a job of its own for a table nobody reads
    executor.launch_job()
    tasks = [] if executor.job_id in (None, -1) else [str(executor.job_id)]
    arguments = {
        "job-name": f"merge-{Path(plan.outputs[0]).name}",
        "partition": options["partition"],
        "qos": options["qos"],
        "time": options["time"],
        "mem-per-cpu": f"{options['mem_gb']}G",
        "output": str(logging_folder(plan.work) / "merge.log"),
        **options["sbatch"],
    }
    command = f"{shlex.quote(sys.executable)} -m elas.cli prep merge {shlex.quote(plan.outputs[0])}"
    script = executor.get_launch_file_contents({k: v for k, v in arguments.items() if v}, command)
    (plan.work / "merge.slurm").write_text(script)
    after = [f"--dependency=afterok:{tasks[0]}", "--kill-on-invalid-dep=yes"] if tasks else []
    return [*tasks, str(launch_slurm_job(script, executor.job_id_retriever, *after))]


def run_ray(plan: Plan, workers: int, tell: Callable[[int], None]) -> None:
    """Run what is not done with Ray: on the cluster that `RAY_ADDRESS` names, else on this machine.

    Args:
        plan: the plan, saved in a folder that all nodes see.
        workers: tasks at a time.
        tell: called twice a second with the number of tasks that are done.

    Raises:
        Failure: tasks failed; their logs say why.
    """
    import ray
    from datatrove.executor.ray import RayPipelineExecutor

    address = os.environ.get("RAY_ADDRESS")
    here = {} if address else {"num_cpus": workers, "include_dashboard": False}
    ray.init(address=address, log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True, **here)
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
            tell(len(finished_tasks(plan.work)))
    finally:
        logger.enable("datatrove")
        ray.shutdown()
    missing = sorted(set(range(len(plan.tasks))) - finished_tasks(plan.work))
    if missing:
        log = logging_folder(plan.work) / "logs" / f"task_{missing[0]:05d}.log"
        raise Failure(f"{len(missing)} of {len(plan.tasks)} tasks failed; see {log}, and run the same command again")
