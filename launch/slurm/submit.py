"""`elas launch slurm`: checks the settings and submits `launch/slurm/pretrain.sbatch`."""

import os
import re
import shlex
import subprocess
import sys
from importlib import resources
from pathlib import Path

from elas.command import Parser
from elas.config.arguments import SettingsParser
from elas.errors import UserError
from elas.files import write_json
from elas.launch.job import Job, add_options, read_arguments, shared_arguments, split_argv, whole_number
from elas.launch.slurm import follow
from elas.launch.sweep import VARIABLE, read_runs
from elas.slurm import check_slurm

SIGNAL_S = 120
"""Default of `--signal-seconds`: seconds before the time limit at which SLURM sends SIGUSR1, as in the script."""


def main(argv: list[str]) -> int:
    """Run `elas launch slurm`.

    Args:
        argv: arguments after the command.

    Returns:
        0 if the job was submitted, or with `--wait` if its run completed; 130 if waiting was interrupted, 2 for a user
        error, else 1.

    Raises:
        UserError: an error found before anything is submitted.
    """
    settings, rest = split_argv(_glued(argv))
    options = _parser().parse_args(rest)
    _check(options)
    jobs = _jobs(settings, options)
    command, variables = command_of(settings, options, len(jobs))
    print(f"{'would run' if options.dry_run else 'running'}: {shell_line(command, variables)}", flush=True)
    if options.dry_run:
        return 0
    what = "elas launch slurm"
    wanted = {"partition": options.partition, "partition_option": "--partition", "nodes": options.nodes}
    check_slurm(what, "elas launch ssh", **wanted)
    submitted = follow.Submitted(_submit(command, variables), jobs, is_array=options.sweep is not None)
    print("\n".join(submitted.lines()), flush=True)
    facts = {"job": submitted.number, "log": submitted.log(), "command": command}
    facts["runs"] = [{"run_dir": str(job.run_dir), "world_size": job.world} for job in jobs]
    write_json(options.json, facts)
    if not options.wait:
        return 0
    try:
        status, facts["runs"] = follow.wait(submitted)
    except KeyboardInterrupt:
        print(f"\n{submitted.still_there()}", file=sys.stderr)
        return 130
    write_json(options.json, facts)
    return status


def _glued(argv: list[str]) -> list[str]:
    """Turn `--sbatch --qos=low` into `--sbatch=--qos=low`; argparse would parse the value as an option."""
    if "--sbatch" not in argv[:-1]:
        return argv
    i = argv.index("--sbatch")
    return [*argv[:i], f"--sbatch={argv[i + 1]}", *_glued(argv[i + 2 :])]


def _parser() -> Parser:
    parser = SettingsParser(
        "elas launch slurm",
        "Submit a run to SLURM. It saves before its time limit and when it is preempted, requeues itself, and resumes. "
        "Settings as for elas train: --section.key VALUE.",
        "elas launch slurm --nodes 4 --gpus-per-node 8 --time 12:00:00 --config 1b --data.train data/c4 "
        "--train.run_dir runs/1b --wait",
    )
    add_options(parser)
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes (default: 1)")
    each = parser.add_mutually_exclusive_group()
    each.add_argument("--gpus-per-node", metavar="G", help="GPUs per node, one rank each: 8, or a100:8")
    each.add_argument("--ranks-per-node", type=int, metavar="R", help="ranks per node without GPUs (default: 1)")
    parser.add_argument("--cpus-per-task", type=int, metavar="C", help="CPUs per node, shared by all its ranks")
    parser.add_argument("--time", metavar="T", help="time limit of one start: 90 (minutes), 12:00:00, 1-0 (days-hours)")
    parser.add_argument("--partition", metavar="P", help="partition (default: the cluster's)")
    parser.add_argument("--account", metavar="A", help="account to charge")
    parser.add_argument(
        "--signal-seconds",
        type=int,
        metavar="S",
        help=f"seconds before the time limit to save (default: {SIGNAL_S})",
    )
    parser.add_argument("--max-requeues", type=int, metavar="M", help="restart at most this many times (default: 20)")
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="one run per line, each with further settings")
    parser.add_argument("--sbatch", metavar="OPTIONS", default="", help="more options of sbatch: '--qos=low --mem=0'")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch command and exit")
    parser.add_argument("--wait", action="store_true", help="follow the job's log to its end, and report the outcome")
    return parser


def _check(options) -> None:
    whole_number("--nodes", options.nodes)
    whole_number("--ranks-per-node", options.ranks_per_node)
    whole_number("--cpus-per-task", options.cpus_per_task)
    whole_number("--signal-seconds", options.signal_seconds, 1, 65535)
    whole_number("--max-requeues", options.max_requeues, 0)
    if options.gpus_per_node is not None and not re.fullmatch(r"([\w.-]+:)?[1-9]\d*", options.gpus_per_node):
        raise UserError(f"--gpus-per-node {options.gpus_per_node}: is not a number of GPUs; give 8, or TYPE:8")
    try:
        options.sbatch = shlex.split(options.sbatch)
    except ValueError as error:
        raise UserError(f"--sbatch {options.sbatch!r}: {error}; fix the quotes") from None
    seconds = time_limit(options.time) if options.time else None
    before = options.signal_seconds or SIGNAL_S
    if seconds is not None and 0 < seconds <= before:
        why = f"the job would be asked to save {before} s before the limit, so at its start"
        fix = f"give more time, or set --signal-seconds below {seconds}"
        raise UserError(f"--time {options.time}: {why}; {fix}")


def time_limit(text: str) -> int:
    """Convert a time limit in sbatch's formats to seconds: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S.

    Returns:
        The seconds; 0 for no limit.

    Raises:
        UserError: the text has none of these formats.
    """
    if text.lower() in ("unlimited", "infinite"):
        return 0
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise UserError(f"--time {text}: is not a time limit; give minutes, H:M:S, or D-H:M:S")
    days, *parts = (int(part) if part else 0 for part in match.groups())
    first, second, third = parts
    if match[1] is None and match[4] is None:  # M or M:S
        return 60 * first + second
    return 86400 * days + 3600 * first + 60 * second + third


def _ranks_per_node(options) -> int:
    return int(options.gpus_per_node.split(":")[-1]) if options.gpus_per_node else options.ranks_per_node or 1


def _jobs(settings: list[str], options) -> list[Job]:
    """The checked runs: one, or one per line of a sweep."""
    world = options.nodes * _ranks_per_node(options)
    given = [*shared_arguments(options), *settings]
    if options.sweep is None:
        return [read_arguments(given, world)]
    return read_runs(options.sweep, given, world)


def command_of(settings: list[str], options, runs: int) -> tuple[list[str], dict[str, str]]:
    """The sbatch command line, and the environment variables to set for it.

    Args:
        settings: `--section.key=VALUE`.
        options: parsed options of this command.
        runs: number of lines of the sweep; used only with `--sweep`.
    """
    variables = {"ELAS_PYTHON": sys.executable}
    if options.max_requeues is not None:
        variables["ELAS_MAX_REQUEUES"] = str(options.max_requeues)
    if options.ranks_per_node is not None:
        variables["ELAS_RANKS_PER_NODE"] = str(options.ranks_per_node)
    given = [f"--nodes={options.nodes}", "--export=ALL"]
    for name in ("gpus_per_node", "cpus_per_task", "time", "partition", "account"):
        value = getattr(options, name)
        given += [f"--{name.replace('_', '-')}={value}"] if value is not None else []
    if options.signal_seconds is not None:
        given.append(f"--signal=B:USR1@{options.signal_seconds}")
    if options.sweep is not None:
        variables[VARIABLE] = str(options.sweep.absolute())
        given += [f"--array=0-{runs - 1}", "--output=elas-%A_%a.out"]
    script = str(resources.files("elas.launch") / "slurm" / "pretrain.sbatch")
    return ["sbatch", "--parsable", *given, *options.sbatch, script, *shared_arguments(options), *settings], variables


def shell_line(command: list[str], variables: dict[str, str]) -> str:
    """A command and its variables as a shell command line."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(command)])


def _submit(command: list[str], variables: dict[str, str]) -> str:
    """Submit the job; returns its ID."""
    # Drop variables of the caller's shell that would change the job without appearing in the printed command.
    unset = {"ELAS_RANKS_PER_NODE", "ELAS_MAX_REQUEUES", VARIABLE} - variables.keys()
    environment = {name: value for name, value in os.environ.items() if name not in unset} | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        why = said.removeprefix("sbatch: error: ").removeprefix("Batch job submission failed: ")
        raise UserError(f"sbatch rejected the job: {why}; fix the options, see sbatch --help")
    return done.stdout.strip().split(";")[0]
