"""`elas launch local`: runs ranks on this machine with the deepspeed launcher or torchrun."""

import os
import shlex
import socket
import sys
from pathlib import Path

from elas.config.arguments import SettingsParser
from elas.console import Heartbeat
from elas.engine.deepspeed import check_deepspeed_json
from elas.errors import UserError
from elas.launch import pretrain
from elas.launch.dry_run import check_kernel
from elas.launch.guard.supervise import Supervisor
from elas.launch.job import Job, add_options, check_paths, markers, read_job, split_argv, whole_number
from elas.launch.verdict import conclude
from elas.run_dir import claim

LAUNCHERS = ("deepspeed", "torchrun")


def main(argv: list[str]) -> int:
    """Run `elas launch local`; returns as `elas.launch.verdict.conclude`, or raises `UserError` before any start."""
    settings, rest = split_argv(argv)
    parser = SettingsParser(
        "elas launch local",
        "Start a run on this machine. Settings as for elas train: --section.key VALUE.",
        "elas launch local --ranks 2 --config 60m --data.train data/c4 --train.run_dir runs/60m",
    )
    add_options(parser)
    parser.add_argument("--ranks", type=int, metavar="N", help="processes (default: one per GPU, else one)")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="deepspeed", help="default: %(default)s")
    parser.add_argument("--restarts", type=int, metavar="N", help="restart after a fault, up to N times (torchrun)")
    parser.add_argument("--master-port", type=int, metavar="P", help="rendezvous port (default: a free port)")
    parser.add_argument("--dry-run", action="store_true", help="print the command and exit")
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="one run per line, each with further settings")
    parser.add_argument("--parallel", type=int, metavar="N", help="with --sweep: runs at a time (default: 1)")
    options = parser.parse_args(rest)
    whole_number("--ranks", options.ranks)
    whole_number("--restarts", options.restarts, 0)
    whole_number("--master-port", options.master_port, 1, 65535)
    if options.restarts and options.launcher != "torchrun":
        raise UserError(
            f"--restarts {options.restarts}: the deepspeed launcher cannot restart ranks; add --launcher torchrun"
        )
    whole_number("--parallel", options.parallel)
    if options.sweep is not None:
        return _sweep(settings, options)
    if options.parallel is not None:
        raise UserError(f"--parallel {options.parallel}: only with --sweep FILE")
    with Heartbeat("checking the settings"):
        check_paths(settings, options)
        job = read_job(settings, options, options.ranks or _gpus() or 1)
        from elas.accelerator import check_gpus

        check_gpus(options.ranks or 1)
        check_deepspeed_json(job.config)
        check_kernel(job.config)
    port = options.master_port or free_port()
    if options.master_port and not port_is_free(options.master_port):
        raise UserError(f"--master-port {port}: the port is already in use; give another, or leave it out")
    command = command_of(job, options.launcher, port, options.restarts or 0)
    print(f"{'would run' if options.dry_run else 'running'}: {shlex.join(command)}", flush=True)
    if options.dry_run:
        return 0
    claim(job.config, starts=True).release()  # fail now if another run holds the folder or it is not writable
    return run(job, command, options.json)


def _sweep(settings: list[str], options) -> int:
    from elas.launch.job import shared_arguments
    from elas.launch.local_sweep import run_sweep
    from elas.launch.sweep import read_runs

    gpus, parallel = _gpus(), options.parallel or 1
    ranks = options.ranks or max(1, gpus // parallel)
    if options.master_port:
        raise UserError(
            f"--master-port {options.master_port}: not with --sweep, where each run takes a free port; leave it out"
        )
    if gpus and parallel > 1:  # the deepspeed launcher would give every run the same first GPUs
        raise UserError(f"--parallel {parallel}: runs would share this machine's {gpus} GPUs; give --parallel 1")
    with Heartbeat("checking the settings"):
        jobs = read_runs(options.sweep, [*shared_arguments(options), *settings], ranks)
    given = [f"--ranks={ranks}", f"--launcher={options.launcher}"]
    given += [f"--restarts={options.restarts}"] if options.restarts is not None else []
    if options.dry_run:
        for job in jobs:
            print(f"would run: {shlex.join(['elas', 'launch', 'local', *given, *job.arguments])}")
        return 0
    return run_sweep(jobs, given, parallel, options.json)


def run(job: Job, command: list[str], json_file=None) -> int:
    """Run a command from `command_of` until it ends; returns the exit status for `main`."""
    parts = {os.uname().nodename: range(job.world)}
    before = markers(job.run_dir)
    outcome = Supervisor(command, parts, None, environment(job.world), job.new_stop()).run()
    return conclude(job, outcome, parts, before, markers(job.run_dir), json_file, run_speaks=True)


def command_of(job: Job, launcher: str, port: int, restarts: int = 0) -> list[str]:
    """The launcher's command line."""
    return [*launcher_command(launcher, job.world, port, restarts), pretrain.__file__, *job.arguments]


def launcher_command(launcher: str, world: int, port: int, restarts: int = 0) -> list[str]:
    """The part of the command line before the file that the ranks run."""
    if launcher == "torchrun":
        where = [f"--nproc_per_node={world}", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"]
        start = [sys.executable, "-m", "torch.distributed.run", *where, "--local_addr=127.0.0.1"]
        start.append(f"--max_restarts={restarts}")
    else:
        where = [f"--num_gpus={world}", f"--master_port={port}", "--log_level=critical"]
        start = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={os.devnull}", *where]
    return start


def environment(ranks: int) -> dict[str, str]:
    """The environment of the ranks: this process's, with `OMP_NUM_THREADS` divided and Python's programs on PATH."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    # With torchrun's shared store, restarted ranks would find the keys of the previous start and hang.
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    # Without this, both processes of the deepspeed launcher warn that they found no accelerator.
    accelerator = {} if _gpus() else {"DS_ACCELERATOR": "cpu"}
    return {"OMP_NUM_THREADS": str(threads), **own_store, **accelerator, **os.environ, "PATH": path}


def free_port() -> int:
    """A TCP port that is free on this machine now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def port_is_free(port: int) -> bool:
    """Whether this process could listen on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
