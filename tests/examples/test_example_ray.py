"""`elas prep` on Ray: its files are those of local processes, and Ray has run."""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from started import copied, start


@pytest.mark.timeout(600)
def test_ray_prep(tmp_path):
    pytest.importorskip("ray")
    sessions = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets allow short paths only
    try:
        words = [sys.executable, copied("ray_prep.py", tmp_path), "--out", tmp_path / "out"]
        output = start(words, tmp_path, 180, RAY_TMPDIR=str(sessions))
        assert any(sessions.rglob("session_*/logs/raylet.out")), "Ray has not run"
    finally:
        shutil.rmtree(sessions)
    assert "are identical" in output
    by_ray, by_processes = (
        json.loads((tmp_path / f"out/{name}.manifest.json").read_text()) for name in ("by_ray", "by_processes")
    )
    assert by_ray["documents"] == by_processes["documents"] > 50
    assert (tmp_path / "out/by_ray.bin").stat().st_size == 2 * by_ray["tokens"] > 100_000
