"""What people see of a run: times in one format, lines that stay, and one that is cut to the terminal."""

import contextlib
import os
import pty
import re
import signal
import sys
import threading
import time

import pytest

from elas.console import Console, Heartbeat, clock
from elas.train.lines import step_line
from elas.train.progress import Progress

ROW = {"step": 10, "loss": 9.1234, "loss_mean": 9.2, "loss_steps": 10, "grad_norm": 1.234, "lr": 1e-3,
       "tokens_per_s": 12345.6, "sparsity": 0.5, "dropped": 0.25, "step_s": 2.0}  # fmt: skip


@pytest.mark.parametrize("seconds, text", [
    (0, "0:00"), (0.4, "0:00"), (48, "0:48"), (59.6, "1:00"), (725, "12:05"), (3600, "1:00:00"), (11045, "3:04:05"),
    (86399.7, "1d 00:00:00"), (8 * 86400 + 75600, "8d 21:00:00"), (-3, "0:00"),
])  # fmt: skip
def test_a_duration_is_written_in_one_way(seconds, text):
    assert clock(seconds) == text


def test_a_step_line_says_what_is_a_mean_and_what_is_not():
    assert step_line(ROW, 1000) == (
        "step   10/1000  loss 9.1234 (mean of 10: 9.2000)  norm 1.234  lr 1.00e-03  12,346 tok/s  zeros 50.0%  "
        "dropped 25.0%  left 33:00"
    )
    one = step_line({**ROW, "loss_steps": 1, "sparsity": None, "dropped": None}, 1000)
    assert one == "step   10/1000  loss 9.1234  norm 1.234  lr 1.00e-03  12,346 tok/s  left 33:00"


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_a_step_line_leaves_out_what_matters_least(width):
    line = step_line(ROW, 1000, width)
    assert len(line) <= width or width == 40
    assert line.startswith("step   10/1000  loss 9.1234") and line.endswith("left 33:00")
    assert ("dropped" in line) == (width == 200)


def on_terminal(columns: int, function) -> str:
    """What `function` writes to standard output, which is a terminal of so many columns."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    before, sys.stdout = sys.stdout, os.fdopen(theirs, "w")
    try:
        function()
    finally:
        sys.stdout.close()
        sys.stdout = before
    written = b""
    with contextlib.suppress(OSError):  # of a terminal that nothing holds any more, after its last byte
        while part := os.read(ours, 65536):
            written += part
    os.close(ours)
    return written.decode()


@pytest.mark.parametrize("columns", [20, 80, 200])
def test_a_rewritten_line_never_wraps_and_lines_above_it_stay(columns):
    def write():
        console = Console()
        assert console.is_terminal and console.width == columns
        console.live("a" * 300)
        console.say("stays")
        console.live("b" * 300)
        console.live("")

    cut, wipe = columns - 1, "\r\x1b[2K"
    written = on_terminal(columns, write)
    assert written == f"{wipe}{'a' * cut}{wipe}stays\r\n{'a' * cut}{wipe}{'b' * cut}{wipe}"


def test_a_line_that_stays_is_broken_between_words():
    written = on_terminal(30, lambda: Console().say("a line  that is wider than its terminal is"))
    assert written == "a line  that is wider than\r\n  its terminal is\r\n"


def test_without_a_terminal_a_rewritten_line_is_not_written(capsys):
    console = Console()
    console.live("gone")
    console.say("stays")
    assert capsys.readouterr().out == "stays\n"


def test_a_stream_that_is_gone_takes_nothing_and_ends_nothing():
    read, write = os.pipe()
    os.close(read)
    before, sys.stdout = sys.stdout, os.fdopen(write, "w")
    try:
        Console().say("lost")
        assert sys.stdout.name == os.devnull  # what follows goes nowhere, until the process ends
        Console().say("lost too")
    finally:
        sys.stdout.close()
        sys.stdout = before


def test_the_time_left_holds_validations_and_saves_to_come():
    assert step_line(ROW, 1000, more_s=61).endswith("left 34:01")


def test_a_program_that_loads_is_never_silent_for_long(capsys):
    with Heartbeat("starting", silence_s=0.3) as heartbeat:
        time.sleep(0.45)
        heartbeat.begin("loading")
        time.sleep(0.75)
    with Heartbeat("starting", shows=False, silence_s=0.05), Heartbeat("starting", silence_s=60):
        time.sleep(0.2)
    out, err = capsys.readouterr()
    assert out == "" and re.sub(r"\d+", "N", err).splitlines() == ["still starting (N s)", *["still loading (N s)"] * 2]


def test_a_slow_step_says_how_far_it_is_and_how_long_all_take(capsys):
    console = Console()
    with Progress(console, 1000, shows=True) as progress:
        progress.interval = 0.5
        progress.begin("step 1", 64)
        progress.at(1)
        assert progress.text() == "step 1: micro-batch 1 of 64, for 0:00"
        progress._since -= 24
        progress.at(3)
        whole = r"step 1: micro-batch 3 of 64, 12:2\d left of 12:[45]\d; 1,000 such steps take 8d 21:2\d:\d\d"
        assert re.fullmatch(whole, progress.text())
        progress.begin("step 999", 64)
        progress.at(3)
        progress._since -= 24
        assert re.search(r"; 2 such steps take 25:\d\d$", progress.text())
        progress.begin("step 1000", 64)
        progress.at(3)
        progress._since -= 24
        assert re.search(r"left of 12:[45]\d$", progress.text())
        progress.begin("validation", 10)
        progress.at(6)
        progress._since -= 50
        assert progress.text() == "validation: micro-batch 6 of 10, 0:50 left of 1:40"
        deadline = time.monotonic() + 20
        while not (out := capsys.readouterr().out):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert out.startswith("validation: micro-batch 6 of 10, ")


def test_other_ranks_show_nothing(capsys):
    with Progress(Console(), 10, shows=False) as progress:
        progress.say("a line")
    assert capsys.readouterr().out == ""


def test_a_forked_child_can_print_while_another_thread_of_its_parent_does(capfd):
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with Console._lock:
            held.set()
            release.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits for the lock
        Console().say("from the child")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    release.set()
    thread.join()
    assert status == 0 and "from the child" in capfd.readouterr().out
