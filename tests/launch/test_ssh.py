"""`elas launch ssh` on two hosts: the same training as on one, to the letter what was typed, and refusals by name."""

import os
import signal
import subprocess
import sys

import pytest
from lab import Lab, Ssh, why_not
from lab.hosts import wait_for
from launched import ENDLESS, LAUNCH, Launched, ranks_on, send
from support.corpora import SMALL, arguments, write_corpus
from support.training_processes import rows

import elas

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(why_not() is not None, reason=f"no lab of hosts: {why_not()}"),
]
NASTY = """it's "two" words; $HOME `ls` %n %h \\ * & | < > ~ é"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    try:
        Ssh(lab)
        yield lab
    finally:
        lab.close()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


def test_two_hosts_train_what_one_does(lab, tmp_path):
    """TP 2 × DP 2 of the quickstart's model, two ranks a host; the tensor-parallel pairs stay on theirs."""
    corpus = write_corpus(tmp_path / "corpus" / "text", vocab=8192, documents=100, length=600)
    settings = {"data.train": corpus, "data.split": "90,10,0", "train.steps": 20, "train.eval_batches": 0}
    settings |= {"parallel.tensor": 2, "checkpoint.every_steps": 0, "log.every_steps": 1, "sparsity.dense_steps": 10}
    launched = Launched(lab, tmp_path, settings, "--config", "quickstart", slots={"n1": 2, "n2": 2})
    output = launched.finish(200)
    assert launched.process.returncode == 0, output
    assert "with ranks 0-1 on n1, ranks 2-3 on n2" in output and "done: step 20" in output
    alone = [*LAUNCH, "local", "--ranks", "4", "--config", "quickstart"]
    alone += arguments({**settings, "train.run_dir": tmp_path / "alone"})
    done = subprocess.run(
        alone, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    losses, expected = ([row["loss"] for row in rows(folder)] for folder in (launched.run_dir, tmp_path / "alone"))
    assert len(losses) == 20 and losses == pytest.approx(expected, rel=1e-6)
    assert not launched.left()


def test_arguments_and_variables_arrive_to_the_letter(lab, corpus, tmp_path):
    """On uneven hosts, from a folder with a space; a second Ctrl-C ends the ranks before they train."""
    allowed = tmp_path / "allowed"
    allowed.write_text(f"# ours\n\nMY_*  # and more\nGIVEN={NASTY}\n")
    folder = tmp_path / "a folder; $x"
    folder.mkdir()
    settings = {**ENDLESS, "data.train": corpus, "train.run_dir": tmp_path / NASTY.replace("/", ""),
                "train.global_batch_size": 6}  # fmt: skip
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("n1 slots=1\nn2 slots=2\n")
    command = [*LAUNCH, "ssh", "--hostfile", str(hostfile), "--env-file", str(allowed), *arguments(settings)]
    process = lab.head.start(
        ["sh", "-c", 'cd "$1" && shift && exec "$@"', "in", str(folder), *command],
        env={"MY_OWN": NASTY, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    n1, n2 = lab.nodes
    assert wait_for(lambda: process.poll() is not None or [*map(len, map(ranks_on, (n1, n2)))] == [1, 2], 60)
    assert process.poll() is None, process.communicate()[0]
    for host in (n1, n2):
        for pid in ranks_on(host):
            given = host.run(["cat", f"/proc/{pid}/cmdline"]).stdout.split("\0")
            assert f"--train.run_dir={settings['train.run_dir']}" in given
            variables = host.run(["cat", f"/proc/{pid}/environ"]).stdout.split("\0")
            assert f"MY_OWN={NASTY}" in variables and f"GIVEN={NASTY}" in variables
            assert host.run(["readlink", f"/proc/{pid}/cwd"]).stdout == f"{folder}\n"
    launcher = next(pid for pid, words in lab.head.processes().items() if "elas.cli launch ssh" in words)
    for _ in range(2):
        send(lab.head, "INT", [launcher])
        wait_for(lambda: process.poll() is not None, 1)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 128 + signal.SIGINT, output
    assert wait_for(lambda: not any(host.processes() for host in lab.hosts.values()), 20)


def test_debians_own_line_does_no_harm(lab, corpus, tmp_path):
    """`127.0.1.1 n2` on n2: gloo would take loopback; the interface that leads to the first host is taken instead."""
    n2 = lab.hosts["n2"]
    own = tmp_path / "hosts"
    own.write_text("127.0.1.1 n2\n" + "".join(f"{a} {n}\n" for n, a in lab.addresses.items() if n != "n2"))
    n2.run(["mount", "--bind", str(own), "/etc/hosts"])
    try:
        settings = {**SMALL, "data.train": corpus, "data.split": "90,10,0", "train.steps": 3}
        launched = Launched(lab, tmp_path, settings)
        output = launched.finish()
    finally:
        n2.run(["umount", "/etc/hosts"])
    assert launched.process.returncode == 0 and "done: step 3" in output, output
    assert "127.0.1.1" in output  # the loopback address of the host is reported


def test_a_host_that_cannot_import_elas_is_named(lab, corpus, tmp_path):
    package = os.path.dirname(elas.__file__)
    n2 = lab.hosts["n2"]
    empty = tmp_path / "empty"
    empty.mkdir()
    n2.run(["mount", "--bind", str(empty), package])
    try:
        outputs = []
        for name, options in (("looked", ()), ("not", ("--no-check",))):
            (tmp_path / name).mkdir()
            launched = Launched(lab, tmp_path / name, {**ENDLESS, "data.train": corpus}, *options)
            outputs.append(launched.finish(60))
            assert launched.process.returncode == 1
            assert not launched.left()
    finally:
        n2.run(["umount", package])
    assert "n2: elas" in outputs[0] and "nothing was started" in outputs[0]
    assert f"error: n2 (rank 1): elas cannot be imported with {sys.executable}" in outputs[1]


def test_what_cannot_be_is_refused_before_anything_starts(lab, corpus, tmp_path):
    for name, options, slots, said in (
        ("elsewhere", ("--master-addr", "n2"), None, "--master-addr n2: is not an address of n1, where rank 0 runs"),
        ("twice", (), {"n1": 1, "10.77.0.2": 1}, "10.77.0.2: host: 10.77.0.2 – is the same machine as n1"),
        ("full", ("--min-disk-gb", "99999"), None, "has less free than the 99999.0 GiB required for checkpoints"),
    ):
        (tmp_path / name).mkdir()
        launched = Launched(lab, tmp_path / name, {**ENDLESS, "data.train": corpus}, *options, slots=slots)
        output = launched.finish(30)
        assert said in output and "with rank 0" not in output and launched.process.returncode in (1, 2)


def test_a_port_that_is_taken_is_named(lab, corpus, tmp_path):
    n1 = lab.hosts["n1"]
    listen = "import socket, time; s = socket.create_server(('', 29511)); time.sleep(100)"
    listener = n1.start([sys.executable, "-c", listen])
    try:
        outputs = []
        for name, options in (("looked", ()), ("not", ("--no-check",))):
            (tmp_path / name).mkdir()
            port = ("--master-port", "29511")
            launched = Launched(lab, tmp_path / name, {**ENDLESS, "data.train": corpus}, *port, *options)
            outputs.append(launched.finish(60))
            assert launched.process.returncode == 1
    finally:
        send(n1, "KILL", [pid for pid, words in n1.processes().items() if "create_server" in words])
        listener.wait()
    assert "n1: port: 29511" in outputs[0] and "nothing was started" in outputs[0]
    assert "error: n1: rank 0 (process" in outputs[1]
    assert "error: ranks cannot connect at 10.77.0.2:29511: the port is in use there" in outputs[1]
    assert wait_for(lambda: not any(host.processes() for host in lab.hosts.values()), 20)
