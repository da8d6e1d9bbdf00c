"""The guard of one host's part: whatever happens to whom, nothing is left, and it says what it was."""

import os
import signal
import subprocess
import sys
import time

import pytest
from lab.hosts import wait_for

from elas import failed_rank
from elas.config import Config
from elas.launch.guard import supervise
from elas.launch.guard.guard import Guard
from elas.launch.guard.processes import Process, descendants, exit_code, status_in_words
from elas.launch.job import Job
from elas.run_dir import write_marker

pytestmark = pytest.mark.timeout(60)


def test_the_launcher_says_what_a_second_signal_loses(tmp_path, capsys, monkeypatch):
    config = Config()
    config.train.run_dir = str(tmp_path)
    write_marker(str(tmp_path), {"step": 1}, "SIGINT")  # of an earlier start
    made = supervise.Supervisor(["true"], {"n1": range(2)}, None, {}, Job(config, [], 2).new_stop())
    made._asked, clock = [signal.SIGINT], [time.monotonic()]
    monkeypatch.setattr(supervise.time, "monotonic", lambda: clock[0])

    def said(seconds: float) -> str:
        clock[0] += seconds
        made._report_waiting()
        return capsys.readouterr().err

    waits = "waiting for ranks 0-1 on n1 to end"
    assert said(1) == "" and f"SIGINT: {waits} (9 s); a second one kills them at once, and what was " in said(8)
    write_marker(str(tmp_path), {"step": 7}, "SIGINT")
    assert said(
        0.2
    ) == "" and f"the run has stopped, {waits} (11 s); a second one kills them at once and loses" in said(2)


RANK = """
import os, signal, subprocess, sys, time
def save(number, frame):
    os.write(1, f"saved {os.environ['RANK']} {signal.Signals(number).name}\\n".encode())
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, save)
subprocess.Popen(["sleep", "300"])  # a loader, say
os.write(1, f"rank {os.environ['RANK']}\\n".encode())
time.sleep(300)
"""
LAUNCHER = """
import os, subprocess, sys, time
ranks = [subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={**os.environ, "RANK": str(r)}) for r in range(2)]
while any(rank.poll() is None for rank in ranks):
    time.sleep(1)
    if any(rank.poll() for rank in ranks):
        sys.exit(5)
"""


@pytest.fixture
def guard(tmp_path):
    """Starts a guard of a launcher of two ranks; returns it when both are there."""
    started = []

    def start(*options: str, ranks: str = RANK) -> subprocess.Popen:
        output = (tmp_path / "output").open("w")
        process = subprocess.Popen(
            [sys.executable, "-m", "elas.launch.guard", "--host", "here", "--label", "ranks 0-1", *options, "--",
             sys.executable, "-c", LAUNCHER, ranks],
            stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        assert wait_for(lambda: said(tmp_path).count("rank ") == 2, 20)
        time.sleep(0.3)  # it has seen both
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def said(tmp_path) -> str:
    return (tmp_path / "output").read_text()


def ranks_of(guard: subprocess.Popen) -> dict[int, int]:
    return {p.rank: p.pid for p in descendants(guard.pid) if p.rank is not None}


def ended(guard: subprocess.Popen, below: list, seconds: float = 15) -> int:
    """The guard's exit status, when nothing of what was below it is left."""
    status = guard.wait(timeout=seconds)
    assert wait_for(lambda: not any(os.path.exists(f"/proc/{p.pid}") for p in below), 3)
    return status


def test_a_killed_rank_is_named_and_the_rest_ends(guard, tmp_path):
    process = guard()
    below = descendants(process.pid)
    victim = ranks_of(process)[1]
    os.kill(victim, signal.SIGKILL)
    assert ended(process, below) == 5 and len(below) == 5
    assert f"error: here: rank 1 (process {victim}) was killed by SIGKILL\n" in said(tmp_path)


def test_ranks_read_which_of_them_failed(tmp_path, monkeypatch):
    path = tmp_path / "failed"
    monkeypatch.setenv(failed_rank.VARIABLE, str(path))
    assert failed_rank.FailedRanks().first() == ""
    failed_rank.report(path, "rank 1 is gone")
    since = failed_rank.FailedRanks()  # of a start after that
    assert since.first() == ""
    failed_rank.report(path, "rank 2 is gone")
    failed_rank.report(path, "rank 0 was killed by SIGTERM")
    assert since.first() == "rank 2 is gone"
    failed_rank.report(tmp_path / "no folder" / "failed", "rank 3 is gone")
    monkeypatch.delenv(failed_rank.VARIABLE)
    assert failed_rank.FailedRanks().first() == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_goes_to_the_ranks_alone(guard, tmp_path, number):
    process = guard()
    below = descendants(process.pid)
    process.send_signal(number)
    assert ended(process, below) == 0
    printed = said(tmp_path)
    assert f"saved 0 {number.name}\n" in printed and f"saved 1 {number.name}\n" in printed and "error" not in printed


def test_a_request_to_stop_reaches_ranks_that_a_busy_guard_has_not_seen_yet(guard, tmp_path):
    ranks = RANK.replace("import os,", "import os; os.kill(int(os.environ['ELAS_GUARD']), 19)  # SIGSTOP\nimport os,")
    process = guard(ranks=ranks)
    below = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    assert ended(process, below) == 0
    assert "saved 0 SIGINT\n" in said(tmp_path) and "saved 1 SIGINT\n" in said(tmp_path)


def test_a_child_of_a_rank_that_is_ending_is_no_rank():
    made = Guard(["true"], host="here", label="ranks 0-1", leash=False)
    made._find_ranks([Process(10, 9, "S", 0, None), Process(11, 10, "S", 0, 0), Process(12, 11, "S", 0, None)])
    ending = [Process(11, 10, "R", 0, None), Process(12, 11, "S", 0, 0), Process(13, 12, "S", 0, 0)]
    made._find_ranks([Process(10, 9, "S", 0, None), *ending, Process(14, 10, "S", 0, 1)])
    assert made._ranks == {11: 0, 14: 1}


def test_before_training_a_request_to_stop_ends_everything(guard, tmp_path):
    process = guard(ranks=RANK.replace("signal.signal(", "print("))
    below = descendants(process.pid)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert ended(process, below) != 0 and time.monotonic() - start < 5


@pytest.mark.parametrize("silence", ["0", "2"])
def test_a_leash_that_breaks_ends_the_job(guard, tmp_path, silence):
    process = guard("--leash", "--silence", silence)
    below = descendants(process.pid)
    if silence == "0":
        process.stdin.close()
    assert ended(process, below) == 1
    why = "the launcher is gone" if silence == "0" else "no heartbeat from the launcher for 2 s"
    assert f"error: here: {why}; ending rank 0 (process" in said(tmp_path)
    assert "saved 0" in said(tmp_path) and "saved 1" in said(tmp_path)


def test_a_kill_over_the_leash_waits_for_nobody(guard, tmp_path):
    process = guard("--leash")
    below = descendants(process.pid)
    process.stdin.write(b"+\nkill\n")
    process.stdin.flush()
    assert ended(process, below) != 0 and "saved" not in said(tmp_path)


def test_a_rank_that_stands_still_ends_the_job(guard, tmp_path):
    process = guard("--stopped", "1")
    below = descendants(process.pid)
    os.kill(ranks_of(process)[0], signal.SIGSTOP)
    assert ended(process, below) != 0
    assert "error: here: rank 0 (process" in said(tmp_path) and "has been stopped by a signal" in said(tmp_path)


def test_ranks_that_their_launcher_leaves_behind_are_ended(guard, tmp_path):
    process = guard()
    below = descendants(process.pid)
    os.kill(below[0].pid, signal.SIGKILL)
    assert ended(process, below) == 137
    assert "error: here: the process that started ranks 0-1 was killed by SIGKILL; ending rank 0 (process" in said(
        tmp_path
    )


def test_a_program_that_is_not_there(tmp_path):
    done = subprocess.run([sys.executable, "-m", "elas.launch.guard", "--host", "h", "--", "no-such-program"],
                          capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stderr) == (127, "error: h: no-such-program: no such program\n")


def test_statuses_in_words():
    assert (exit_code(9), status_in_words(9)) == (137, "was killed by SIGKILL")
    assert (exit_code(3 << 8), status_in_words(3 << 8)) == (3, "ended with status 3")
