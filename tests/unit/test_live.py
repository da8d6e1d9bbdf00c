"""The block of a run on a terminal: what is on the screen, above it and after it, and that pipes never see it."""

import os
import re
import sys
import threading
import time

import pytest

from elas.console import Console, Screen
from elas.live import View, render
from elas.train.lines import step_line, validation_line
from elas.train.progress import Progress
from elas.train.standing import Standing

pytest.importorskip("pyte", reason="pyte, of the extra dev, shows what is on a terminal")

from support.terminal import Terminal

ROW = {"step": 120, "tokens": 12_345_678, "loss": 3.4211, "loss_mean": 3.45, "loss_steps": 10, "grad_norm": 1.2,
       "lr": 1e-3, "tokens_per_s": 12345.6, "step_s": 2.0, "mfu": 0.412, "memory_peak_bytes": 3_400_000_000,
       "sparsity": 0.5, "dropped": 0.12}  # fmt: skip
VALID = {"step": 100, "loss": 3.81, "ppl": 45.15, "tokens": 4096, "samples": 4, "share": 1.0}
FULL = View(
    title="runs/60m", step=120, steps=400, now="step 121: micro-batch 3 of 8, 0:05 left of 0:09", tokens=12_345_678,
    loss=3.4211, loss_mean=3.45, loss_steps=10, ppl=45.15, valid_step=100, tokens_per_s=12345.6, mfu=0.412, left_s=725,
    memory_bytes=3_400_000_000, sparsity=0.5, dropped=0.12, checkpoint=100, checkpoint_age_s=125.0,
)  # fmt: skip
AT_80 = [
    "runs/60m",
    "step 120/400 ━━━━━━━━━━━━━━━━━━╸━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━ 30%",
    "loss       3.4211, mean 3.4500 of 10      left       12:05",
    "perplexity 45.1 at step 100               speed      12,346 tok/s, MFU 41.2%",
    "checkpoint step 100, 2:05 ago             tokens     12,345,678",
    "memory     3.4 GB                         sparsity   zeros 50.0%, dropped 12.0%",
    "step 121: micro-batch 3 of 8, 0:05 left of 0:09",
]
AT_40 = [
    "runs/60m",
    "step 120/400 ━━━━━━╸━━━━━━━━━━━━━━━ 30%",
    "loss       3.4211, mean 3.4500 of 10",
    "left       12:05",
    "perplexity 45.1 at step 100",
    "speed      12,346 tok/s, MFU 41.2%",
    "checkpoint step 100, 2:05 ago",
    "tokens     12,345,678",
    "memory     3.4 GB",
    "sparsity   zeros 50.0%, dropped 12.0%",
    "step 121: micro-batch 3 of 8, 0:05 left",
    "of 0:09",
]


@pytest.fixture(autouse=True)
def _a_terminal_with_colours(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


def plain(lines: list[str]) -> list[str]:
    return [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in lines]


def full(screen: Screen) -> list[str]:
    return render(FULL, screen)


@pytest.mark.parametrize("columns, block", [(80, AT_80), (40, AT_40)])
def test_the_block_is_below_the_lines_that_stay_and_goes_without_a_trace(columns, block):
    with Terminal(columns) as terminal:
        console = Console()
        console.say("first")
        console.block(full)
        assert terminal.lines() == ["first", "", *block] and terminal.below() == ["", *block]
        console.say("second")
        console.redraw()
        assert terminal.lines() == ["first", "second", "", *block]
        console.block(None)
        console.say("third")
        assert terminal.lines() == ["first", "second", "third"]
        assert terminal.cursor_is_visible and terminal.wraps
        assert b"\x1b[?25l" not in terminal.bytes  # never hidden, so that no kill leaves it hidden


@pytest.mark.parametrize("reflows", [False, True])
@pytest.mark.parametrize("before, after, block", [(80, 40, AT_40), (40, 80, AT_80)])
def test_a_resized_terminal_shows_the_block_once(before, after, block, reflows):
    with Terminal(before) as terminal:
        console = Console()
        console.say("first")
        console.block(full)
        terminal.resize(after, reflows=reflows)
        console.redraw()
        assert terminal.lines() == ["first", "", *block]
        console.say("second")
        console.block(None)
        assert terminal.lines() == ["first", "second"]


def test_a_terminal_that_narrows_while_it_is_drawn_on_does_not_wrap():
    with Terminal(80) as terminal:
        console = Console()
        console.say("first")
        console.block(full)
        wide = console.screen
        terminal.resize(40, reflows=True)
        console.block(lambda screen: render(FULL, wide))  # the size it had when it was asked
        assert len(terminal.below()) == 1 + len(AT_80)
        console.block(None)
        assert terminal.lines() == ["first"]


@pytest.mark.parametrize("columns", [1, 2, 11, 20, 39, 71, 72, 79, 80, 200])
@pytest.mark.parametrize("rows", [1, 3, 6, 24])
def test_no_line_reaches_the_last_column(columns, rows):
    for view in (FULL, View(), View(steps=7, step=9, loss=float("nan"), left_s=0.0, now="x" * 300)):
        lines = plain(render(view, Screen(columns, rows, "utf-8")))
        assert lines and max(map(len, lines)) <= max(1, columns - 1)
    if rows >= 6:
        assert len(render(FULL, Screen(columns, rows, "utf-8"))) <= rows - 2


def test_few_rows_keep_the_position_and_what_matters_most():
    with Terminal(40, rows=8) as terminal:
        for number in range(10):
            Console().say(f"line {number}")
        console = Console()
        console.block(full)
        assert terminal.below() == ["", *AT_40[:4], *AT_40[-2:]]
        console.redraw()
        console.block(None)
        assert terminal.lines() == [f"line {number}" for number in range(10)]


def test_a_block_higher_than_the_terminal_is_cut():
    with Terminal(40, rows=8) as terminal:
        console = Console()
        console.say("first")
        console.block(lambda screen: [f"row {number}" for number in range(20)])
        for _ in range(3):
            console.redraw()
        assert terminal.lines() == ["first", "", *(f"row {number}" for number in range(6))]
        console.block(None)
        assert terminal.lines() == ["first"]


def test_lines_of_many_threads_all_stay_above_the_block():
    with Terminal(80) as terminal:
        console, error = Console(), Console("err")
        console.block(full)

        def talk(who: int) -> None:
            for number in range(40):
                (console if who % 2 else error).say(f"{who}-{number}")
                console.redraw()

        threads = [threading.Thread(target=talk, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert terminal.below() == ["", *AT_80]
        console.block(None)
        lines = terminal.lines()
    assert sorted(lines) == sorted(f"{who}-{number}" for who in range(4) for number in range(40))
    for who in range(4):
        assert [line for line in lines if line.startswith(f"{who}-")] == [f"{who}-{number}" for number in range(40)]


def test_what_another_process_prints_is_kept():
    with Terminal(80) as terminal:
        console = Console()
        console.block(full)
        os.write(sys.stdout.fileno(), b"a rank's error\n")
        console.redraw()
        assert terminal.lines() == ["a rank's error", "", *AT_80]
        console.block(None)
        assert terminal.lines() == ["a rank's error"]


def test_an_error_or_ctrl_c_removes_the_block():
    for error in (RuntimeError, KeyboardInterrupt):
        with Terminal(80) as terminal:
            with pytest.raises(error), Progress(Console(), 400, shows=True) as progress:
                progress.say("first")
                terminal.wait_for(lambda: any(line.startswith("starting, for 0:0") for line in terminal.lines()))
                raise error
            assert terminal.lines() == ["first"] and terminal.cursor_is_visible and terminal.wraps


def test_the_last_line_of_a_process_removes_the_block_for_good():
    with Terminal(80) as terminal:
        console = Console()
        console.block(full)
        Console("err").last("error: ended at once")
        console.redraw()
        assert terminal.lines() == ["error: ended at once"]


def test_a_killed_process_leaves_a_block_that_is_cleared():
    with Terminal(80) as terminal:
        console = Console()
        console.block(full)
        Console._shown = None  # it is gone, and its lines are still there
        Console("err").clear_below()
        print("error: the run did not complete", flush=True)
        assert terminal.lines() == ["error: the run did not complete"]


def test_a_closed_terminal_ends_nothing():
    with Terminal(80) as terminal:
        console = Console()
        console.block(full)
        terminal.close()
        console.say("lost")
        console.redraw()
        assert sys.stdout.name == os.devnull and not console.has_blocks
        console.block(None)
    assert Console._shown is None


def test_a_training_run_shows_its_values(tmp_path):
    checkpoint = tmp_path / "step_00000100"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").touch()
    os.utime(checkpoint / "manifest.json", (time.time() - 125,) * 2)
    saved = Standing(checkpoint, 100, unsaved=True)
    with Terminal(80) as terminal:
        with Progress(Console(), 400, shows=True, standing=lambda: saved) as progress:
            progress.validated(VALID)
            progress.logged(ROW, more_s=165.0)
            progress.begin("step 121", 8)
            progress.at(1)
            progress.console.redraw()
            lines = [re.sub(r"2:0[5-9] ago", "2:05 ago", line) for line in terminal.below()]
            lines = [re.sub(r"12:0[0-5]|11:5\d", "12:05", line) for line in lines]
            assert lines[1:-1] == AT_80[1:-1] and lines[-1].startswith("step 121: micro-batch 1 of 8, for 0:0")
            progress.stepped(121, 12_400_000, 3.5)
            progress.console.redraw()
            assert [line for line in terminal.below() if "step 121/400" in line or "loss       3.5000, mean" in line]
        kept = terminal.lines()
    assert kept[-1] == step_line(ROW, 400, 80, more_s=165.0) and len(kept) == 3
    assert f"{kept[0]} {kept[1].strip()}" == validation_line(VALID)  # wrapped between words


def test_a_rollback_shows_no_loss_of_a_step_that_is_taken_back():
    with Terminal(80) as terminal, Progress(Console(), 400, shows=True) as progress:
        progress.stepped(121, 1000, 9.9)
        progress.console.redraw()
        assert any("9.9" in line for line in terminal.below())
        progress.stepped(100, 900)
        progress.console.redraw()
        shown = terminal.below()
        assert shown[1].startswith("step 100/400") and not any("9.9" in line for line in shown)


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(term, monkeypatch):
    monkeypatch.setenv("TERM", term)
    with Terminal(80) as terminal:
        with Progress(Console(), 400, shows=True) as progress:
            progress.interval = 0.2
            progress.begin("validation", 10)
            terminal.wait_for(lambda: bool(terminal.lines()))
        assert terminal.lines()[0].startswith("validation: micro-batch 1 of 10, for 0:0")
        assert b"\x1b" not in terminal.bytes


def test_without_a_terminal_lines_are_those_of_before(capsys):
    with Progress(Console(), 400, shows=True) as progress:
        progress.stepped(119, 1000, 3.4)
        progress.validated(VALID)
        progress.logged(ROW, more_s=61.0)
        progress.console.redraw()
    assert capsys.readouterr().out == f"{validation_line(VALID)}\n{step_line(ROW, 400, more_s=61.0)}\n"


def test_without_colours_there_are_none(monkeypatch):
    coloured = re.compile(r"\x1b\[(?:\d+;)*(?:3\d|4\d|38|9\d)(?:;\d+)*m")
    assert coloured.search("".join(full(Screen(80, 24, "utf-8"))))
    monkeypatch.setenv("NO_COLOR", "1")
    lines = full(Screen(80, 24, "utf-8"))
    assert not coloured.search("".join(lines)) and plain(lines)[2:] == AT_80[2:]


def test_a_terminal_without_unicode_gets_what_it_can_show():
    view = View(title="läufe/60m", step=1, steps=2)
    lines = plain(render(view, Screen(80, 24, "ascii")))
    assert lines[0] == "l?ufe/60m" and lines[1].isascii() and lines[1].startswith("step 1/2 ---")
