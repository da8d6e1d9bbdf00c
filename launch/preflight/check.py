"""`elas launch check`: checks whether hosts are fit for a run, before one is started.

All hosts are queried at once (`elas.launch.preflight.survey`). If there is no failure, all ranks connect and time
collectives (`elas.launch.preflight.bandwidth`). A table shows one line per host, and each failure names its fix.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from elas.command import Parser
from elas.config import load_config, split_overrides
from elas.config.arguments import SettingsParser
from elas.console import LiveLine, table
from elas.errors import UserError
from elas.files import write_json
from elas.launch.hostfile import read_hostfile
from elas.launch.job import add_host_options, input_files, split_argv, whole_number
from elas.launch.preflight.bandwidth import measure
from elas.launch.preflight.channels import Way
from elas.launch.preflight.compare import GIB
from elas.launch.preflight.survey import FAILED, NOTED, PASSED, Report, lines, preflight
from elas.launch.ssh import variables
from elas.slurm import check_slurm


def main(argv: list[str]) -> int:
    """Run `elas launch check`.

    Args:
        argv: arguments after the command.

    Returns:
        0 if the hosts are fit, else 1.

    Raises:
        UserError: the options are invalid.
    """
    settings, rest = split_argv(argv)
    options = _parser().parse_args(rest)
    _check(options)
    if options.slurm and "SLURM_JOB_ID" not in os.environ:
        _enter_allocation(options, argv)
    hosts, way = _hosts(options)
    run_dir, files = _run(settings, options)
    progress = LiveLine()
    report = preflight(
        hosts,
        way=way,
        master_port=options.master_port,
        run_dir=run_dir,
        files=files,
        min_shm_gb=options.min_shm_gb,
        min_disk_gb=options.min_disk_gb,
        progress=progress,
    )
    if report.ok and not options.no_collectives:
        report.bandwidth, problem = measure(hosts, *report.rendezvous, way=way, progress=progress)
        report.problems += [problem] if problem else []
    progress.clear()
    print(show(report))
    write_json(options.json, report.to_dict())
    return 0 if report.ok else 1


def _parser() -> Parser:
    about = (
        "Check whether hosts are fit for a run: those of a hostfile over ssh, SLURM's with --slurm, else this machine. "
        "With settings as for elas train, the run's folder and data are checked on every host as well."
    )
    example = "elas launch check --hostfile hosts --config 1b --data.train data/c4 --train.run_dir /shared/runs/1b"
    parser = SettingsParser("elas launch check", about, example)
    parser.add_argument("--config", metavar="FILE", help="YAML file, or a preset's name")
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="lines `HOST slots=N`")
    parser.add_argument("--slurm", action="store_true", help="SLURM nodes: of this allocation, or of a new one")
    parser.add_argument(
        "--nodes", type=int, metavar="N", help="with --slurm: number of nodes (default: the allocation's)"
    )
    parser.add_argument("--partition", metavar="P", help="with --slurm: partition to take nodes from")
    parser.add_argument(
        "--wait", type=int, default=600, metavar="S", help="with --slurm: longest wait for nodes (default: 600 s)"
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks per host, without a hostfile (default: 1)")
    parser.add_argument("--master-port", type=int, metavar="P", help="rendezvous port (default: a free port)")
    add_host_options(parser)
    parser.add_argument("--no-collectives", action="store_true", help="query the hosts only; takes a second or two")
    return parser


def _check(options) -> None:
    """Raise `UserError` for options that are out of range or contradict each other."""
    if options.hostfile and options.slurm:
        raise UserError("--hostfile and --slurm: both select the hosts; give only one")
    if options.ranks is not None and options.hostfile:
        raise UserError(f"--ranks {options.ranks}: the hostfile sets the number of ranks (slots=); leave it out")
    for name in ("nodes", "partition"):
        if getattr(options, name) is not None and not options.slurm:
            raise UserError(f"--{name} {getattr(options, name)}: requires --slurm; add --slurm, or leave it out")
    for name in ("nodes", "ranks", "wait"):
        if getattr(options, name) is not None:
            whole_number(f"--{name}", getattr(options, name))
    if options.master_port is not None:
        whole_number("--master-port", options.master_port, 1, 65535)
    for name in ("min_shm_gb", "min_disk_gb"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < 1e6:
            raise UserError(f"--{name.replace('_', '-')} {value}: is not a size; give GiB, at least 0")


def _enter_allocation(options, argv: list[str]) -> None:
    """Run this command again in a new allocation; does not return."""
    if shutil.which("salloc") is None:
        raise UserError("--slurm: salloc is not installed on this machine; run this on a login node")
    wanted = {"partition": options.partition, "partition_option": "--partition", "nodes": options.nodes or 1}
    check_slurm("--slurm", "a hostfile", **wanted)
    size = [
        f"--nodes={options.nodes or 1}",
        f"--ntasks-per-node={options.ranks or 1}",
        "--time=10",
        f"--immediate={options.wait}",
    ]
    where = [f"--partition={options.partition}"] if options.partition else []
    again = [sys.executable, "-m", "elas.cli", "launch", "check", *argv]
    print(f"waiting for nodes from SLURM, at most {options.wait} s …", file=sys.stderr, flush=True)
    os.execvp("salloc", ["salloc", "--quiet", "--job-name=elas-check", *size, *where, *again])


def _hosts(options) -> tuple[dict[str, int], Way]:
    """Number of ranks by host, and how hosts are reached."""
    if options.hostfile:
        return read_hostfile(options.hostfile), Way("ssh", variables=variables.forwarded(options.env_file))
    ranks = options.ranks or 1
    if not options.slurm:
        return {os.uname().nodename: ranks}, Way("here")
    given = os.environ["SLURM_JOB_NODELIST"]
    names = subprocess.run(["scontrol", "show", "hostnames", given], capture_output=True, text=True).stdout.split()
    if not names:
        raise UserError(f"SLURM_JOB_NODELIST={given}: scontrol returns no hosts for it; run this in a running job")
    if options.nodes and options.nodes > len(names):
        raise UserError(f"--nodes {options.nodes}: this allocation has {len(names)} ({given}); ask SLURM for more")
    names = names[: options.nodes]
    return dict.fromkeys(names, ranks), Way("srun", options=("--overlap", f"--nodelist={','.join(names)}"))


def _run(settings: list[str], options) -> tuple[Path | None, tuple[str, ...]]:
    """The run's folder and input files; None and no files without settings."""
    if not settings and not options.config:
        return None, ()
    config = load_config(options.config, split_overrides(settings)[0])
    return Path(config.train.run_dir), input_files(config)


_COLUMNS = [
    ("ranks", ("slots",), lambda f: f["slots"]),
    ("address", ("network", "reachable"), lambda f: f["address"]),
    ("interface", ("interface", "hostname"), lambda f: f["interface"]),
    ("python", ("python", "folder"), lambda f: f["python"]),
    ("torch", ("torch",), lambda f: f["versions"]["torch"]),
    ("deepspeed", ("deepspeed", "megatron-core"), lambda f: f["versions"]["deepspeed"]),
    ("elas", ("elas", "source", "build lock", "compiler"), lambda f: f["source"][:7]),
    ("port", ("port",), lambda f: f["master_port"]),
    ("shm free", ("shared memory",), lambda f: f"{f['shm_free'] / GIB:.1f} GiB"),
    ("disk free", ("disk", "run_dir", "data"), lambda f: f["run_dir"] and f"{f['run_dir']['free'] / GIB:.0f} GiB"),
    ("processors", ("gpus", "driver", "nvidia-smi"), lambda f: _processors(f)),
    ("clock", ("clock",), lambda f: f"{abs(f['clock_offset']):.1f} s off"),
]


def _processors(facts: dict) -> str:
    gpus = facts["gpus"]
    return f"{len(gpus)}× {gpus[0].removeprefix('NVIDIA ')}" if gpus else f"{facts['cpus']} CPUs"


def show(report: Report) -> str:
    """Format the report as text."""
    rows = []
    for number, (host, slots) in enumerate(report.slots.items()):
        bad = {problem.check for problem in report.failures if problem.host == host}
        noted = {problem.check for problem in report.warnings if problem.host == host}
        row = [host, FAILED if bad else NOTED if noted else PASSED]
        for _, checks, pick in _COLUMNS:
            facts = report.hosts.get(host)
            port = report.master_port if number == 0 else None
            value = None if facts is None else pick({**facts, "slots": slots, "master_port": port})
            mark = FAILED if bad & set(checks) else NOTED if noted & set(checks) else ""
            row.append(f"{'–' if value is None else value} {mark}".strip())
        rows.append(row)
    parts = [table(["host", "fit", *(name for name, _, _ in _COLUMNS)], rows, left=2)]
    parts += ["", *lines(report.problems)] if report.problems else []
    parts += ["", _bandwidth(report.bandwidth)] if report.bandwidth else []
    return "\n".join([*parts, "", _verdict(report)])


def _bandwidth(found: dict) -> str:
    rows = [
        [row["operation"], f"{row['bytes'] / 1024:,.0f}", f"{row['median_s'] * 1e3:.2f}", f"{row['gb_per_s']:.3f}"]
        for row in found["rows"]
    ]
    over = found["interface"] or "this host's memory"
    title = f"collectives of {found['world']} ranks, {found['backend']} over {over}; all values correct"
    return f"{title}\n{table(['operation', 'KiB', 'ms', 'GB/s'], rows)}"


def _verdict(report: Report) -> str:
    hosts, ranks, failures = len(report.slots), sum(report.slots.values()), len(report.failures)
    size = f"{hosts} host{'s' * (hosts > 1)}, {ranks} rank{'s' * (ranks > 1)}"
    if report.ok:
        return f"fit: {size}; rendezvous at {report.master_address}:{report.master_port}"
    return f"not fit: {failures} failure{'s' * (failures > 1)} on {size}"
