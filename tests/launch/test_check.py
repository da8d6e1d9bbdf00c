"""`elas launch check` on hosts of a lab: each thing that can be wrong with a host is made wrong for real."""

import json
import subprocess
import sys
import sysconfig
import time
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path

import pytest
from lab import Lab, Slurm, Ssh, why_not
from lab.hosts import wait_for
from support.corpora import SMALL, arguments, write_corpus

from elas import launch
from elas.extensions import prebuild_deepspeed
from elas.launch import pretrain

pytestmark = [
    pytest.mark.timeout(200),
    pytest.mark.skipif(why_not() is not None, reason=f"no lab of hosts: {why_not()}"),
]
SIZES = {"n1": 1, "n2": 1}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"), nodes=5)
    try:
        Ssh(lab)
        yield lab
    finally:
        lab.close()


@pytest.fixture
def check(lab, tmp_path):
    """Runs the command on the head; its exit status, output, and JSON."""

    def run(hosts: dict[str, int], *options: str, **environment: str):
        (tmp_path / "hosts").write_text("".join(f"{name} slots={slots}\n" for name, slots in hosts.items()))
        command = [sys.executable, "-m", "elas.cli", "launch", "check", f"--hostfile={tmp_path / 'hosts'}"]
        done = lab.head.run(
            [*command, f"--json={tmp_path / 'report'}", *options], env=environment, check=False, timeout=100
        )
        assert (tmp_path / "report").exists(), done.stdout + done.stderr
        return done.returncode, done.stdout + done.stderr, json.loads((tmp_path / "report").read_text())

    return run


def found(report: dict, host: str, what: str) -> dict:
    """The problem of a host with a check; it is the only one of them."""
    (problem,) = [p for p in report["problems"] if (p["host"], p["check"]) == (host, what)]
    return problem


def facts(report: dict, host: str) -> dict:
    return next(of for of in report["hosts"] if of["host"] == host)


def nothing_left(lab) -> bool:
    """Whether nothing of a check runs on any host, a moment after."""
    return wait_for(lambda: not any(host.processes() for host in lab.hosts.values()), 5)


def test_fit_hosts(lab, check, tmp_path):
    status, output, report = check(SIZES, f"--train.run_dir={tmp_path / 'run'}")
    assert status == 0 and report["ok"] and not report["problems"], output
    rows = [line.split() for line in output.splitlines()]
    assert ["n1", "✓", "1", "10.77.0.2", "eth0"] in [row[:5] for row in rows]
    assert ["n2", "✓", "1", "10.77.0.3", "eth0"] in [row[:5] for row in rows]
    assert report["master_address"] == "10.77.0.2" and f"10.77.0.2:{report['master_port']}" in output
    bandwidth = report["bandwidth"]
    assert (bandwidth["world"], bandwidth["interface"], bandwidth["backend"]) == (2, "eth0", "gloo")
    assert bandwidth["gb_per_s"] > 0 and bandwidth["latency_s"] > 0
    assert {row["bytes"] for row in bandwidth["rows"]} >= {16 * 2**20}
    assert list(tmp_path.glob(".elas-check-*")) == []
    assert nothing_left(lab)


def test_preflight_takes_two_seconds(lab, check):
    start = time.monotonic()
    status, output, _ = check(SIZES, "--no-collectives")
    assert status == 0, output
    assert time.monotonic() - start < 10  # 1.3 s alone on two cores; room for a busy machine


@contextmanager
def mounted(host, target: Path, *how: str):
    """Within it, a host has something of its own at `target`."""
    host.run(["mount", *how, str(target)])
    try:
        yield
    finally:
        host.run(["umount", str(target)])


def own(host, target: Path, text: str, folder: Path):
    """Within it, a host has a file of its own."""
    (folder / f"{host.name}-{target.name}").write_text(text)
    return mounted(host, target, "--bind", str(folder / f"{host.name}-{target.name}"))


def debians_line(lab, host, folder: Path):
    """Within it, a host knows its own name as loopback alone."""
    text = (lab.folder / "hosts").read_text().replace(f"{host.address} {host.name}\n", f"127.0.1.1 {host.name}\n")
    return own(host, Path("/etc/hosts"), text, folder)


def test_hosts_that_do_not_answer_are_told_apart(lab, check, tmp_path, monkeypatch):
    n2, n3, n4, n5 = lab.nodes[1:]
    project = tmp_path / "shared" / "project"
    project.mkdir(parents=True)
    (finder,) = Path(sysconfig.get_path("purelib")).glob("__editable__*elas*.pth")
    with ExitStack() as broken:
        broken.enter_context(mounted(n2, finder, "--bind", "/dev/null"))
        broken.enter_context(mounted(n3, Path(sys.executable).parent, "-t", "tmpfs", "tmpfs"))
        broken.enter_context(mounted(n4, project.parent, "-t", "tmpfs", "tmpfs"))
        lab.cut(n5)
        broken.callback(lab.plug, n5)
        monkeypatch.chdir(project)
        status, output, report = check(dict.fromkeys(["n1", "n2", "n3", "n4", "n5", "nowhere"], 1))
        monkeypatch.undo()
    assert status == 1 and not report["ok"] and report["bandwidth"] is None
    expected = {
        ("n2", "elas"): "pip install",
        ("n3", "python"): "install the same environment at the same path",
        ("n4", "folder"): "start in a folder that every host has",
        ("n5", "reachable"): "check that the host is up",
        ("nowhere", "reachable"): "fix the name in the hostfile",
    }
    assert {(p["host"], p["check"]) for p in report["problems"]} == set(expected)
    for (host, what), fix in expected.items():
        problem = found(report, host, what)
        assert fix in problem["fix"] and problem["fix"] in output and problem["value"] in output
    assert found(report, "n4", "folder")["value"] == str(project)
    assert found(report, "n3", "python")["value"] == sys.executable
    assert "not fit: 5 failures on 6 hosts" in output
    assert facts(report, "n1")["interface"] == "eth0"
    assert nothing_left(lab)


def test_an_ssh_that_does_not_let_in(lab, check, tmp_path):
    with own(lab.nodes[1], lab.folder / "ssh" / "home" / "authorized_keys", "", tmp_path):
        status, _, report = check(SIZES)
    assert status == 1
    assert "ssh-copy-id n2" in found(report, "n2", "reachable")["fix"]


def test_hosts_that_differ(lab, check, tmp_path):
    """Versions, source, shared memory, folders, files, ports, routes, slots: each reported for its host."""
    n1, n2, n3 = lab.nodes[:3]
    hostfile = Path(launch.__path__[0]) / "hostfile.py"
    torch = Path(metadata.distribution("torch").locate_file("")) / f"torch-{metadata.version('torch')}.dist-info"
    shared, corpus = tmp_path / "shared", tmp_path / "corpus"
    for folder in (shared, corpus):
        folder.mkdir()
    for end in (".bin", ".idx"):
        (corpus / f"text{end}").write_text("tokens")
    lock = tmp_path / "cache" / "elas" / "extensions" / "torch9-py311-abc" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    listen = "import os, socket; s = socket.create_server(('', 29511)); print(os.getpid(), flush=True); s.accept()"
    with ExitStack() as broken:
        listening = n1.start([sys.executable, "-c", listen], stdout=subprocess.PIPE, text=True)
        broken.callback(n1.run, ["kill", listening.stdout.readline().strip()])
        broken.enter_context(own(n2, hostfile, hostfile.read_text() + "# changed\n", tmp_path))
        broken.enter_context(mounted(n2, shared, "-t", "tmpfs", "-o", "size=8m", "tmpfs"))
        broken.enter_context(own(n2, corpus / "text.bin", "fewer", tmp_path))
        text = (torch / "METADATA").read_text().replace(f"Version: {metadata.version('torch')}", "Version: 2.0.0", 1)
        broken.enter_context(own(n3, torch / "METADATA", text, tmp_path))
        n3.run(["mount", "-o", "remount,size=16m", "/dev/shm"])
        broken.callback(n3.run, ["mount", "-o", "remount,size=2g", "/dev/shm"])
        n3.run(["ip", "route", "add", "blackhole", n2.address])
        broken.callback(n3.run, ["ip", "route", "del", "blackhole", n2.address])
        status, output, report = check(
            {"n1": 1, "n2": 1, "n3": 2},
            "--master-port=29511", "--min-disk-gb=0.1", f"--train.run_dir={shared / 'run'}",
            f"--data.train={corpus / 'text'}", XDG_CACHE_HOME=str(tmp_path / "cache"),
        )  # fmt: skip
    assert status == 1
    expected = {
        ("n1", "port"): ("29511", "--master-port"),
        ("n2", "source"): ("", "the same commit"),
        ("n2", "run_dir"): (str(shared / "run"), "all hosts share"),
        ("n2", "disk"): ("0.01 GiB", "free some space"),
        ("n2", "data"): (str(corpus / "text.bin"), "copy the same file"),
        ("n2", "network"): ("n2 → n3", "firewalls"),
        ("n3", "network"): ("n3 → n2", "firewalls"),
        ("n3", "torch"): ("2.0.0", "the same version"),
        ("n3", "shared memory"): ("0.02 GiB", "remount"),
    }
    failures = {(p["host"], p["check"]) for p in report["problems"] if p["severity"] == "failure"}
    assert failures == set(expected), output
    for (host, what), (value, fix) in expected.items():
        problem = found(report, host, what)
        assert value in problem["value"] and fix in problem["fix"] and problem["fix"] in output
    assert "elas/launch/hostfile.py" in found(report, "n2", "source")["why"]
    assert "import os, socket" in found(report, "n1", "port")["why"]
    assert found(report, "n3", "slots")["severity"] == "warning"
    (cleared,) = [p for p in report["problems"] if p["check"] == "build lock"]
    assert cleared["value"] == str(lock) and cleared["severity"] == "warning" and not lock.exists()
    assert nothing_left(lab)


def test_debians_line_is_noted_and_does_no_harm(lab, check, tmp_path):
    """On both hosts the own name is loopback, so that gloo, left to itself, would have nobody meet."""
    with ExitStack() as broken:
        for host in lab.nodes[:2]:
            broken.enter_context(debians_line(lab, host, tmp_path))
        status, output, report = check(SIZES)
    assert status == 0, output
    for name in SIZES:
        problem = found(report, name, "hostname")
        assert (problem["severity"], problem["value"]) == ("warning", "127.0.1.1")
        assert "runs will use eth0" in problem["fix"]
        assert facts(report, name)["interface"] == "eth0"
    assert report["master_address"] == "10.77.0.2"
    assert report["bandwidth"]["interface"] == "eth0"


def test_collectives_that_cannot_be_are_told_with_their_fix(lab, check):
    status, _, report = check(SIZES, GLOO_SOCKET_IFNAME="lo")
    assert status == 1
    problem = found(report, "n1", "collectives")
    assert "lo is loopback" in problem["why"] and problem["fix"] == "give eth0, or unset it"
    assert nothing_left(lab)


def test_collectives_that_take_too_long_are_ended(lab):
    code = (
        "from elas.launch.preflight.bandwidth import *\n"
        "print(measure({'n1': 1, 'n2': 1}, '10.77.0.2', 29512, way=Way('ssh'), timeout_s=2.0))"
    )
    said = lab.head.run([sys.executable, "-c", code]).stdout
    assert "not finished in 2 s" in said
    assert nothing_left(lab)


def test_a_check_that_is_killed_leaves_nothing(lab, tmp_path):
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    command = [sys.executable, "-m", "elas.cli", "launch", "check", f"--hostfile={tmp_path / 'hosts'}"]
    started = lab.head.start(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert wait_for(
        lambda: any("elas.launch.preflight.collectives" in text for text in lab.nodes[1].processes().values()), 20
    )
    (number,) = [pid for pid, text in lab.head.processes().items() if "launch check" in text]
    lab.head.run(["kill", "-9", str(number)])
    started.wait(10)
    assert nothing_left(lab)


def test_torchrun_on_two_hosts_with_debians_line(lab, tmp_path):
    """`launch/pretrain.py` chooses the interface itself, whoever starts it."""
    prebuild_deepspeed()
    corpus = write_corpus(tmp_path / "text")
    settings = {**SMALL, "train.steps": 2, "data.train": corpus, "data.split": "90,10,0", "checkpoint.every_steps": 0}
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--master_addr=n1"]
    with ExitStack() as broken:
        started = []
        for number, host in enumerate(lab.nodes[:2]):
            broken.enter_context(debians_line(lab, host, tmp_path))
            where = [f"--node_rank={number}", "--master_port=29513", pretrain.__file__]
            run = [*command, *where, *arguments({**settings, "train.run_dir": tmp_path / "run"})]
            started.append(host.start(["timeout", "90", *run], {"OMP_NUM_THREADS": "1"}))
        assert [process.wait(100) for process in started] == [0, 0]
    assert (tmp_path / "run" / "DONE").exists()


def test_under_slurm(lab, tmp_path):
    slurm = Slurm(lab)
    options = ["--slurm", "--nodes=2", "--partition=lab", f"--json={tmp_path / 'report'}"]
    command = [sys.executable, "-m", "elas.cli", "launch", "check", *options]
    done = slurm.run(command, check=False)
    report = json.loads((tmp_path / "report").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert [host["host"] for host in report["hosts"]] == ["n1", "n2"]
    assert report["bandwidth"]["world"] == 2 and report["bandwidth"]["interface"] == "eth0"
    with mounted(lab.nodes[1], Path(sys.executable).parent, "-t", "tmpfs", "tmpfs"):
        done = slurm.run(command, check=False)
    report = json.loads((tmp_path / "report").read_text())
    assert done.returncode == 1, done.stdout + done.stderr
    assert found(report, "n2", "python")["value"] == sys.executable
    assert facts(report, "n1")["python"]
    slurm.wait_for_jobs(10)
    for option, expected in {
        "--partition=nowhere": "error: --partition nowhere: no such partition; give one of lab, urgent",
        "--nodes=6": "error: --nodes 6: partition lab has 5; give fewer",
    }.items():
        done = slurm.run([*command, option], check=False)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (2, expected)
