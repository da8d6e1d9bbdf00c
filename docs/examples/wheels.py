"""Collects the wheels that ELAS needs on a machine without a network, except torch and what torch brings.

    python docs/examples/wheels.py --python 3.12 --out wheels [--extra eval]

Run it in a checkout, with the Python of an environment where ELAS is installed (`make install`), on a machine with a
network: it may have another Python than the offline machine. Versions are those of this environment.
"""

import argparse
import importlib.metadata
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
NOT_OURS = ("torch", "triton")
"""Not collected, nor what only they require: the offline machine has the builds for its GPUs."""
PYTHONS, MACHINES = ("3.11", "3.12", "3.13"), ("x86_64", "aarch64")
FROM_SOURCE = ("elas", "deepspeed")
"""Without wheels on PyPI; DeepSpeed's is built in a second, with no compiler, and serves every Python."""


def needed(name: str, extras: set[str], environment: dict[str, str], found: dict[str, str]) -> dict[str, str]:
    """Versions by name of a package and all that it requires, in the offline machine's environment."""
    own = canonicalize_name(name)
    if own in NOT_OURS or (own in found and not extras):
        return found
    distribution = importlib.metadata.distribution(name)
    found[own] = distribution.version
    for line in distribution.requires or []:
        required = Requirement(line)
        marker = required.marker
        if marker is None or any(marker.evaluate({**environment, "extra": extra}) for extra in {"", *extras}):
            needed(required.name, required.extras, environment, found)
    return found


def main() -> None:
    """Build and download the wheels, and print how to install them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", default="3.12", help="of the offline machine (default: %(default)s)")
    parser.add_argument("--machine", default="x86_64", help="its processor (default: %(default)s)")
    parser.add_argument("--out", default="wheels", help="folder (default: %(default)s)")
    parser.add_argument("--extra", action="append", default=[], help="of ELAS: eval, ray; may be repeated")
    options = parser.parse_args()
    if options.python not in PYTHONS:
        parser.error(f"--python {options.python}: ELAS runs on {', '.join(PYTHONS)}")
    if options.machine not in MACHINES:
        parser.error(f"--machine {options.machine}: choose from {', '.join(MACHINES)}")
    known = importlib.metadata.metadata("elas").get_all("Provides-Extra") or []
    for extra in options.extra:
        if extra not in known:
            parser.error(f"--extra {extra}: ELAS has {', '.join(known)}")
    environment = {"python_version": options.python, "python_full_version": f"{options.python}.0"}
    versions = needed("elas", set(options.extra), environment, {})
    pip, out = [sys.executable, "-m", "pip"], ["--no-deps", "--quiet"]
    built = [str(ROOT), f"deepspeed=={versions['deepspeed']}"]
    subprocess.run([*pip, "wheel", *out, "--wheel-dir", options.out, *built], check=True)
    wanted = [f"{name}=={version}" for name, version in versions.items() if name not in FROM_SOURCE]
    # Every tag by name: pip takes manylinux_2_28 for that one alone. 2.28 is the glibc of torch's own wheels.
    tags = [f"manylinux_2_{minor}" for minor in range(28, 16, -1)] + ["manylinux2014", "manylinux2010", "manylinux1"]
    platforms = [f"--platform={tag}_{options.machine}" for tag in tags]
    for one in wanted:
        chosen = ["--only-binary=:all:", f"--python-version={options.python}", *platforms, "--dest", options.out, one]
        if subprocess.run([*pip, "download", *out, *chosen]).returncode == 0:
            continue
        before = set(Path(options.out).glob("*.whl"))  # it may be a package without a wheel, in Python alone
        subprocess.run([*pip, "wheel", *out, "--no-binary=:all:", "--wheel-dir", options.out, one], check=True)
        for made in set(Path(options.out).glob("*.whl")) - before:
            if not made.name.endswith("-none-any.whl"):
                made.unlink()
                sys.exit(
                    f"error: {one}: no wheel for Python {options.python} on {options.machine}; see the messages above"
                )
    extras = f"[{','.join(options.extra)}]" if options.extra else ""
    print(f"there: python{options.python} -m pip install --no-index --find-links {options.out} 'elas{extras}'")


if __name__ == "__main__":
    main()
