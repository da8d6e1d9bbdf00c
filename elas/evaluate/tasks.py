"""`elas eval --tasks`: tasks of lm-evaluation-harness on a checkpoint or a Hugging Face folder."""

import difflib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from elas.console import Console, Heartbeat
from elas.errors import UserError

INSTALL = "pip install 'elas[eval]'"


@dataclass(frozen=True)
class TaskRequest:
    """What the user asked for; see `elas eval --help`."""

    checkpoint: Path
    tasks: tuple[str, ...]
    task_dir: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch: int | None = None
    dtype: str | None = None
    tokenizer: str | None = None

    def check(self) -> None:
        """Raise `UserError` for options that are wrong whatever the model is."""
        if find_spec("lm_eval") is None:
            raise UserError(f"--tasks {','.join(self.tasks)}: lm-evaluation-harness is not installed; {INSTALL}")
        for option, value, least in (
            ("batch", self.batch, 1),
            ("limit", self.limit, 1),
            ("num-fewshot", self.num_fewshot, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"--{option} {value}: too small; give {least} or more")
        if not self.tasks:
            raise UserError("--tasks: names none; give some, such as hellaswag,arc_easy")
        if self.task_dir is not None and not self.task_dir.is_dir():
            raise UserError(f"--task-dir {self.task_dir}: no such folder; give one with the tasks' YAML files")


def run_tasks(request: TaskRequest, console: Console, rank: int = 0, world: int = 1) -> dict:
    """Run tasks; data-parallel ranks share the documents.

    Returns:
        On rank 0 the harness's facts (`results`, `groups`, `n-samples`, `versions`, `config`, …) and `checkpoint`,
        `step`, `seconds`; empty on the others.

    Raises:
        UserError: the harness is not installed, an unknown task, one whose data cannot be loaded, or that the model
            cannot do.
    """
    request.check()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    begun, shows = time.monotonic(), rank == 0
    with Heartbeat("loading lm-evaluation-harness", shows=shows) as heartbeat:
        from lm_eval.evaluator import simple_evaluate

        from elas.evaluate.harness import ElasLM

        heartbeat.begin("looking for the tasks")
        manager, loaded = _load(request)
        heartbeat.begin(f"loading {request.checkpoint}")
        if world > 1:
            from elas import parallel
            from elas.config import ParallelConfig

            parallel.initialize(ParallelConfig(), seed=0)
        batch = request.batch or 8
        arguments = (str(request.checkpoint), request.tokenizer, request.dtype, rank, world)
        model = ElasLM(*arguments, batch_size=batch)
        _check_lengths(loaded, model)
        if shows:
            console.say(f"running {', '.join(loaded)} on {model.source.path}")
        heartbeat.begin(f"running {', '.join(loaded)}")
        try:
            facts = simple_evaluate(
                model,
                tasks=list(request.tasks),
                num_fewshot=request.num_fewshot,
                batch_size=batch,
                limit=request.limit,
                log_samples=False,
                task_manager=manager,
            )
        except ValueError as error:
            if "larger than population" not in str(error):  # of random.sample, for the examples
                raise
            why = "a task has fewer documents to take examples from"
            raise UserError(f"--num-fewshot {request.num_fewshot}: {why}; give less") from error
    if facts is None:
        return {}
    checkpoint = model.source.checkpoint
    where = {"checkpoint": str(model.source.path), "step": checkpoint.step if checkpoint else None}
    return _plain(dict(facts)) | where | {"world_size": world, "seconds": round(time.monotonic() - begun, 1)}


def _load(request: TaskRequest) -> tuple[Any, dict[str, Any]]:
    """The harness's manager, and the tasks asked for by name, in groups or not."""
    from lm_eval.tasks import TaskManager

    folder = str(request.task_dir.resolve()) if request.task_dir else None
    manager = TaskManager(include_path=folder, include_defaults=False) if folder else None
    if manager is None or not set(request.tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)  # reads the harness's thousands of files
    for name in request.tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            fix = f"did you mean {' or '.join(near)}?" if near else "lm_eval ls tasks lists them"
            raise UserError(f"--tasks {','.join(request.tasks)}: there is no task {name!r}; {fix}")
    try:
        loaded = manager.load(list(request.tasks))["tasks"]
    except Exception as error:  # of datasets, its readers and its network: anything
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        fix = "check the network, or give tasks with local data by --task-dir"
        raise UserError(f"--tasks {','.join(request.tasks)}: cannot be loaded ({why}); {fix}") from error
    unsafe = [name for name, task in loaded.items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        fix = "export the model and use lm_eval --confirm_run_unsafe_code"
        raise UserError(f"--tasks {','.join(request.tasks)}: {unsafe[0]} runs code that the model writes; {fix}")
    return manager, loaded


def _check_lengths(loaded: dict[str, Any], model: Any) -> None:
    """Check that there is room for what tasks let a model write; the harness fails in the middle of the work."""
    for name, task in loaded.items():
        if task.get_config("output_type") != "generate_until":
            continue
        wanted = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", model.max_gen_toks)
        if wanted >= model.max_length:
            why = f"{name} lets the model write {wanted} tokens, and its longest sequence is {model.max_length}"
            raise UserError(f"--tasks {name}: {why}; set max_gen_toks in a copy of the task, in --task-dir")


def _plain(value: Any) -> Any:
    """Values as JSON has them."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    return value.item() if hasattr(value, "item") else str(value)


def table_of(facts: dict) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: task, filter, metric, value and standard error."""
    rows = []
    for task, metrics in facts["results"].items():
        for key, value in metrics.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            shown = f"± {error:.4f}" if isinstance(error, float) else ""
            rows.append([task, filtered, metric, f"{value:.4f}", shown])
    return ["task", "filter", "metric", "value", "stderr"], rows
