"""Tasks of lm-evaluation-harness on a checkpoint score as the harness's own class does on the same model's folder."""

from pathlib import Path

import evaluated
import pytest
from support.ranks import run_ranks

from elas.errors import UserError

pytest.importorskip("lm_eval", reason="pip install 'elas[eval]'")
pytestmark = pytest.mark.timeout(600)

TASKS, FOLDER = ("elas_choice", "elas_perplexity", "elas_generate"), Path(__file__).parent / "tasks"


def scores(facts: dict) -> dict:
    """Figures by task and metric."""
    return {
        (task, name): value
        for task, metrics in facts["results"].items()
        for name, value in metrics.items()
        if isinstance(value, float)
    }


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The checkpoint as a folder, with its tokenizer."""
    import torch

    from elas.checkpoint.choose import find
    from elas.export.hf import Export
    from elas.hf.tokenizer import write_tokenizer

    folder = tmp_path_factory.mktemp("exported")
    ids = write_tokenizer(trained / "tokenizer", folder, 32)
    tokens = {name: ids[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    Export(find(trained / "run"), "elas", torch.float32, 10**9).write(folder, tokens)
    return folder


def test_scores_equal_the_exports(trained, exported):
    import lm_eval
    from lm_eval.tasks import TaskManager

    from elas.console import Console
    from elas.evaluate.tasks import TaskRequest, run_tasks

    arguments = {"pretrained": str(exported), "trust_remote_code": True}
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    theirs = lm_eval.simple_evaluate("hf", arguments, list(TASKS), batch_size=4, task_manager=manager, device="cpu")
    for given in (trained / "run", exported):
        ours = run_tasks(TaskRequest(given, TASKS, FOLDER, batch=4), Console())
        assert scores(ours) == scores(theirs) and len(scores(ours)) >= 8
    assert ours["n-samples"]["elas_choice"] == {"original": 11, "effective": 11}


def test_ranks_share_the_documents(trained):
    """To rounding: the ranks put other questions together in a batch."""
    request = {"checkpoint": trained / "run", "tasks": TASKS, "task_dir": FOLDER, "batch": 4}
    alone = evaluated.tasks_of([request])[0]
    both, nothing = run_ranks(2, evaluated.tasks_of, [request], timeout=200)
    assert scores(both[0]) == pytest.approx(scores(alone), rel=1e-6) and nothing == [{}]


def test_mistakes_are_one_line(trained, tmp_path):
    from elas.console import Console
    from elas.evaluate.tasks import TaskRequest, run_tasks

    (tmp_path / "long.yaml").write_text((FOLDER / "elas_generate.yaml").read_text().replace("toks: 8", "toks: 32"))
    (tmp_path / "local.py").write_text((FOLDER / "local.py").read_text())  # whose data are not there
    for options, line in (
        ({"tasks": ("elas_choise",)}, "there is no task 'elas_choise'; did you mean elas_choice"),
        ({"task_dir": tmp_path / "gone"}, "no such folder; give one with the tasks' YAML files"),
        ({"limit": 0}, "--limit 0: too small"),
        ({"tasks": ()}, "--tasks: names none; give some"),
        ({"num_fewshot": 1000}, "--num-fewshot 1000: a task has fewer documents to take examples from; give less"),
        ({"tasks": ("elas_generate",), "task_dir": tmp_path}, "cannot be loaded (FileNotFoundError: "),
        ({"tokenizer": str(trained / "other")}, "was made with another tokenizer"),
    ):
        request = {"checkpoint": trained / "run", "tasks": TASKS[:1], "task_dir": FOLDER, **options}
        with pytest.raises(UserError) as error:
            run_tasks(TaskRequest(**request), Console())
        assert line in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "choice.jsonl").write_text((FOLDER / "choice.jsonl").read_text())
    with pytest.raises(UserError, match=r"lets the model write 32 tokens, and its longest sequence is 32; set max"):
        run_tasks(TaskRequest(trained / "run", ("elas_generate",), tmp_path), Console())


def test_without_the_harness_a_line_says_how_to_get_it(trained, monkeypatch):
    import sys

    from elas.console import Console
    from elas.evaluate.tasks import TaskRequest, run_tasks

    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"--tasks elas_choice: lm-evaluation-harness is not installed; .*elas\[eval\]"):
        run_tasks(TaskRequest(trained / "run", TASKS[:1], FOLDER), Console())
