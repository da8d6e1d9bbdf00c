"""Trackers get the scalars of a run, continue it when it resumes, and can neither end nor delay it."""

import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elas import cli
from elas.checkpoint.identity import written_config
from elas.command import exit_status
from elas.config import load_config
from elas.errors import ConfigError
from elas.train import tracker_process, trackers
from elas.train.history import changes
from elas.train.metrics import Metrics
from elas.train.trackers import check_trackers, open_trackers

FAKE = '''
"""Trackio's functions that ELAS calls; HOW says where it fails, OUT gets what it was called with."""
import json, os, signal, time, warnings

HOW, OUT, TRACKIO_DIR = os.environ["HOW"], os.environ["OUT"], "nowhere"

def note(*what):
    with open(OUT, "a") as file:
        file.write(json.dumps(what) + "\\n")

def trouble(where):
    if HOW == f"raises in {where}":
        raise ConnectionError("no route\\nto host")
    if HOW == f"hangs in {where}":
        time.sleep(600)
    if HOW == f"dies in {where}":
        os.kill(os.getpid(), signal.SIGSEGV)
    if HOW == f"warns in {where}":
        warnings.warn("rows were dropped")
    if HOW == f"prints in {where}":
        print('{"failed": "no answer of ours"}', flush=True)
        input()

class Run:
    id, url = "id-1", None
    def log(self, values, step):
        trouble("log")
        note("log", step, values)

def init(project, *, name, config, resume, embed):
    trouble("init")
    note("init", project, name, config["train"]["steps"], resume)
    return Run()

def finish():
    trouble("finish")
    note("finish")
'''


class Fake:
    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        self.run_dir, self.said, self._out = tmp_path / "fake-run", [], tmp_path / "out"
        (tmp_path / "packages").mkdir()
        (tmp_path / "packages" / "trackio.py").write_text(FAKE)
        monkeypatch.syspath_prepend(str(tmp_path / "packages"))
        monkeypatch.setenv("OUT", str(self._out))
        monkeypatch.setenv("HOW", "")
        self.how = lambda how: monkeypatch.setenv("HOW", how)

    def open(self, *names: str, step: int = 0, **settings):
        given = {"train.run_dir": str(self.run_dir), "log.trackers": [*names], "train.steps": 77}
        return open_trackers(load_config(None, {**given, **settings}), step, self.said.append)

    def calls(self) -> list[list]:
        return [json.loads(line) for line in self._out.read_text().splitlines()] if self._out.exists() else []

    def warnings(self) -> list[str]:
        return [line for line in self.said if "warning" in line]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    return Fake(tmp_path, monkeypatch)


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_every_row_the_project_the_name_and_the_configuration_arrive(fake):
    opened = fake.open("trackio", **{"log.project": "p"})
    with Metrics(str(fake.run_dir), opened, last_step=0, writes=True) as metrics:
        row = {"step": 1, "loss": 2.5, "sparse_active": True, "mfu": None, "layers": {"sparsity": [None, 0.25]}}
        metrics.log("metrics", row)
        metrics.log("validation", {"step": 1, "ppl": 9.0, "sources": {"a/b": 3}})
    init, first, second, end = fake.calls()
    assert init == ["init", "p", "fake-run", 77, "never"] and end == ["finish"]
    elapsed = first[2].pop("metrics/elapsed_s")
    assert first == ["log", 1, {"metrics/loss": 2.5, "metrics/sparse_active": 1.0, "layers/sparsity/01": 0.25}]
    assert elapsed >= 0 and second[2]["validation/ppl"] == 9.0 and second[2]["sources/a/b"] == 3.0
    assert fake.said == ["trackio: in nowhere; to see it: trackio show --project p"]


FAILURES = {
    "raises in init": "ConnectionError: no route to host",
    "raises in log": "ConnectionError: no route to host",
    "raises in finish": "ConnectionError: no route to host",
    "hangs in init": "did not start in time",
    "hangs in log": "MiB of rows behind",
    "hangs in finish": "did not finish within 3 s",
    "dies in init": f"status -{signal.SIGSEGV:d}",
    "dies in log": f"status -{signal.SIGSEGV:d}",
    "dies in finish": f"status -{signal.SIGSEGV:d}",
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_tracker_that_fails_is_one_line_and_delays_nothing(fake, how, monkeypatch):
    """Beside it TensorBoard gets everything. Rows take milliseconds; the bound of 1 s is for a busy machine."""
    fake.how(how)
    monkeypatch.setattr(trackers, "OPEN_S", 3.0 if how == "hangs in init" else 60.0)
    monkeypatch.setattr(trackers, "CLOSE_S", 3.0 if "hangs" in how else 60.0)
    if how == "hangs in log":  # a child that dies may be slow to do so on a busy machine
        monkeypatch.setattr(tracker_process, "MOST_PENDING", 2**18)
    opened = fake.open("trackio", "tensorboard")
    values = {f"metrics/{number}": 1.0 for number in range(200)}  # about 4 kB; the pipe takes 64 kB
    begun, step, longest = time.monotonic(), 0, 0.0
    while time.monotonic() < begun + 60 and not fake.warnings():
        if how.endswith("finish") and step == 3:
            break
        step, before = step + 1, time.monotonic()
        opened.log(step, values)
        longest = max(longest, time.monotonic() - before)
        time.sleep(0.05)
    assert longest < 1.0
    opened.log(step + 1, values)
    before = time.monotonic()
    opened.close(False)
    assert time.monotonic() - before < 3 + 5
    (line,) = fake.warnings()
    assert line.startswith("warning: trackio failed at ") and FAILURES[how] in line and "\n" not in line
    assert f"its output is in {fake.run_dir}/trackers/trackio.log" in line
    assert events(fake.run_dir)["metrics/7"] == [(number, 1.0) for number in range(1, step + 2)]


def test_a_child_that_is_killed_leaves_no_process(fake, monkeypatch):
    fake.how("hangs in finish")
    monkeypatch.setattr(trackers, "CLOSE_S", 1.0)
    opened = fake.open("trackio")
    process = opened._open["trackio"]._process
    opened.close(False)
    assert process.returncode == -signal.SIGKILL and fake.warnings()


def test_what_a_package_prints_or_reads_is_no_message(fake):
    """Its output goes to a file, and its input is empty: a question ends in an EOFError."""
    fake.how("prints in log")
    opened = fake.open("trackio")
    opened.log(1, {"a": 1.0})
    opened.close(False)
    (line,) = fake.warnings()
    assert "EOFError" in line and "no answer of ours" in (fake.run_dir / "trackers" / "trackio.log").read_text()


def test_a_warning_of_a_package_is_a_line(fake):
    fake.how("warns in finish")
    opened = fake.open("trackio")
    opened.log(1, {"a": 1.0})
    opened.close(False)
    assert fake.warnings() == ["trackio: warning: rows were dropped"] and fake.calls()[-1] == ["finish"]


def test_a_resumed_run_is_continued_and_a_new_one_is_not(fake):
    for step, resume in ((0, "never"), (2, "allow"), (0, "never")):
        fake.open("trackio", step=step).close(False)
        assert fake.calls()[-2] == ["init", "elas", "fake-run", 77, resume]
    (fake.run_dir / "trackers" / "ids.json").write_text('{"trackio": "id-0"}')  # its name now belongs to another run
    fake.open("trackio", step=2).close(False)
    assert any("fake-run is now another run in the project elas" in line for line in fake.warnings())


def test_a_tracker_in_this_process_that_fails_is_switched_off(fake, monkeypatch):
    def broken(*_):
        raise OSError("disk full")

    opened = fake.open("tensorboard")
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", broken)
    for step in (1, 2):
        opened.log(step, {"a": 1.0})
    opened.close(False)
    (line,) = fake.said
    assert line == "warning: tensorboard failed at step 1 and is switched off (disk full); metrics.jsonl has all values"


def test_ids_that_cannot_be_read_are_one_line(fake):
    (fake.run_dir / "trackers").mkdir(parents=True)
    (fake.run_dir / "trackers" / "ids.json").write_text("{")
    fake.open("trackio", step=3).close(False)
    assert len(fake.warnings()) == 1 and "trackio failed at its start" in fake.said[0]


def test_a_run_that_dies_has_its_trackers_closed(fake, tmp_path):
    """As after SIGKILL: the child sees the end of its input."""
    code = (
        "import os, sys; from elas.config import load_config; from elas.train.trackers import open_trackers\n"
        f"config = load_config(None, {{'train.run_dir': {str(fake.run_dir)!r}, 'log.trackers': ['trackio']}})\n"
        "open_trackers(config, 0, print).log(1, {'a': 1.0}); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -signal.SIGKILL
    end = time.monotonic() + 60
    while ["finish"] not in fake.calls() and time.monotonic() < end:
        time.sleep(0.1)
    assert fake.calls()[1:] == [["log", 1, {"a": 1.0}], ["finish"]]


@pytest.mark.parametrize("error", [None, FloatingPointError("diverged")])
def test_a_run_that_fails_is_closed_as_failed(tmp_path, error):
    class Seen(trackers.Trackers):
        def close(self, failed):
            self.failed = failed

    seen = Seen()
    try:
        with Metrics(str(tmp_path), seen, last_step=0, writes=True):
            if error:
                raise error
    except FloatingPointError:
        pass
    assert seen.failed == (error is not None)


def test_a_missing_package_is_one_line_before_anything_starts(tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else real(name, *more))
    given = [f"--train.run_dir={tmp_path / 'run'}", "--log.trackers=[tensorboard,wandb]"]
    for command in (["train", "--dry-run"], ["train"]):
        assert exit_status(cli.run, [*command, "--config=quickstart", "--data.train=none", *given]) == 2
        error = capsys.readouterr().err
        assert "log.trackers=['tensorboard', 'wandb']: the package wandb is not installed; " in error
        assert "pip install 'elas[wandb]'" in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_folder_of_a_packages_name_is_no_package(tmp_path, monkeypatch):
    """W&B makes a folder `wandb` where it runs, which Python would import as an empty package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="the package wandb is not installed"):
        check_trackers(load_config(None, {"log.trackers": ["wandb"]}))


def test_the_earlier_key_names_the_new_one(tmp_path):
    (tmp_path / "run.yaml").write_text("log: {tensorboard: false}")
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "run.yaml"))
    assert str(caught.value) == "log.tensorboard=False: was replaced by log.trackers; write log.trackers: []"


@pytest.mark.parametrize("board, names", [(True, ["tensorboard"]), (False, [])])
def test_the_earlier_key_in_a_checkpoint_is_translated(board, names):
    class Old:
        manifest = {"config": {"log": {"tensorboard": board}, "train": {"steps": 5}}}  # noqa: RUF012

    assert written_config(Old).log.trackers == names and written_config(Old).train.steps == 5
    assert changes(load_config(None, {"log.trackers": names, "train.steps": 5}), Old) == {}


def offline_records(folder: Path):
    """Records of a W&B file: LevelDB's log format, in blocks of 32 KiB after 7 bytes of W&B's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = next(folder.glob("run-*.wandb")).read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # no room for a header: the block is padded
            at += 2**15 - at % 2**15
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts, at = parts + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield Record.FromString(parts)
            parts = b""


def test_wandb_without_a_key_records_offline_and_continues_the_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install 'elas[wandb]'")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-settings"))
    settings = {"train.run_dir": str(tmp_path / "mine"), "log.trackers": ["wandb"], "train.steps": 77}
    config, said = load_config(None, {**settings, "log.project": "p"}), []
    for last in (0, 2):  # killed after step 3; the checkpoint is of step 2
        opened = open_trackers(config, last, said.append)
        for step in range(last + 1, last + 4):
            opened.log(step, {"metrics/loss": 3.0 / step + last})
        opened.close(False)
    starts = sorted((tmp_path / "mine" / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)
    assert len(starts) == 2
    why, upload = "no API key: `wandb login`, or WANDB_API_KEY", f"wandb sync {tmp_path}/mine/wandb"
    assert said == [f"wandb: offline in {start} ({why}); to upload all of this run: {upload}" for start in starts]
    ids = []
    for last, start in zip((0, 2), starts):
        records = list(offline_records(start))
        rows = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item}
                for r in records if r.WhichOneof("record_type") == "history"]  # fmt: skip
        assert [(row["step"], row["metrics/loss"]) for row in rows] == [
            (step, 3.0 / step + last) for step in range(last + 1, last + 4)
        ]
        run = next(r.run for r in records if r.WhichOneof("record_type") == "run")
        assert (run.project, run.display_name) == ("p", "mine")
        settings = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert settings["train"]["steps"] == 77 and settings["log"]["trackers"] == ["wandb"]
        axes = {(r.metric.name or r.metric.glob_name): r.metric.step_metric for r in records if r.HasField("metric")}
        assert axes["*"] == "step"
        ids.append(run.run_id)
    assert ids == [json.loads((tmp_path / "mine" / "trackers" / "ids.json").read_text())["wandb"]] * 2


def test_trackio_stores_the_values_and_continues_the_run(tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="pip install 'elas[trackio]'")
    for name in [name for name in os.environ if name.startswith("TRACKIO_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    config = load_config(None, {"train.run_dir": str(tmp_path / "mine"), "log.trackers": ["trackio"]})
    said = []
    for last in (0, 2):
        opened = open_trackers(config, last, said.append)
        for step in range(last + 1, last + 4):
            opened.log(step, {"metrics/loss": 3.0 / step + last})
        opened.close(False)
    assert said == [f"trackio: in {tmp_path}/trackio; to see it: trackio show --project elas"] * 2
    database = sqlite3.connect(tmp_path / "trackio" / "elas.db")
    rows = database.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    expected = [(step, 3.0 / step + last) for last in (0, 2) for step in range(last + 1, last + 4)]
    assert [(step, json.loads(values)["metrics/loss"]) for _, _, step, values in rows] == expected
    own = json.loads((tmp_path / "mine" / "trackers" / "ids.json").read_text())["trackio"]
    assert {(one, name) for one, name, *_ in rows} == {(own, "mine")}
