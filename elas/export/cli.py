"""`elas export hf`: a checkpoint as a Hugging Face folder."""

from pathlib import Path

from elas.checkpoint.choose import find
from elas.command import Parser, run_command
from elas.console import Console, Heartbeat, facts_table
from elas.data.token_files import check_exists
from elas.data.tokenizer.found import check_given
from elas.errors import UserError
from elas.files import check_is_no_input, write_json

EXAMPLE = "elas export hf --checkpoint runs/60m --out exports/60m"


def main(argv: list[str]) -> int:
    """Run `elas export ARGV…`; returns the exit status, raises `UserError` for mistakes."""
    return run_command("elas export", COMMANDS, argv, "example:", f"  {EXAMPLE}")


def hf(argv: list[str]) -> int:
    """`elas export hf`: write it, then compare it with the checkpoint."""
    options = _parser().parse_args(argv)
    check_is_no_input(options.json, [options.checkpoint, *([options.data] if options.data else [])])
    if options.out.exists() or options.out.is_symlink():
        raise UserError(f"--out {options.out}: exists; give a folder that does not")
    if options.data:
        check_exists("--data", options.data)
    check_given(None if options.tokenizer == "none" else options.tokenizer)
    find(options.checkpoint)
    with Heartbeat("starting"):
        from elas.export.run import Request, export_hf

    given = {name: value for name, value in vars(options).items() if name != "json"}
    facts = export_hf(Request(**given), Console())
    print(facts_table([(name.replace("_", " "), _shown(value)) for name, value in facts.items()]))
    write_json(options.json, facts)
    return 0


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _parser() -> Parser:
    parser = Parser("elas export hf", "Write a checkpoint as a Hugging Face folder.", EXAMPLE)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="C", help="a run's folder, or one checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="D", help="the folder to create")
    form = "elas: factors and 2:4 kept, with its code; dense: multiplied out, a stock Arcee or Llama (default: elas)"
    parser.add_argument("--form", choices=["elas", "dense"], default="elas", help=form)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights (default: train.dtype)")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="default: data.tokenizer, or the corpus's; none: export without"
    )
    data = "a corpus to compare the two models on (default: the run's validation or training data)"
    parser.add_argument("--data", metavar="PREFIX", help=data)
    parser.add_argument("--no-compare", dest="compare", action="store_false", help="leave the comparison out")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="largest file of weights, in GB (default: 5)")
    return parser


COMMANDS = {"hf": (hf, "write a Hugging Face folder: `--form elas` or `--form dense`")}
