"""`elas import hf`: a Hugging Face folder as a run that training starts from."""

import shlex
from pathlib import Path

from elas.command import run_command
from elas.config import read_yaml, split_overrides
from elas.config.arguments import SettingsParser
from elas.console import Console, Heartbeat
from elas.errors import UserError
from elas.files import check_is_no_input, write_json
from elas.hf.model_type import model_type

EXAMPLE = "elas import hf --from models/llama-160m --out runs/llama-160m --rank 192"


def main(argv: list[str]) -> int:
    """Run `elas import ARGV…`; returns the exit status, raises `UserError` for mistakes."""
    return run_command("elas import", COMMANDS, argv, "example:", f"  {EXAMPLE}")


def hf(argv: list[str]) -> int:
    """`elas import hf`: check the folder, write the run's, show what low rank keeps."""
    overrides, rest = split_overrides(argv)
    options = _parser().parse_args(rest)
    check_is_no_input(options.json, [options.source])
    if options.out.exists() or options.out.is_symlink():
        raise UserError(f"--out {options.out}: exists; give a folder that does not")
    model_type(options.source)
    if options.config is not None:
        read_yaml(options.config)
    with Heartbeat("starting"):
        from elas.export.from_hf import Request, import_hf

    console = Console()
    request = Request(options.source, options.out, options.rank, options.low_rank, options.config, overrides)
    facts = import_hf(request, console)
    if facts["energy_kept"]:
        console.say(f"mean {facts['mean_energy_kept']:.4f}")
    console.say(f"{facts['checkpoint']}: {facts['parameters']:,} parameters, at step 0")
    if facts["tokenizer"] is None:
        console.say(f"{options.source} has no tokenizer: set data.tokenizer to the one that it was trained with")
    console.say(f"train it: elas train --config {shlex.quote(facts['config'])} --data.train PREFIX")
    write_json(options.json, facts)
    return 0


def _parser() -> SettingsParser:
    what = "Make a run from a Hugging Face folder of elas export hf, or of any Llama or Arcee; training starts from it."
    parser = SettingsParser("elas import hf", what, EXAMPLE)
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="D", help="a Hugging Face folder")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder to create")
    rank = "factor every linear at this rank, by truncated singular value decomposition (default: as the folder)"
    parser.add_argument("--rank", type=int, metavar="R", help=rank)
    kind = "none: full rank, factors are multiplied out; lowrank: factored (default: as the folder)"
    parser.add_argument("--low-rank", choices=["none", "lowrank"], help=kind)
    parser.add_argument("--config", metavar="FILE", help="further settings: a YAML file, or a preset's name")
    return parser


COMMANDS = {"hf": (hf, "from a Hugging Face folder: of `elas export hf`, or of any Llama or Arcee")}
