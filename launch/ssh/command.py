"""`elas launch ssh`: ranks on the hosts of a hostfile, started by the deepspeed launcher over pdsh.

What the launcher does not do is done around it: variables and arguments arrive to the letter
(`elas.launch.ssh.variables`), a guard on every host ends its part with the whole (`elas.launch.guard.guard`), and a
failure names its host (`elas.launch.ssh.wrapper`, which stands on PATH before ssh). The launcher is never asked to end
anything: its own way is `pkill` on every host, of other jobs too.
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
from elas.launch.guard.supervise import Supervisor, control_folder, told
from elas.launch.hostfile import ranks_by_host, read_hostfile
from elas.launch.job import Job, add_options, input_files, markers, read_job, split_argv, whole_number
from elas.launch.ssh import variables
from elas.launch.ssh.remote import run_on
from elas.launch.verdict import conclude
from elas.run_dir import claim

UNSEEN_PORTS = range(20000, 40000)
"""Where ranks meet when nobody looks whether a port is free: one of these, by this process's number."""


def main(argv: list[str]) -> int:
    """Run `elas launch ssh`.

    Args:
        argv: arguments after the command.

    Returns:
        0 when the run came to its end, 2 for a mistake of the user's, 130 or 143 when it was asked to stop, else 1.

    Raises:
        UserError: a mistake that can be seen before anything starts.
    """
    settings, rest = split_argv(argv)
    options = _parser().parse_args(rest)
    whole_number("--master-port", options.master_port, 1, 65535)
    hosts = read_hostfile(options.hostfile)
    travelling = variables.travelling(options.env_file)
    variables.deepspeed_environment(travelling)  # what cannot be carried is told now
    job = read_job(settings, options, sum(hosts.values()), look_at_files=not options.no_check)
    for program in ("pdsh", "ssh"):
        if shutil.which(program) is None:
            raise UserError(
                f"elas launch ssh: there is no {program} on this machine; install it, or use elas launch slurm"
            )
    address, port = _meeting_point(hosts, job, travelling, options)
    parts = ranks_by_host(hosts)
    with ExitStack() as stack:
        folder = Path("LAUNCH_FOLDER") if options.dry_run else stack.enter_context(control_folder(parts))
        command = command_of(job, folder, address, port)
        print(f"{'would run' if options.dry_run else 'running'}: {shlex.join(command)}", flush=True)
        print(f"with {told(parts)}; they meet at {address}:{port}", flush=True)
        if options.dry_run:
            print(f"variables that travel: {', '.join(travelling) or 'none'}; LAUNCH_FOLDER is made at the start")
            return 0
        if job.run_dir.is_dir():
            claim(job.config).release()  # another run's, or not to be written to: told now
        return run(job, command, hosts, travelling, folder, options.json)


def _parser() -> Parser:
    parser = SettingsParser(
        "elas launch ssh",
        "Start a run on several hosts, over ssh. Settings as for elas train: --section.key VALUE.",
        "elas launch ssh --hostfile hosts --config 1b --data.train data/c4 --train.run_dir /shared/runs/1b",
    )
    add_options(parser)
    parser.add_argument("--hostfile", required=True, type=Path, metavar="FILE", help="lines `HOST slots=N`")
    parser.add_argument("--master-addr", metavar="A", help="where ranks meet (default: the first host's address)")
    parser.add_argument("--master-port", type=int, metavar="P", help="and the port (default: a free one)")
    parser.add_argument("--min-shm-gb", type=float, metavar="X", help="free /dev/shm (default: 66 MiB a rank)")
    parser.add_argument("--min-disk-gb", type=float, default=1.0, metavar="X", help="free for the run (default: 1)")
    parser.add_argument("--env-file", type=Path, action="append", default=[], metavar="FILE",
                        help="variables that travel: NAME, a pattern, or NAME=VALUE, a line each")  # fmt: skip
    parser.add_argument("--no-check", action="store_true", help="start without looking at the hosts and the files")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    return parser


def run(job: Job, command: list[str], hosts: dict[str, int], travelling: dict, folder: Path, json_file=None) -> int:
    """Run a command of `command_of` to its end; returns the exit status of `main`."""
    parts = ranks_by_host(hosts)
    (folder / "hostfile").write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()))
    (folder / "environment").write_text(variables.deepspeed_environment(travelling))
    first = next(iter(hosts))
    before = _markers(job, first)
    watched = Supervisor(command, parts, folder, environment(folder)).run()
    return conclude(job, watched, parts, before, _markers(job, first), json_file)


def command_of(job: Job, folder: Path, address: str, port: int) -> list[str]:
    """The deepspeed launcher's command line."""
    where = [f"--hostfile={folder / 'hostfile'}", f"--master_addr={address}", f"--master_port={port}"]
    how = ["--launcher=pdsh", "--force_multi", "--no_ssh_check", "--log_level=error"]
    arguments = [variables.deepspeed_argument(argument) for argument in job.arguments]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *where, *how, pretrain.__file__, *arguments]


def environment(folder: Path) -> dict[str, str]:
    """The launcher's environment, in which pdsh finds our ssh first."""
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
        "ELAS_SSH": shutil.which("ssh"),
    }


def _markers(job: Job, first: str) -> dict[str, str]:
    """The run's markers, as this machine sees them, or the first host where this one does not share the folder."""
    found = markers(job.run_dir)
    if found or job.run_dir.is_dir():
        return found
    folder = shlex.quote(os.path.abspath(job.run_dir))
    for name in ("DONE", "REQUEUE"):
        text = run_on(first, ["sh", "-c", f"cat {folder}/{name} 2>/dev/null"], timeout_s=20)
        if text:
            found[name] = text
    return found


def _meeting_point(hosts: dict[str, int], job: Job, travelling: dict[str, str], options) -> tuple[str, int]:
    """Where rank 0 listens, found by looking at all hosts unless that is not wanted.

    Raises:
        UserError: no address of the first host is known.
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
        way=Way("ssh", variables=travelling),
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
        raise Failure(f"not fit for the run: {hosts_named}; nothing was started (--no-check starts all the same)")
    if options.master_addr is not None:
        own = [address for interface in report.hosts[first]["interfaces"] for address in interface["addresses"]]
        if _address(options.master_addr) not in own:
            fix = f"give one of {', '.join(own)}, or leave it out"
            raise UserError(f"--master-addr {options.master_addr}: is no address of {first}, where rank 0 runs; {fix}")
    return options.master_addr or report.master_address, report.master_port


def _address(host: str) -> str:
    """The address of a host as this machine knows it."""
    try:
        found = socket.gethostbyname(host)
    except OSError as error:
        raise UserError(f"{host}: has no address here ({error.strerror}); mend its name") from None
    if found.startswith("127.") and host != "localhost":
        raise UserError(f"{host} is {found} on this machine, where no other host finds it; give --master-addr")
    return found
