"""What is read before a start, and what is made of what a run left."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from elas.errors import UserError
from elas.launch import verdict
from elas.launch.hostfile import ranks_by_host, ranks_in_words, read_hostfile
from elas.launch.job import how_it_ended
from elas.launch.ssh.variables import deepspeed_argument, deepspeed_environment, forwarded
from elas.slurm import check_partition

JOB = SimpleNamespace(config=SimpleNamespace(train=SimpleNamespace(steps=10)))
DONE, LATER = '{"step": 10, "checkpoint": "c", "time": 1}', '{"step": 10, "checkpoint": "c", "time": 2}'


@pytest.mark.parametrize(
    "before, after, status, state",
    [
        ({}, {"DONE": DONE}, 0, "done"),
        ({}, {"DONE": DONE}, 1, "done"),  # the launcher stumbled after the end
        ({}, {}, 0, "failed"),  # a launcher that says 0
        ({}, {"REQUEUE": DONE}, 0, "stopped"),
        ({"DONE": DONE}, {"DONE": DONE}, 0, "done"),  # nothing was left to do
        ({"DONE": DONE}, {"DONE": DONE}, 1, "failed"),  # an old marker says nothing about this start
        ({"DONE": '{"step": 5}'}, {"DONE": '{"step": 5}'}, 0, "failed"),
        ({"DONE": DONE}, {"DONE": LATER}, 0, "done"),
        ({"REQUEUE": DONE}, {"REQUEUE": DONE}, 0, "failed"),
        ({}, {"DONE": "{"}, 0, "failed"),
        ({}, {"DONE": "3"}, 0, "failed"),
    ],
)
def test_a_run_is_judged_by_a_marker_that_is_new(before, after, status, state):
    assert how_it_ended(JOB, before, after, status).state == state


def test_hostfiles(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("\ufeff# ours\r\n\nn1 slots=2  # big\nn2   slots=1 \r\n")
    hosts = read_hostfile(path)
    assert hosts == {"n1": 2, "n2": 1}
    assert [ranks_in_words(ranks) for ranks in ranks_by_host(hosts).values()] == ["ranks 0-1", "rank 2"]
    read_hostfile(Path(__file__).resolve().parents[2] / "launch" / "ssh" / "hostfile.example")


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "names no host"),
        ("n1\n", "line 1, 'n1'; write HOST slots=N"),
        ("n1 slots=0\n", "line 1"),
        ("n1 slots=1\nn1 slots=1\n", "line 2, n1 is listed twice"),
        ("-oProxyCommand=x slots=1\n", "line 1"),
        ("me@n1 slots=1\n", "line 1, 'me@n1'; give only the host, and set the user in ~/.ssh/config"),
    ],
)
def test_bad_hostfiles_are_one_line(tmp_path, text, said):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UserError, match=r"--hostfile .*hosts: ") as caught:
        read_hostfile(path)
    assert said in str(caught.value)


def test_only_what_is_allowed_travels(tmp_path):
    path = tmp_path / "allowed"
    path.write_text("MINE\nGIVEN=a = b # and a comment\nP_*\n")
    given = {"MINE": "1", "P_A": "2", "SECRET": "3", "NCCL_DEBUG": "INFO", "ELAS_GUARD": "7"}
    assert forwarded([path], given) == {"GIVEN": "a = b", "MINE": "1", "NCCL_DEBUG": "INFO", "P_A": "2"}
    for line in ("A B\n", "1A=2\n", "-x\n"):
        path.write_text(line)
        with pytest.raises(UserError, match="line 1"):
            forwarded([path], given)
    for value in ("two\nlines", " ahead", "behind\t"):
        with pytest.raises(UserError, match="cannot be forwarded"):
            deepspeed_environment({"A": value})


def test_a_partition_has_so_many_nodes():
    listed = "small* 2\nlarge 3\nlarge 5\n"
    for partition, nodes in ((None, 2), ("large", 8), ("small,large", 8)):
        check_partition(listed, partition, "-p", nodes)
    check_partition("small 2\n", None, "-p", 9)  # no default: sbatch will say
    for partition, nodes, said in ((None, 3, "partition small has 2"), ("large", 9, "has 8"), ("x", 1, "small")):
        with pytest.raises(UserError, match=said):
            check_partition(listed, partition, "-p", nodes)


def test_plain_arguments_stay_as_they_are():
    assert deepspeed_argument("--train.run_dir=/a/b_c-1.0,x") == "--train.run_dir=/a/b_c-1.0,x"
    assert deepspeed_argument("$HOME") == '"\\$HOME"' and deepspeed_argument("") == '""'


def test_a_status_is_told_with_its_signal():
    words = {1: "1", 137: "137 (SIGKILL)", 143: "143 (SIGTERM)", 247: "247 (SIGKILL)", 255: "255"}
    assert {status: verdict._in_words(status) for status in words} == words
