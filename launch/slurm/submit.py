"""`elas launch slurm`: a job of `launch/slurm/pretrain.sbatch`, its settings checked before it is submitted."""

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
"""Seconds before the time limit at which the script asks for SIGUSR1."""


def main(argv: list[str]) -> int:
    """Run `elas launch slurm`.

    Args:
        argv: arguments after the command.

    Returns:
        0 when the job was submitted, or with `--wait` when its run came to its end; 130 when waiting was interrupted,
        2 for a mistake of the user's, else 1.

    Raises:
        UserError: a mistake that can be seen before anything is submitted.
    """
    settings, rest = split_argv(_glued(argv))
    options = _parser().parse_args(rest)
    _check(options)
    jobs = _jobs(settings, options)
    command, variables = command_of(settings, options, len(jobs))
    print(f"{'would run' if options.dry_run else 'running'}: {told(command, variables)}", flush=True)
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
    """`--sbatch --qos=low` as `--sbatch=--qos=low`: argparse would take the value for an option."""
    if "--sbatch" not in argv[:-1]:
        return argv
    i = argv.index("--sbatch")
    return [*argv[:i], f"--sbatch={argv[i + 1]}", *_glued(argv[i + 2 :])]


def _parser() -> Parser:
    parser = SettingsParser(
        "elas launch slurm",
        "Submit a run to SLURM. It saves before its time limit and when it is preempted, queues itself again, and goes "
        "on. Settings as for elas train: --section.key VALUE.",
        "elas launch slurm --nodes 4 --gpus-per-node 8 --time 12:00:00 --config 1b --data.train data/c4 "
        "--train.run_dir runs/1b --wait",
    )
    add_options(parser)
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (default: 1)")
    each = parser.add_mutually_exclusive_group()
    each.add_argument("--gpus-per-node", metavar="G", help="GPUs of each node, and as many ranks: 8, or a100:8")
    each.add_argument("--ranks-per-node", type=int, metavar="R", help="ranks on each node, without GPUs (default: 1)")
    parser.add_argument("--cpus-per-task", type=int, metavar="C", help="CPUs on each node, for all ranks there")
    parser.add_argument("--time", metavar="T", help="time limit of one start: 90 (minutes), 12:00:00, 1-0 (days-hours)")
    parser.add_argument("--partition", metavar="P", help="where to run (default: the cluster's)")
    parser.add_argument("--account", metavar="A", help="who pays")
    parser.add_argument(
        "--signal-seconds", type=int, metavar="S", help=f"save so long before the time limit (default: {SIGNAL_S})"
    )
    parser.add_argument("--max-requeues", type=int, metavar="M", help="start again so often at most (default: 20)")
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="a run for each line, which holds further settings")
    parser.add_argument("--sbatch", metavar="OPTIONS", default="", help="more options of sbatch: '--qos=low --mem=0'")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and stop")
    parser.add_argument("--wait", action="store_true", help="follow the job's log to its end, and judge the run")
    return parser


def _check(options) -> None:
    whole_number("--nodes", options.nodes)
    whole_number("--ranks-per-node", options.ranks_per_node)
    whole_number("--cpus-per-task", options.cpus_per_task)
    whole_number("--signal-seconds", options.signal_seconds, 1, 65535)
    whole_number("--max-requeues", options.max_requeues, 0)
    if options.gpus_per_node is not None and not re.fullmatch(r"([\w.-]+:)?[1-9]\d*", options.gpus_per_node):
        raise UserError(f"--gpus-per-node {options.gpus_per_node}: is no number of GPUs; give 8, or TYPE:8")
    try:
        options.sbatch = shlex.split(options.sbatch)
    except ValueError as error:
        raise UserError(f"--sbatch {options.sbatch!r}: {error}; mend the quotes") from None
    seconds = time_limit(options.time) if options.time else None
    before = options.signal_seconds or SIGNAL_S
    if seconds is not None and 0 < seconds <= before:
        fix = f"give more time, or fewer than {seconds} --signal-seconds"
        raise UserError(f"--time {options.time}: the job would be asked to save {before} s before, so at once; {fix}")


def time_limit(text: str) -> int:
    """Seconds of a time limit as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S.

    Returns:
        The seconds; 0 for no limit.

    Raises:
        UserError: another form.
    """
    if text.lower() in ("unlimited", "infinite"):
        return 0
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise UserError(f"--time {text}: is no time; give minutes, H:M:S, or D-H:M:S")
    days, *parts = (int(part) if part else 0 for part in match.groups())
    first, second, third = parts
    if match[1] is None and match[4] is None:  # M or M:S
        return 60 * first + second
    return 86400 * days + 3600 * first + 60 * second + third


def _ranks_per_node(options) -> int:
    return int(options.gpus_per_node.split(":")[-1]) if options.gpus_per_node else options.ranks_per_node or 1


def _jobs(settings: list[str], options) -> list[Job]:
    """The runs, checked: one, or one for each line of a sweep."""
    world = options.nodes * _ranks_per_node(options)
    given = [*shared_arguments(options), *settings]
    if options.sweep is None:
        return [read_arguments(given, world)]
    return read_runs(options.sweep, given, world)


def command_of(settings: list[str], options, runs: int) -> tuple[list[str], dict[str, str]]:
    """The sbatch command line, and the variables that it is to pass on.

    Args:
        settings: `--section.key=VALUE`.
        options: of this command.
        runs: lines of the sweep, where there is one.
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


def told(command: list[str], variables: dict[str, str]) -> str:
    """A command and its variables, as one would type them."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(command)])


def _submit(command: list[str], variables: dict[str, str]) -> str:
    """Submit; returns the job's number."""
    unset = {"ELAS_RANKS_PER_NODE", "ELAS_MAX_REQUEUES", VARIABLE} - variables.keys()  # only what was given, and shown
    environment = {name: value for name, value in os.environ.items() if name not in unset} | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        why = said.removeprefix("sbatch: error: ").removeprefix("Batch job submission failed: ")
        raise UserError(f"sbatch refuses the job: {why}; mend the options, see sbatch --help")
    return done.stdout.strip().split(";")[0]
