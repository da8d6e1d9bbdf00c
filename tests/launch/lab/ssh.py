"""ssh between the hosts of a lab: one key, an sshd on every host, and a shell that knows nothing of this process."""

import subprocess
from pathlib import Path

from .hosts import Host, Lab, wait_for

_SSHD = """
HostKey {folder}/host_key
PidFile /run/sshd.pid
AuthorizedKeysFile {folder}/home/authorized_keys
UsePAM no
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
MaxStartups 100
MaxSessions 100
"""
_CLIENT = """
Host *
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


class Ssh:
    """Every host reaches every other by its name, with a key.

    Args:
        lab: the hosts.
    """

    def __init__(self, lab: Lab):
        self.folder = lab.folder / "ssh"
        home = self.folder / "home"
        home.mkdir(parents=True, mode=0o700)
        for key in (self.folder / "host_key", home / "id_ed25519"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        (home / "authorized_keys").write_bytes((home / "id_ed25519.pub").read_bytes())
        (home / "config").write_text(_CLIENT)
        (self.folder / "sshd_config").write_text(_SSHD.format(folder=self.folder))
        Path("~/.ssh").expanduser().mkdir(mode=0o700, exist_ok=True)  # where each host mounts its own
        for host in lab.hosts.values():
            self.start(host)

    def start(self, host: Host) -> None:
        """Start sshd on a host, and wait for it."""
        host.run(["mount", "--bind", str(self.folder / "home"), str(Path("~/.ssh").expanduser())])
        host.run(["mkdir", "-p", "/run/sshd"])
        log = (self.folder / f"sshd-{host.name}.log").open("ab")
        command = ["/usr/sbin/sshd", "-D", "-e", "-f", str(self.folder / "sshd_config")]
        host.start(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        log.close()
        if not wait_for(lambda: host.run(["ssh", host.name, "true"], check=False).returncode == 0, 10):
            raise RuntimeError(f"sshd of {host.name} does not answer; see {log.name}")
