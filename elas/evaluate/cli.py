"""`elas eval`: loss, perplexity and bits per byte of a checkpoint or a Hugging Face folder, or its scores in tasks."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from elas.command import Parser
from elas.config import Config, ParallelConfig, split_overrides
from elas.config.reading import from_flat
from elas.config.rules import check_ranges
from elas.console import Console, Heartbeat, facts_table, table
from elas.errors import UserError
from elas.evaluate.rows import PROTOCOLS
from elas.files import check_is_no_input, write_json

if TYPE_CHECKING:
    from elas.evaluate.subject import Request
    from elas.evaluate.tasks import TaskRequest

EXAMPLE = "elas eval --checkpoint runs/60m --data data/c4-valid"
_COMMON = ("checkpoint", "batch", "dtype", "tokenizer")
_OF_TASKS = ("task_dir", "limit", "num_fewshot")
_OF_TOKENS = ("data", "text", "protocol", "tokens", "seq_length")
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
    _check_options(options, settings)
    tokenizer = [options.tokenizer] if options.tokenizer else []
    check_is_no_input(options.json, [options.checkpoint, *tokenizer, *options.text, *options.data])
    if options.tasks is not None and not Console("err").is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's bars; read when tqdm is imported
    _check_paths(options)
    with Heartbeat("starting", shows=rank == 0):
        request = _of_tokens(options, parallel) if options.tasks is None else _of_tasks(options)
        request.check()
        from elas import prepare

        prepare()
    facts = _run(request, rank, world)
    if rank == 0:
        write_json(options.json, facts)
    return 0


def _of_tokens(options: argparse.Namespace, parallel: ParallelConfig) -> "Request":
    from elas.evaluate.subject import Request

    given = {name: getattr(options, name) for name in (*_COMMON, "protocol", "tokens", "seq_length")}
    return Request(**given, data=tuple(options.data), text=tuple(options.text), parallel=parallel)


def _of_tasks(options: argparse.Namespace) -> "TaskRequest":
    from elas.evaluate.tasks import TaskRequest

    names = tuple(name.strip() for name in options.tasks.split(",") if name.strip())
    return TaskRequest(tasks=names, **{name: getattr(options, name) for name in (*_COMMON, *_OF_TASKS)})


def _run(request: "Request | TaskRequest", rank: int, world: int) -> dict:
    """Evaluate and show; the facts, on rank 0."""
    from elas.evaluate.run import evaluate
    from elas.evaluate.tasks import TaskRequest, run_tasks, table_of

    if isinstance(request, TaskRequest):
        facts = run_tasks(request, Console(), rank, world)
        shown = table(*table_of(facts), left=3) if rank == 0 else ""
    else:
        facts = evaluate(request, Console(), rank, world)
        rows = [(name.replace("_", " "), _shown(value)) for name, value in facts.items() if name != "sources"]
        shown = facts_table(rows) if rank == 0 else ""
    if rank == 0:
        print(shown, flush=True)
    return facts


def _check_options(options: argparse.Namespace, settings: dict) -> None:
    """Raise `UserError` for an option that has no effect on what was asked for."""
    of_others = _OF_TASKS if options.tasks is None else _OF_TOKENS
    for name in of_others:
        if getattr(options, name) not in (None, []):
            when = "only with --tasks" if options.tasks is None else "not with --tasks, which have their own data"
            raise UserError(f"--{name.replace('_', '-')}: {when}; leave one of them out")
    if options.tasks is not None and settings:
        key, value = next(iter(settings.items()))
        raise UserError(f"--{key} {value}: not with --tasks, whose ranks are data parallel; leave it out")


def _check_paths(options: argparse.Namespace) -> None:
    """Raise `UserError` for a path that is not there, before what takes seconds to import."""
    from elas.checkpoint.choose import check_model
    from elas.data.token_files import check_exists
    from elas.data.tokenizer.found import check_given

    if options.task_dir is not None and not options.task_dir.is_dir():
        raise UserError(f"--task-dir {options.task_dir}: no such folder; give one with the tasks' YAML files")
    for prefix in options.data:
        check_exists("--data", prefix)
    check_given(options.tokenizer)
    check_model(options.checkpoint)


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
    model = "a run's folder (its newest complete checkpoint), one checkpoint, or a Hugging Face folder"
    add("--checkpoint", type=Path, required=True, metavar="C", help=model)
    data = "prefixes of .bin/.idx pairs (default: the run's own validation set)"
    add("--data", nargs="+", default=[], metavar="PREFIX", help=data)
    text = "raw text instead, tokenised here: files, folders or globs as for elas prep tokenize"
    add("--text", nargs="+", default=[], metavar="FILE", help=text)
    add(
        "--tasks",
        metavar="T,T",
        help="tasks of lm-evaluation-harness instead: hellaswag,arc_easy (pip install 'elas[eval]')",
    )
    add(
        "--task-dir",
        type=Path,
        metavar="DIR",
        help="folder with YAML files of further tasks, found before the harness's",
    )
    add("--limit", type=int, metavar="N", help="documents of each task (default: all)")
    add("--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)")
    protocol = (
        "packed: documents one after the other, every token predicted once; papers: one truncated document a sequence "
        "(default: as the run was trained, data.packing; packed for a Hugging Face folder)"
    )
    add("--protocol", choices=PROTOCOLS, help=protocol)
    tokens = "predict this many: in sequences spread evenly over --data, or the first ones of --text (default: all)"
    add("--tokens", type=int, metavar="N", help=tokens)
    batch = (
        "sequences a batch, which ppl_n_plus_1 depends on (default: the run's train.micro_batch_size; 8 for a Hugging "
        "Face folder and for tasks)"
    )
    add("--batch", type=int, metavar="N", help=batch)
    length = "tokens of a sequence (default: the run's; a Hugging Face folder's longest, at most 2048)"
    add("--seq-length", type=int, metavar="N", help=length)
    add("--dtype", choices=["float32", "bfloat16"], help="of weights and activations (default: that of training)")
    add("--tokenizer", metavar="PATH", help="default: the run's, the folder's, or that of the corpus")
    return parser
