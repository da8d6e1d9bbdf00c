"""Faults of a run on two hosts, made for real: each must end the run in time, name host and rank, leave nothing behind.

`python tests/launch/ssh_faults.py` runs all of them and prints the table of docs/launch.md; the suite runs most.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from lab import Lab, Ssh  # noqa: E402
from launched import ENDLESS, Launched, pid_of, ranks_on, send  # noqa: E402
from support.corpora import write_corpus  # noqa: E402

LIMIT_S = 60.0


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    Attributes:
        what: as the table says it.
        make: does it to a launch under way.
        says: what must be printed.
        status: the launcher's exit status; None for any but 0.
        settings: of the run, besides those of all rows.
        at_step: when; 0 for as soon as the ranks are there.
        in_suite: whether the suite makes it too; the others are close to one that it makes.
    """

    what: str
    make: Callable[[Launched], None]
    says: tuple[str, ...]
    status: int | None = 1
    settings: tuple[tuple[str, object], ...] = ()
    at_step: int = 2
    in_suite: bool = True


def _kill_in_a_collective(launched: Launched) -> None:
    n2 = launched.lab.hosts["n2"]
    ranks = ranks_on(n2)
    send(n2, "STOP", ranks)
    time.sleep(1)  # rank 0 waits in the next collective now
    send(n2, "KILL", ranks)


def _kill(name: str) -> Callable[[Launched], None]:
    return lambda launched: send(launched.lab.hosts[name], "KILL", ranks_on(launched.lab.hosts[name]))


def _stop(launched: Launched) -> None:
    n2 = launched.lab.hosts["n2"]
    send(n2, "STOP", ranks_on(n2))


def _kill_process(words: str) -> Callable[[Launched], None]:
    def make(launched: Launched) -> None:
        n2 = launched.lab.hosts["n2"]
        send(n2, "KILL", [pid_of(n2, words)])

    return make


def _signal_launcher(name: str) -> Callable[[Launched], None]:
    return lambda launched: send(launched.lab.head, name, [launched.launcher()])


def _kill_on_head(*modules: str) -> Callable[[Launched], None]:
    def make(launched: Launched) -> None:
        head = launched.lab.head
        send(head, "KILL", [pid_of(head, module) for module in modules])

    return make


LONG_STEPS = (("train.global_batch_size", 1024),)
"""Several seconds of computing without a collective."""

FAULTS = {
    "worker-in-collective": Fault(
        "kill −9 of a worker, its peer inside a collective",
        _kill_in_a_collective,
        ("error: n2: rank 1 (process",),
    ),
    "worker-outside": Fault(
        "kill −9 of a worker, its peer outside of any",
        _kill("n2"),
        ("error: n2: rank 1 (process",),
        settings=LONG_STEPS,
        at_step=1,
    ),
    "worker-at-start": Fault(
        "kill −9 of a worker before the ranks have met",
        _kill("n1"),
        ("error: n1: rank 0 (process",),
        at_step=0,
        in_suite=False,
    ),
    "worker-stopped": Fault(
        "SIGSTOP of a worker",
        _stop,
        ("error: n2: rank 1 (process", "has been stopped by a signal"),
    ),
    "link-down": Fault(
        "network of a host down",
        lambda launched: launched.lab.cut(launched.lab.hosts["n2"]),
        ("error: n2 (rank 1): the ssh connection failed or was lost",),
    ),
    "host-crash": Fault(
        "a host crashes",
        lambda launched: launched.lab.hosts["n2"].crash(),
        ("error: n2 (rank 1): the ssh connection failed or was lost",),
    ),
    "launcher-sigterm": Fault(
        "SIGTERM to the launcher",
        _signal_launcher("TERM"),
        ("SIGTERM: asked rank 0 on n1, rank 1 on n2 to save and end", "stopped at step"),
        status=143,
    ),
    "launcher-sigkill": Fault(
        "SIGKILL to the launcher",
        _signal_launcher("KILL"),
        ("the launcher is gone; ending rank 0 on n1, rank 1 on n2",),
        status=None,
    ),
    "node-launcher-killed": Fault(
        "kill −9 of the deepspeed launcher's part on a host",
        _kill_process("deepspeed.launcher.launch"),
        ("error: n2: the process that started rank 1 was killed by SIGKILL",),
    ),
    "guard-killed": Fault(
        "kill −9 of our guard on a host",
        _kill_process("elas.launch.guard"),
        ("n2 (rank 1) with status",),
        in_suite=False,
    ),
    "launcher-and-guard-killed": Fault(
        "kill −9 of the launcher and its guard together",
        _kill_on_head("elas.launch.guard", "elas.cli"),
        (),
        status=None,
        in_suite=False,
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What came of a fault.

    Attributes:
        ended_s: seconds to the launcher's end.
        clean_s: seconds until no host ran anything of it.
        output: what was said.
        status: the launcher's exit status.
        saved: whether the ranks saved first.
    """

    ended_s: float
    clean_s: float
    output: str
    status: int
    saved: bool


def run_fault(lab: Lab, ssh: Ssh, folder: Path, corpus: str, fault: Fault) -> Outcome:
    """Start a run, make the fault, wait for the end, and mend the lab."""
    settings = {**ENDLESS, "data.train": corpus, **dict(fault.settings)}
    launched = Launched(lab, folder, settings, "--no-check")
    try:
        if fault.at_step:
            launched.wait_for_step(fault.at_step)
        else:
            while not all(ranks_on(host) for host in lab.nodes):
                assert launched.process.poll() is None, launched.process.communicate()[0]
                time.sleep(0.05)
        start = time.monotonic()
        fault.make(launched)
        launched.process.wait(timeout=LIMIT_S)
        ended = time.monotonic() - start
        launched.wait_until_nothing_is_left(LIMIT_S - ended)
        clean = time.monotonic() - start
        saved = (launched.run_dir / "REQUEUE").exists()
        return Outcome(ended, clean, launched.finish(5), launched.process.returncode, saved)
    except subprocess.TimeoutExpired:
        left = launched.left()
        raise AssertionError(f"{fault.what}: not over after {LIMIT_S:.0f} s; {left}; {launched.kill()}") from None
    finally:
        mend(lab, ssh)


def mend(lab: Lab, ssh: Ssh) -> None:
    """Bring back what crashed, and plug in what was cut."""
    for name, host in list(lab.hosts.items()):
        if not host.is_up():
            ssh.start(lab.restart(name))
        elif name != "head":
            lab.plug(host)
            for pid in host.processes():
                host.run(["kill", "-9", str(pid)], check=False)


def main() -> int:
    """Run all faults, or those named; 0 when every one ended as it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of the faults (default: all)")
    parser.add_argument("--show", action="store_true", help="print what each run said")
    options = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory(prefix="elas-faults-") as name:
        corpus = write_corpus(Path(name) / "text")
        lab_folder = Path(name) / "lab"
        lab_folder.mkdir()
        lab = Lab(lab_folder)
        try:
            ssh = Ssh(lab)
            print("| fault | launcher ends | nothing left | status | said |\n|---|---|---|---|---|", flush=True)
            for key in options.names or FAULTS:
                fault, folder = FAULTS[key], Path(name) / key
                folder.mkdir()
                outcome = run_fault(lab, ssh, folder, corpus, fault)
                right = all(text in outcome.output for text in fault.says) and outcome.status != 0
                bad += not right
                first = [line for line in outcome.output.splitlines() if fault.says and fault.says[0] in line]
                said = next(iter(first), "" if right else "NOT AS IT SHOULD")
                cells = [f"{outcome.ended_s:.1f} s", f"{outcome.clean_s:.1f} s", str(outcome.status), f"`{said}`"]
                print(f"| {' | '.join([fault.what, *cells])} |", flush=True)
                if options.show or not right:
                    print(outcome.output, flush=True)
        finally:
            lab.close()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
