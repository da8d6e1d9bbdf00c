"""What is reported from given facts: those of GPUs, which not every machine has, and the pure parts of a check."""

import copy

import pytest
from filelock import FileLock

from elas import extensions
from elas.errors import UserError
from elas.launch.preflight import check
from elas.launch.preflight.channels import NO_PYTHON, NoAnswer, _exited
from elas.launch.preflight.compare import GIB, Problem, Wanted, compare
from elas.launch.preflight.probe import Answers, say
from elas.launch.preflight.survey import choose_master_address, lines
from elas.launch.preflight.unanswered import unanswered

GOOD = {
    "folder": "/w", "executable": "/w/python", "python": "3.11.7", "package": "/w/launch", "source": "abc",
    "versions": {"torch": "2.13.0", "deepspeed": "0.19.8", "megatron-core": "0.16.1", "elas": "0.1.0"},
    "cpus": 64, "memory": 512 * GIB, "shm_total": 64 * GIB, "shm_free": 64 * GIB,
    "gpus": ["NVIDIA H100"] * 8, "driver": "550.1", "gpu_error": None,
    "stale_locks": [], "compiler": "/usr/bin/c++",
    "hostname": "n", "hostname_addresses": ["10.0.0.1"], "interface": "eth0", "clock_offset": 0.0,
    "interfaces": [{"name": "eth0", "addresses": ["10.0.0.1"], "mtu": 1500}],
    "port": 1, "port_error": None, "run_dir": None, "files": {}, "reached": {}, "sees_file": False, "resolves": {},
}  # fmt: skip
WANTED = Wanted({"n1": 8, "n2": 8}, None, "/w", "/w/python", None, GIB)


def problems(**of_second) -> list[Problem]:
    return compare({"n1": copy.deepcopy(GOOD), "n2": {**copy.deepcopy(GOOD), **of_second}}, WANTED)


def test_nothing_is_wrong_with_good_hosts():
    assert problems() == []


@pytest.mark.parametrize(
    "facts, check, value, words",
    [
        ({"gpus": ["NVIDIA A100"] * 8}, "gpus", "NVIDIA A100", "differs from n1's (NVIDIA H100)"),
        ({"gpus": ["NVIDIA H100"] * 7}, "slots", "7 GPUs", "give it slots=7"),
        ({"gpus": []}, "gpus", "none", "NVIDIA H100"),
        ({"driver": "535.2"}, "driver", "535.2", "550.1"),
        ({"gpu_error": "driver/library version mismatch"}, "nvidia-smi", "fails", "version mismatch"),
        ({"versions": {**GOOD["versions"], "deepspeed": None}}, "deepspeed", "none", "pip install deepspeed"),
        ({"package": "/other/launch"}, "elas", "/other/launch", "is at another path"),
        ({"gpus": [], "compiler": None}, "compiler", "none", "install g++"),
        ({"clock_offset": -60.0}, "clock", "-60.0 s", "time service"),
        ({"interfaces": []}, "interface", "none", "ip -br address"),
        ({"interfaces": [{"name": "eth0", "addresses": ["10.0.0.2"], "mtu": 9000}]}, "mtu", "9000", "(1500)"),
        ({"reached": {"n1": {}}}, "network", "n2 → n1", "firewalls"),
    ],
)
def test_each_difference_is_told_with_its_fix(facts, check, value, words):
    (problem,) = [p for p in problems(**facts) if p.check == check]
    assert (problem.host, problem.value) == ("n2", value)
    assert words in str(problem)


@pytest.mark.parametrize(
    "status, error, check, words",
    [
        (255, "ssh: connect to host n2 port 22: Connection refused", "reachable", "start sshd"),
        (255, "Host key verification failed.", "reachable", "log in once by hand"),
        (255, "kex_exchange_identification: read: reset", "reachable", "ssh -o BatchMode=yes n2 true"),
        (None, "", "reachable", "in time"),
        (NO_PYTHON, "", "python", "at the same path"),
        (1, "/w/python: No module named elas.launch.preflight.probe", "elas", "pip install"),
        (1, "MemoryError", "python", "ended with status 1 (MemoryError)"),
    ],
)
def test_no_answer_is_told_by_its_cause(status, error, check, words):
    problem = unanswered("n2", NoAnswer(status, error), WANTED, "ssh")
    assert (problem.host, problem.check) == ("n2", check)
    assert words in str(problem)


def test_hosts_with_the_same_problem_share_a_line():
    same = [Problem(f"n{i}", "torch", "2.0", "is old", "update it") for i in range(9)]
    noted = Problem("n1", "clock", "9 s", "is late", "see to it", "warning")
    assert lines([noted, *same]) == [
        "✗ n0, n1, n2, n3 and 5 more: torch: 2.0 – is old; update it",
        "! n1: clock: 9 s – is late; see to it",
    ]


def reached(*addresses: str, named: str) -> dict:
    return {**GOOD, "reached": {"n1": {a: ["", ""] for a in addresses}}, "resolves": {"n1": [named]}}


def test_the_master_address_is_one_that_all_hosts_reach():
    own = {"interfaces": [{"addresses": ["10.1.0.1"]}, {"addresses": ["10.0.0.1", "10.0.0.9"]}]}
    first = {**GOOD, **own}
    named = {"n1": first, "n2": reached("10.1.0.1", "10.0.0.1", named="10.0.0.1")}
    assert choose_master_address(named, "n1") == "10.0.0.1"
    unlike = {**named, "n3": reached("10.1.0.1", named="127.0.1.1")}
    assert choose_master_address(unlike, "n1") == "10.1.0.1"
    assert choose_master_address({"n1": first, "n2": reached(named="10.0.0.1")}, "n1") is None
    assert choose_master_address({"n1": first}, "n1") == "10.1.0.1"


def test_long_answers_arrive_whole_between_other_lines(capsys):
    given = {"text": " ".join(map(str, range(1000)))}
    say("n1", given)
    pieces = capsys.readouterr().out.splitlines()
    assert len(pieces) > 3 and max(map(len, pieces)) < 1000
    answers = Answers()
    taken = [answers.take(line) for piece in pieces for line in ("Welcome!", f" 0: {piece}")]
    assert [t for t in taken if t] == [("n1", given)]


def test_what_srun_says_of_tasks():
    assert _exited("srun: error: n[1-2,5]: tasks 0-1,4: Exited with exit code 91") == ({0, 1, 4}, 91)
    assert _exited("srun: error: n2: task 1: Exited with exit code 1") == ({1}, 1)
    assert _exited("srun: launching") == (set(), 0)


def test_stale_build_locks_are_cleared_but_not_live_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stale, held = (tmp_path / "elas" / "extensions" / "torch1" / name / "lock" for name in ("a", "b"))
    for lock in (stale, held):
        lock.parent.mkdir(parents=True)
        lock.touch()
    with FileLock(held.parent.parent / "b.elas-lock"):
        assert extensions.clear_stale_locks() == [stale]
    assert not stale.exists() and held.exists()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--hostfile=h", "--slurm"], "--hostfile and --slurm"),
        (["--hostfile=h", "--ranks=2"], "--ranks 2"),
        (["--nodes=2"], "--nodes 2: requires --slurm"),
        (["--ranks=0"], "--ranks"),
        (["--master-port=70000"], "--master-port"),
        (["--min-shm-gb=-1"], "--min-shm-gb -1.0"),
        (["--hostfile=/no/such/file"], "--hostfile /no/such/file"),
        (["--tarin.steps=3"], "tarin.steps"),
    ],
)
def test_a_mistake_in_the_options_is_one_line(argv, words):
    with pytest.raises(UserError) as caught:
        check.main(argv)
    assert words in str(caught.value) and "\n" not in str(caught.value)
