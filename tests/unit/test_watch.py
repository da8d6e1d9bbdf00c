"""`elas watch` says what the files of a run show, while they grow, are cut, are replaced, or say nothing any more."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from elas.cli import run as elas
from elas.config import load_config
from elas.errors import UserError
from elas.run_dir import claim, write_marker
from elas.train.lines import step_line
from elas.train.metrics import Metrics
from elas.train.trackers import Trackers
from elas.watch.state import Run
from elas.watch.tail import FIRST_BYTES, Tail

SETTINGS = {"train.steps": 40, "log.every_steps": 2, "train.eval_every": 10, "checkpoint.every_steps": 20,
            "log.trackers": []}  # fmt: skip


def row(step: int, at: float, **more) -> dict:
    return {"step": step, "tokens": 100 * step, "loss": 9.0 - step / 10, "loss_mean": 9.1, "loss_steps": 2,
            "grad_norm": 1.0, "lr": 1e-3, "tokens_per_s": 50.0, "step_s": 2.0, "sparsity": 0.5, "dropped": 0.1,
            "memory_peak_bytes": 10**9, "time": at, "elapsed_s": at - 1e9, **more}  # fmt: skip


def append(folder: Path, values: dict, name: str = "metrics") -> None:
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


def made(folder: Path, age: float = 1.0, every: float = 4.0, steps: tuple[int, ...] = (2, 4, 6)) -> Path:
    """A run whose last line is so old, with a line every so many seconds."""
    config = load_config(None, {**SETTINGS, "train.run_dir": str(folder)})
    Metrics(str(folder), Trackers(), last_step=0, writes=True).facts(config.to_dict(), {"first_step": 1})
    facts = json.loads((folder / "run.json").read_text())
    last = time.time() - age
    (folder / "run.json").write_text(json.dumps(facts | {"time": last - every * len(steps)}))
    for number, step in enumerate(reversed(steps)):
        (folder / "metrics.jsonl").touch()
        lines = (folder / "metrics.jsonl").read_text()
        (folder / "metrics.jsonl").write_text(json.dumps(row(step, last - number * every)) + "\n" + lines)
    return folder


def checkpoint(folder: Path, step: int, age: float = 0.0, *, partial: bool = False) -> None:
    path = folder / "checkpoints" / f"step_{step:08d}{'.partial' if partial else ''}"
    path.mkdir(parents=True)
    if not partial:
        (path / "manifest.json").write_text("{}")
        os.utime(path / "manifest.json", (time.time() - age,) * 2)


def test_a_training_run(tmp_path):
    run = Run(made(tmp_path, age=1.0))
    checkpoint(tmp_path, 4, age=60)
    append(tmp_path, {"step": 0, "loss": 9.0, "ppl": 8103.0, "time": time.time() - 20}, "validation")
    run.read()
    state = run.state()
    assert state.kind == "training" and state.usual_s == pytest.approx(4.0) and not state.has_ended
    assert re.fullmatch(r"training: last line 0:0[0-3] ago, usually one every 4\.0 s", state.text)
    view = state.view
    assert (view.step, view.steps, view.loss, view.ppl, view.tokens_per_s) == (6, 40, 8.4, 8103.0, 50.0)
    assert (view.memory_bytes, view.sparsity, view.dropped, view.checkpoint) == (10**9, 0.5, 0.1, 4)
    assert view.checkpoint_age_s == pytest.approx(60, abs=5) and view.left_s == pytest.approx(34 * 2.0, abs=5)


def test_the_time_left_holds_validations_and_saves_to_come(tmp_path):
    run = Run(made(tmp_path, age=0.0))
    now = time.time()
    append(tmp_path, row(8, now, validation_s=10.0, save_s=0.0))
    append(tmp_path, row(12, now + 1, validation_s=17.0, save_s=3.0))
    run.read()
    assert run.more_s(12) == 3 * 7.0 + 2 * 3.0  # validations after 20, 30 and 40, saves after 20 and 40
    assert run.state().view.left_s == pytest.approx(28 * 2.0 + 27.0, abs=3)


@pytest.mark.parametrize("age, kind", [(15.0, "training"), (29.0, "training"), (31.0, "silent"), (7200.0, "silent")])
def test_silence_is_told_from_what_is_usual(tmp_path, age, kind):
    state = Run(made(tmp_path, age=age)).state()
    assert state.kind == kind and state.silent_s == pytest.approx(age, abs=2)
    if kind == "silent":
        assert "usually a line every 4.0 s; it may hang, or have ended without a marker" in state.text
        assert state.text.startswith("silent for 2:00:0" if age == 7200 else "silent for 0:3")
        assert state.view.left_s is None


@pytest.mark.parametrize("age, kind", [(8.0, "training"), (20.0, "validating"), (200.0, "silent")])
def test_silence_where_a_validation_is_due(tmp_path, age, kind):
    folder = made(tmp_path, age=age, steps=(6, 8, 10))
    state = Run(folder).state()
    assert state.kind == kind and ("a validation is due after step 10" in state.text) == (kind != "training")
    assert state.text.startswith(kind)
    append(folder, {"step": 10, "loss": 9.0, "ppl": 8.0, "time": time.time() - age}, "validation")
    assert "validation is due" not in Run(folder).state().text


def test_silence_where_a_save_is_due_or_begun(tmp_path):
    folder = made(tmp_path / "due", age=20.0, steps=(16, 18, 20))
    append(folder, {"step": 20, "loss": 9.0, "ppl": 8.0, "time": time.time() - 20}, "validation")
    state = Run(folder).state()
    assert state.kind == "saving" and state.text.startswith("saving: a save is due after step 20; no line for 0:2")
    checkpoint(folder, 20, age=20.0)
    assert Run(folder).state().kind == "training"
    folder = made(tmp_path / "begun", age=20.0)
    checkpoint(folder, 6, partial=True)
    assert "step 6 is being saved" in Run(folder).state().text


def test_a_run_that_ended_says_how(tmp_path):
    folder = made(tmp_path)
    write_marker(str(folder), {"step": 6, "checkpoint": None}, "SIGTERM")
    state = Run(folder).state()
    assert state.kind == "stopped" and state.text.startswith("stopped at step 6 (SIGTERM), 0:0") and state.has_ended
    write_marker(str(folder), {"step": 40, "checkpoint": None}, "")
    state = Run(folder).state()
    assert state.kind == "done" and state.text.startswith("done at step 40, 0:0")
    (folder / "DONE").write_text("")  # a marker without facts is one
    assert Run(folder).state().text == "done at step ?"


def test_an_error_that_a_rank_saw_is_a_failure_until_the_next_start(tmp_path):
    folder = made(tmp_path, age=200)
    append(folder, {"event": "failed", "step": 6, "time": time.time() - 199, "why": "Connection reset"}, "events")
    state = Run(folder).state()
    assert state.kind == "failed" and state.text == "failed at step 6, 3:19 ago: Connection reset" and state.has_ended
    append(folder, row(8, time.time() - 1))
    assert Run(folder).state().kind != "failed"
    append(folder, {"event": "failed", "step": 8, "time": time.time(), "why": ""}, "events")
    state = Run(folder).state()
    assert state.kind == "failed" and not state.has_ended  # a launcher may start it again
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(facts | {"time": time.time() + 1}))
    assert Run(folder).state().kind == "starting"


def test_a_stopped_run_whose_lock_is_held_again_is_starting(tmp_path):
    folder = made(tmp_path)
    claim(load_config(None, {"train.run_dir": str(folder)})).release()
    time.sleep(0.02)
    (folder / "REQUEUE").write_text(json.dumps({"step": 6, "stopped": "SIGTERM", "time": time.time() - 100}))
    assert Run(folder).state().kind == "stopped"
    lock = claim(load_config(None, {"train.run_dir": str(folder)}))
    state = Run(folder).state()
    lock.release()
    assert state.kind == "starting" and f"process {os.getpid()} on this host holds its lock; stopped at" in state.text
    assert Run(folder).state().kind == "stopped"


@pytest.mark.parametrize("why", ["", "SIGTERM"], ids=["done", "stopped"])
def test_a_start_after_a_marker_is_seen_by_its_lock(tmp_path, why):
    folder = made(tmp_path)
    settings = load_config(None, {"train.run_dir": str(folder)})
    claim(settings, starts=True).release()
    time.sleep(0.02)
    write_marker(str(folder), {"step": 6}, why)
    assert Run(folder).state().has_ended
    claim(settings).release()  # not by a start
    assert Run(folder).state().has_ended
    time.sleep(0.02)
    claim(settings, starts=True).release()  # by a launcher, or on another host, where its holder is not seen
    state = Run(folder).state()
    assert state.kind == "starting" and re.match(r"starting again: its lock was taken 0:0\d ago; ", state.text)
    lock = claim(settings)
    assert "holds its lock; " in Run(folder).state().text  # although it ended less than 30 s ago
    lock.release()
    os.utime(folder / ".lock", (time.time() + 0, time.time() - 200))
    os.utime(folder / ("REQUEUE" if why else "DONE"), (time.time(), time.time() - 300))
    assert Run(folder).state().has_ended  # that start has failed


def test_a_run_that_has_ended_is_waited_for_and_shows_its_last_validation(tmp_path):
    folder = made(tmp_path, steps=(38, 40))
    append(folder, {"step": 40, "loss": 3.0, "ppl": 20.1, "tokens": 9, "share": 1, "time": time.time()}, "validation")
    write_marker(str(folder), {"step": 40}, "")
    command = [sys.executable, "-m", "elas.cli", "watch", str(folder), "--every", "0.05", "--wait", "600"]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert watching.stdout is not None
    step, validation, done, wait = (watching.stdout.readline().rstrip() for _ in range(4))
    assert step.startswith("step 40/40  loss") and "left" not in step
    assert validation.startswith("step     40  validation loss 3.0000  perplexity 20.1")
    assert done.startswith("done at step 40") and re.match(r"waiting (600|599) s for a new start \(--wait", wait)
    (folder / "DONE").unlink()
    append(folder, row(42, time.time()))
    assert watching.stdout.readline().startswith("step 42/40")
    write_marker(str(folder), {"step": 42}, "SIGTERM")
    assert watching.communicate(timeout=60)[0].startswith("stopped at step 42")  # at once: it was seen running
    assert subprocess.run([*command[:-1], "0"], capture_output=True, text=True).stdout.count("\n") == 3


def test_a_run_that_has_logged_nothing_yet(tmp_path):
    lock = claim(load_config(None, {"train.run_dir": str(tmp_path)}))
    run = Run(tmp_path)
    state = run.state()
    lock.release()
    assert state.kind == "starting" and state.silent_s is None
    assert state.text == f"starting: no step is logged yet; process {os.getpid()} on this host holds its lock"
    made(tmp_path, steps=())
    run.read()
    assert run.state().kind == "starting" and run.state().view.steps == 40
    append(tmp_path, row(1, time.time()))
    run.read()
    assert run.state().kind == "training" and run.state().usual_s == 4.0  # two steps of 2 s


def test_a_line_that_is_being_written_counts_when_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail, line = Tail(path), json.dumps(row(1, 1.0)) + "\n"
    assert tail.read() == []
    for end in (10, len(line) - 1):
        path.write_text(line[:end])
        assert tail.read() == []
    path.write_text(line)
    assert [one["step"] for one in tail.read()] == [1] and tail.read() == []
    with path.open("a") as file:
        file.write(json.dumps(row(2, 2.0)) + "\n" + line[:20])
    assert [one["step"] for one in tail.read()] == [2]
    assert [one["step"] for one in tail.rows] == [1, 2]


def test_lines_that_are_no_rows_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = json.dumps(row(3, 1.0))
    path.write_bytes(b'{"step": 1, "lo\n[1]\n\xff\xfe\n{"step": 2, "loss": "x", "time": 1}\n' + good.encode() + b"\n")
    assert [one["step"] for one in Tail(path).read()] == [3]


@pytest.mark.parametrize("more", [0, 3], ids=["shorter", "longer"])
def test_a_resume_that_replaces_the_file_drops_its_lines(tmp_path, more):
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 6):
        append(tmp_path, row(step, float(step)))
    tail = Tail(path)
    assert [one["step"] for one in tail.read()] == [1, 2, 3, 4, 5]
    Metrics(str(tmp_path), Trackers(), last_step=3, writes=True)
    for step in range(4, 4 + more):
        append(tmp_path, row(step, 100.0 + step))
    assert [one["step"] for one in tail.read()] == [1, 2, 3, *range(4, 4 + more)]
    assert [one["time"] for one in tail.rows][3:] == [100.0 + step for step in range(4, 4 + more)]


def test_a_file_rewritten_in_place_is_noticed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row(1, 1.0)) + "\n")
    tail = Tail(path)
    tail.read()
    inode = path.stat().st_ino
    path.write_text(json.dumps(row(7, 1.0)) + "\n" + json.dumps(row(8, 2.0)) + "\n")
    assert path.stat().st_ino == inode and [one["step"] for one in tail.read()] == [7, 8]


def test_of_a_long_file_only_the_end_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    long = "".join(json.dumps(row(step, float(step), layers="x" * 5000)) + "\n" for step in range(1, 400))
    path.write_text(long)
    assert path.stat().st_size > FIRST_BYTES
    tail = Tail(path)
    steps = [one["step"] for one in tail.read()]
    assert 50 < len(steps) < 300 and steps == list(range(steps[0], 400))
    append(tmp_path, row(400, 400.0))
    assert [one["step"] for one in tail.read()] == [400]


def test_ages_after_the_first_look_do_not_depend_on_another_hosts_clock(tmp_path):
    run = Run(made(tmp_path))
    append(tmp_path, row(8, time.time() - 3600))  # of a host whose clock is late
    run.read()
    assert run.state().silent_s == pytest.approx(0, abs=2)


@pytest.mark.parametrize("make, message", [
    (lambda path: None, "does not exist; give a run's folder"),
    (lambda path: path.write_text(""), "is a file"),
    (lambda path: path.mkdir(), "is not a run's folder"),
    (lambda path: (path / "metrics.jsonl").mkdir(parents=True), "cannot be read"),
])  # fmt: skip
def test_what_is_no_run_is_refused_in_one_line(tmp_path, make, message):
    make(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        elas(["watch", str(tmp_path / "run")])


def test_a_folder_in_a_runs_folder_names_the_run(tmp_path):
    checkpoint(made(tmp_path), 6)
    with pytest.raises(UserError, match=rf"did you mean {tmp_path}\?$"):
        elas(["watch", str(tmp_path / "checkpoints")])
    with pytest.raises(UserError, match=rf"did you mean {tmp_path}\?$"):
        elas(["report", str(tmp_path / "checkpoints")])


@pytest.mark.parametrize("name", ["DONE", "run.json", "config.json", "REQUEUE"])
def test_results_never_overwrite_a_file_of_the_run(tmp_path, name):
    before = {path.name for path in made(tmp_path).iterdir()}
    with pytest.raises(UserError, match="--json"):
        elas(["watch", str(tmp_path), "--once", "--json", str(tmp_path / name)])
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("option, value", [
    ("--every", "0"), ("--every", "-1"), ("--every", "nan"), ("--every", "inf"), ("--wait", "-1"), ("--wait", "inf"),
])  # fmt: skip
def test_an_interval_that_is_none_is_refused(tmp_path, option, value):
    with pytest.raises(UserError, match=option):
        elas(["watch", str(made(tmp_path)), option, value])


def test_once_prints_how_it_stands_and_writes_it(tmp_path, capsys):
    folder = made(tmp_path / "run")
    assert elas(["watch", str(folder), "--once", "--json", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert "step        6/40\n" in out and "loss        8.4000, mean 9.1000 of 2\n" in out and "\x1b" not in out
    (facts,) = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert (facts["state"], facts["step"], facts["loss"], facts["usual_s"]) == ("training", 6, 8.4, pytest.approx(4.0))


def test_several_runs_are_rows_of_a_table(tmp_path, capsys):
    one, two = made(tmp_path / "one"), made(tmp_path / "two", steps=(2,))
    write_marker(str(two), {"step": 40, "checkpoint": None}, "")
    assert elas(["watch", str(one), str(two), "--once"]) == 0
    head, _, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["run", "step", "loss", "ppl"]
    assert first.split()[:3] == [str(one), "6/40", "8.4000"] and first.split()[-2] == "training,"
    assert second.split()[:3] == [str(two), "2/40", "8.8000"] and second.split()[-1] == "done"


def test_a_pipe_gets_a_line_for_each_step_until_the_end(tmp_path):
    """Each change of the files waits for the line of the one before, so that slow machines see all of them."""
    folder = made(tmp_path)
    command = [sys.executable, "-m", "elas.cli", "watch", str(folder), "--every", "0.05"]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines = [watching.stdout.readline().rstrip()]
    append(folder, row(8, time.time()))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    lines.append(watching.stdout.readline().rstrip())
    Metrics(str(folder), Trackers(), last_step=4, writes=True)  # a resume
    for step in (6, 8, 10):
        append(folder, row(step, time.time()))
    append(folder, {"step": 10, "loss": 3.0, "ppl": 20.1, "tokens": 9, "share": 1, "time": time.time()},
           "validation")  # fmt: skip
    lines += [watching.stdout.readline().rstrip() for _ in range(4)]
    write_marker(str(folder), {"step": 10, "checkpoint": None}, "SIGINT")
    rest = watching.communicate(timeout=60)[0].splitlines()
    assert watching.returncode == 0
    assert [line.partition("  loss")[0].partition("  validation")[0] for line in lines] == [
        "step  6/40", "step  8/40", "step  6/40", "step  8/40", "step 10/40", "step     10",
    ]  # fmt: skip
    assert lines[0] == step_line(row(6, 0.0), 40) and "perplexity 20.1" in lines[-1]
    assert len(rest) == 1 and rest[0].startswith("stopped at step 10 (SIGINT), 0:0")


def test_a_terminal_gets_a_block_and_a_snapshot_at_the_end(tmp_path, monkeypatch):
    pytest.importorskip("pyte", reason="pyte, of the extra dev, shows what is on a terminal")
    from support.terminal import Terminal

    monkeypatch.setenv("TERM", "xterm-256color")
    folder, seen = made(tmp_path / "run"), []
    monkeypatch.chdir(tmp_path)
    with Terminal(80) as terminal:

        def train() -> None:
            terminal.wait_for(lambda: any("training: last line" in line for line in terminal.below()))
            seen.extend(terminal.below())
            append(folder, row(8, time.time()))
            terminal.wait_for(lambda: any(line.startswith("step 8/40") for line in terminal.below()))
            write_marker("run", {"step": 8, "checkpoint": None}, "SIGTERM")

        thread = threading.Thread(target=train)
        thread.start()
        assert elas(["watch", "run", "--every", "0.1"]) == 0
        thread.join()
        lines = terminal.lines()
    assert seen[:2] == ["", "run"] and seen[2].startswith("step 6/40 ━") and "memory     1.0 GB" in seen[4] + seen[5]
    assert lines[0] == "run         run" and lines[1].startswith("state       stopped at step 8 (SIGTERM)")
    assert lines[2] == "step        8/40" and not any("━" in line for line in lines)


def test_a_folder_that_goes_away_ends_the_watch_in_one_line(tmp_path):
    run = Run(made(tmp_path / "run"))
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="the folder is gone"):
        run.read()


def test_a_closed_pipe_ends_it(tmp_path):
    command = [sys.executable, "-m", "elas.cli", "watch", str(made(tmp_path)), "--every", "0.1"]
    watch = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert watch.stdout is not None and watch.stdout.readline().startswith("step  6/40")
    watch.stdout.close()
    append(tmp_path, row(8, time.time()))
    assert watch.wait(60) == 141 and watch.stderr is not None and watch.stderr.read() == ""


def test_it_starts_without_torch(tmp_path):
    code = "import sys; from elas.cli import run; run(sys.argv[1:]); print({'torch', 'deepspeed'} & {*sys.modules})"
    command = [sys.executable, "-c", code, "watch", str(made(tmp_path)), "--once"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
