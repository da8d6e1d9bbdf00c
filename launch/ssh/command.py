"""`elas launch ssh`: ranks on the hosts of a hostfile, started by the deepspeed launcher over pdsh.

This adds what the launcher lacks: variables and arguments arrive unchanged (`elas.launch.ssh.variables`), a guard on
every host ends its part when the job ends (`elas.launch.guard.guard`), and a failure names its host
(`elas.launch.ssh.wrapper`, which precedes ssh on PATH). The launcher is never asked to end a job: it would use `pkill`
on every host, which also kills other jobs.
"""

import os
import shlex
import shutil
import socket
import sys
from contextlib import ExitStack
from importlib import resources
from pathlib import Path

from elas.command import Parser
from elas.config.arguments import SettingsParser
from elas.console import LiveLine
from elas.errors import Failure, UserError
from elas.launch import pretrain
from elas.launch.guard.supervise import Supervisor, control_folder, label
from elas.launch.hostfile import ranks_by_host, read_hostfile
from elas.launch.job import Job, add_host_options, add_options, input_files, markers, read_job, split_argv, whole_number
from elas.launch.ssh import variables
from elas.launch.ssh.remote import run_on
from elas.launch.verdict import conclude
from elas.run_dir import claim

UNSEEN_PORTS = range(20000, 40000)
"""Rendezvous ports used without a check that they are free (`--no-check`), chosen by this process's ID."""


def main(argv: list[str]) -> int:
    """Run `elas launch ssh`; returns as `elas.launch.verdict.conclude`, or raises `UserError` before any start."""
    settings, rest = split_argv(argv)
    options = _parser().parse_args(rest)
    whole_number("--master-port", options.master_port, 1, 65535)
    hosts = read_hostfile(options.hostfile)
    forwarded = variables.forwarded(options.env_file)
    variables.deepspeed_environment(forwarded)  # raises now if a value cannot be forwarded
    job = read_job(settings, options, sum(hosts.values()), look_at_files=not options.no_check)
    for program in ("pdsh", "ssh"):
        _installed(program)
    address, port = _rendezvous(hosts, job, forwarded, options)
    parts = ranks_by_host(hosts)
    with ExitStack() as stack:
        folder = Path("LAUNCH_FOLDER") if options.dry_run else stack.enter_context(control_folder(parts))
        command = command_of(job, folder, address, port)
        print(f"{'would run' if options.dry_run else 'running'}: {shlex.join(command)}", flush=True)
        print(f"with {label(parts)}; rendezvous at {address}:{port}", flush=True)
        if options.dry_run:
            print(f"forwarded variables: {', '.join(forwarded) or 'none'}; LAUNCH_FOLDER is created at the start")
            return 0
        if job.run_dir.is_dir():
            claim(job.config, starts=True).release()  # fail now if another run holds the folder or it is not writable
        return run(job, command, hosts, forwarded, folder, options.json)


def _parser() -> Parser:
    parser = SettingsParser(
        "elas launch ssh",
        "Start a run on several hosts, over ssh. Settings as for elas train: --section.key VALUE.",
        "elas launch ssh --hostfile hosts --config 1b --data.train data/c4 --train.run_dir /shared/runs/1b",
    )
    add_options(parser)
    parser.add_argument("--hostfile", required=True, type=Path, metavar="FILE", help="lines `HOST slots=N`")
    parser.add_argument("--master-addr", metavar="A", help="rendezvous address (default: the first host's)")
    parser.add_argument("--master-port", type=int, metavar="P", help="rendezvous port (default: a free port)")
    add_host_options(parser)
    parser.add_argument("--no-check", action="store_true", help="start without checking the hosts and the files")
    parser.add_argument("--dry-run", action="store_true", help="print the command and exit")
    return parser


def run(job: Job, command: list[str], hosts: dict[str, int], forwarded: dict, folder: Path, json_file=None) -> int:
    """Run a command from `command_of` until it ends; returns the exit status for `main`."""
    parts = ranks_by_host(hosts)
    (folder / "hostfile").write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()))
    (folder / "environment").write_text(variables.deepspeed_environment(forwarded))
    first = next(iter(hosts))
    before = _markers(job, first)
    outcome = Supervisor(command, parts, folder, environment(folder), job.new_stop()).run()
    return conclude(job, outcome, parts, before, _markers(job, first), json_file)


def command_of(job: Job, folder: Path, address: str, port: int) -> list[str]:
    """The deepspeed launcher's command line."""
    where = [f"--hostfile={folder / 'hostfile'}", f"--master_addr={address}", f"--master_port={port}"]
    how = ["--launcher=pdsh", "--force_multi", "--no_ssh_check", "--log_level=critical"]
    arguments = [variables.deepspeed_argument(argument) for argument in job.arguments]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *where, *how, pretrain.__file__, *arguments]


def environment(folder: Path) -> dict[str, str]:
    """The launcher's environment; `folder/bin` with our `ssh` comes first on its PATH, so pdsh calls that."""
    wrapper = folder / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_bytes((resources.files("elas.launch") / "ssh" / "ssh").read_bytes())
    wrapper.chmod(0o700)
    path = os.pathsep.join([str(wrapper.parent), os.path.dirname(sys.executable), os.environ["PATH"]])
    return {
        **os.environ,
        "PATH": path,
        "PDSH_SSH_ARGS": "--user %u --host %h --node %n",
        "DS_ENV_FILE": str(folder / "environment"),
        "ELAS_LAUNCH_DIR": str(folder),
        "ELAS_LAUNCHER": str(os.getpid()),
        "ELAS_PYTHON": sys.executable,
        "ELAS_SSH": _installed("ssh"),
    }


def _installed(program: str) -> str:
    """The path of a program; raises `UserError` if it is not installed."""
    path = shutil.which(program)
    if path is None:
        fix = "install it, or use elas launch slurm"
        raise UserError(f"elas launch ssh: {program} is not installed on this machine; {fix}")
    return path


def _markers(job: Job, first: str) -> dict[str, str]:
    """The run's markers, read on this machine, or over ssh on the first host if this machine lacks the folder."""
    found = markers(job.run_dir)
    if found or job.run_dir.is_dir():
        return found
    folder = shlex.quote(os.path.abspath(job.run_dir))
    for name in ("DONE", "REQUEUE"):
        text = run_on(first, ["sh", "-c", f"cat {folder}/{name} 2>/dev/null"], timeout_s=20)
        if text:
            found[name] = text
    return found


def _rendezvous(hosts: dict[str, int], job: Job, forwarded: dict[str, str], options) -> tuple[str, int]:
    """Check all hosts, unless disabled, and choose the rendezvous address and port on the first one.

    Raises:
        UserError: the first host has no usable address.
        Failure: a host is not fit for the run.
    """
    first = next(iter(hosts))
    if options.no_check or options.dry_run:
        port = options.master_port or UNSEEN_PORTS[os.getpid() % len(UNSEEN_PORTS)]
        return options.master_addr or _address(first), port
    from elas.launch.preflight.channels import Way
    from elas.launch.preflight.survey import lines, preflight

    progress = LiveLine()
    report = preflight(
        hosts,
        way=Way("ssh", variables=forwarded),
        master_port=options.master_port,
        run_dir=job.run_dir,
        files=input_files(job.config),
        min_shm_gb=options.min_shm_gb,
        min_disk_gb=options.min_disk_gb,
        progress=progress,
    )
    progress.clear()
    for line in lines(report.problems):
        print(line, file=sys.stderr, flush=True)
    if not report.ok:
        hosts_named = ", ".join(dict.fromkeys(problem.host for problem in report.failures))
        raise Failure(f"not fit for the run: {hosts_named}; nothing was started (--no-check starts anyway)")
    if options.master_addr is not None:
        own = [address for interface in report.hosts[first]["interfaces"] for address in interface["addresses"]]
        if _address(options.master_addr) not in own:
            fix = f"give one of {', '.join(own)}, or leave it out"
            why = f"is not an address of {first}, where rank 0 runs"
            raise UserError(f"--master-addr {options.master_addr}: {why}; {fix}")
    address, port = report.rendezvous
    return options.master_addr or address, port


def _address(host: str) -> str:
    """The IPv4 address that a host name resolves to on this machine.

    Raises:
        UserError: it does not resolve, or resolves to loopback.
    """
    try:
        found = socket.gethostbyname(host)
    except OSError as error:
        raise UserError(f"{host}: does not resolve on this machine ({error.strerror}); fix its name") from None
    if found.startswith("127.") and host != "localhost":
        raise UserError(f"{host} is {found} on this machine, which other hosts cannot reach; give --master-addr")
    return found
