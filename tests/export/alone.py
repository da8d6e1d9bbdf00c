"""An environment that has some packages of this one and what they require, and nothing else: no ELAS."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path


def make(folder: Path, *packages: str) -> Path:
    """Fill a folder with links to packages and to all that they require.

    Args:
        folder: created.
        packages: names as on PyPI.
    """
    folder.mkdir()
    seen, waiting = set(), list(packages)
    while waiting:
        name = _plain(waiting.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform or Python
        for top in {Path(file).parts[0] for file in found.files or () if Path(file).parts[0] != ".."}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))
        waiting += [r for r in found.requires or () if "extra ==" not in r]
    return folder


def _plain(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def run(environment: Path, script: Path, *arguments: str | Path, timeout: float = 200) -> str:
    """Run a script there, without this environment's packages; it must end well. Returns its output."""
    start = f"import runpy, sys; sys.path.append({str(environment)!r}); sys.argv = sys.argv[1:]; "
    start += "runpy.run_path(sys.argv[0], run_name='__main__')"
    variables = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH", "LANG") if key in os.environ}
    variables |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(environment.parent / "hub")}
    command = [sys.executable, "-I", "-S", "-c", start, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
