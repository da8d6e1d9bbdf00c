"""The lab itself: up in a second, gone with the process that made it, however that ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lab import Lab, Ssh, why_not
from lab.hosts import wait_for

pytestmark = [
    pytest.mark.timeout(100),
    pytest.mark.skipif(why_not() is not None, reason=f"no lab of hosts: {why_not()}"),
]
MAKES_ONE = """
import sys, time
from pathlib import Path
from lab import Lab, Slurm, Ssh
lab = Lab(Path(sys.argv[1]))
Ssh(lab)
Slurm(lab)
print(*(host.pid for host in lab.hosts.values()), flush=True)
time.sleep(100)
"""


def test_it_goes_with_the_process_that_made_it(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    maker = subprocess.Popen(
        [sys.executable, "-c", MAKES_ONE, str(tmp_path)], env=env, stdout=subprocess.PIPE, text=True
    )
    firsts = [int(pid) for pid in maker.stdout.readline().split()]
    assert len(firsts) == 3
    inside = {os.readlink(f"/proc/{pid}/ns/pid") for pid in firsts}
    assert _processes_in(inside) > 10  # sshd, munged, slurmctld, slurmd
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    assert wait_for(lambda: _processes_in(inside) == 0, 5)


def _processes_in(namespaces: set[str]) -> int:
    found = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found += os.readlink(folder / "ns" / "pid") in namespaces
        except OSError:
            continue  # gone, or a kernel thread
    return found


def test_hosts_are_hosts(tmp_path):
    start = time.monotonic()
    lab = Lab(tmp_path)
    try:
        assert time.monotonic() - start < 5  # a tenth of a second, by itself
        ssh = Ssh(lab)
        n1, n2 = lab.nodes
        assert n1.run(["ssh", "n2", "hostname"]).stdout == "n2\n" and lab.head.run(["hostname"]).stdout == "head\n"
        assert not n1.processes()
        lab.cut(n2)
        alive = ["ssh", "-o", "ConnectTimeout=1", "n2", "true"]
        assert n1.run(alive, check=False).returncode == 255
        lab.plug(n2)
        assert n1.run(alive).returncode == 0
        n2.start(["sleep", "60"])
        assert wait_for(lambda: list(n2.processes().values()) == ["sleep 60"], 5)
        n2.crash()
        assert n1.run(alive, check=False).returncode == 255 and not n2.is_up()
        ssh.start(lab.restart("n2"))
        assert n1.run(alive).returncode == 0 and not lab.hosts["n2"].processes()
    finally:
        lab.close()
