"""`elas eval`: loss, perplexity and bits per byte of a checkpoint or a Hugging Face folder."""

from pathlib import Path

from elas.command import Parser
from elas.config import Config, ParallelConfig, split_overrides
from elas.config.reading import from_flat
from elas.config.rules import check_ranges
from elas.console import Console, facts_table
from elas.errors import UserError
from elas.evaluate.rows import PROTOCOLS
from elas.files import write_json

EXAMPLE = "elas eval --checkpoint runs/60m --data data/c4-valid"
_LAYOUT = ("parallel.tensor", "parallel.pipeline", "parallel.virtual_pipeline", "parallel.sequence")
_ABOUT = f"""Several ranks: torchrun --nproc_per_node N -m elas.cli eval …, data parallel, or with any of
  {" ".join(f"--{key} V" for key in _LAYOUT)}

"""


def main(argv: list[str], rank: int = 0, world: int = 1) -> int:
    """Run `elas eval ARGV…`.

    Args:
        argv: the arguments.
        rank, world: of the launcher.

    Returns:
        The exit status.

    Raises:
        UserError: for mistakes.
    """
    settings, rest = split_overrides(argv)
    options = _parser().parse_args(rest)
    parallel = _parallel(settings)
    from elas import prepare

    prepare()
    from elas.evaluate.run import evaluate
    from elas.evaluate.subject import Request

    given = {name: value for name, value in vars(options).items() if name not in ("json", "data", "text")}
    request = Request(**given, data=tuple(options.data), text=tuple(options.text), parallel=parallel)
    facts = evaluate(request, Console(), rank, world)
    if rank == 0:
        shown = [(name.replace("_", " "), _shown(value)) for name, value in facts.items() if name != "sources"]
        print(facts_table(shown), flush=True)
        write_json(options.json, facts)
    return 0


def _parallel(settings: dict) -> ParallelConfig:
    for key, value in settings.items():
        if key not in _LAYOUT:
            fix = f"the checkpoint has its own settings; give only {', '.join(_LAYOUT)}"
            raise UserError(f"--{key} {value}: not for elas eval; {fix}")
    config: Config = from_flat(settings)
    check_ranges(config)
    return config.parallel


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.6g}"
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _parser() -> Parser:
    parser = Parser("elas eval", "Loss, perplexity and bits per byte of a model.", EXAMPLE, about=_ABOUT)
    add = parser.add_argument
    model = "a run's folder (its newest intact checkpoint), one checkpoint, or a Hugging Face folder"
    add("--checkpoint", type=Path, required=True, metavar="C", help=model)
    data = "prefixes of .bin/.idx pairs (default: the run's own validation set)"
    add("--data", nargs="+", default=[], metavar="PREFIX", help=data)
    text = "raw text instead, tokenised here: files, folders or globs as for elas prep tokenize"
    add("--text", nargs="+", default=[], metavar="FILE", help=text)
    protocol = (
        "packed: documents one after the other, every token predicted once; papers: one truncated document a sequence "
        "(default: as the run was trained, data.packing; packed for a Hugging Face folder)"
    )
    add("--protocol", choices=PROTOCOLS, help=protocol)
    tokens = "predict this many: in sequences spread evenly over --data, or the first ones of --text (default: all)"
    add("--tokens", type=int, metavar="N", help=tokens)
    batch = "sequences a batch, which ppl_n_plus_1 depends on (default: the run's train.micro_batch_size, or 8)"
    add("--batch", type=int, metavar="N", help=batch)
    length = "tokens of a sequence (default: the run's; a Hugging Face folder's longest, at most 2048)"
    add("--seq-length", type=int, metavar="N", help=length)
    add("--dtype", choices=["float32", "bfloat16"], help="of weights and activations (default: that of training)")
    add("--tokenizer", metavar="PATH", help="default: the run's, the folder's, or that of the corpus")
    return parser
