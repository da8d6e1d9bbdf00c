"""Extensions are built once, and no build ever hangs anybody."""

import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from filelock import FileLock

from elas import extensions
from elas.errors import UserError

pytestmark = pytest.mark.timeout(600)
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed builds this op on CPU only")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def build_nothing(folder, timeout_s):
    (folder / "thing.so").write_bytes(b"")


def test_a_build_is_done_once(empty_cache, capsys):
    assert extensions.build_once("thing", build_nothing, what="a thing") > 0.0
    assert "building a thing" in capsys.readouterr().err
    assert extensions.build_once("thing", pytest.fail, what="a thing") == 0.0
    assert capsys.readouterr().err == ""


def test_a_stale_lock_of_a_killed_build_is_removed_aloud(empty_cache, capsys):
    extensions.build_once("thing", build_nothing, what="a thing")
    lock = extensions.extensions_dir() / "thing" / "lock"
    lock.touch()  # what a killed build leaves behind; torch would wait on it forever
    assert extensions.build_once("thing", pytest.fail, what="a thing") == 0.0
    assert not lock.exists() and "stale build lock" in capsys.readouterr().err


def test_a_half_built_library_does_not_count(empty_cache):
    folder = extensions.extensions_dir() / "thing"
    folder.mkdir(parents=True)
    (folder / "thing.so").write_bytes(b"half")
    assert extensions.library("thing") is None
    extensions.build_once("thing", build_nothing, what="a thing")
    assert extensions.library("thing") is not None


def test_a_killed_builder_blocks_nobody(empty_cache):
    """A process killed while it builds holds our lock no longer, and its torch lock is swept away."""
    code = """
    import time
    from elas import extensions
    def build(folder, timeout_s):
        (folder / "lock").touch()
        print("building", flush=True)
        time.sleep(600)
    extensions.build_once("thing", build, what="a thing")
    """
    builder = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert builder.stdout.readline() == "building\n"
    builder.kill()
    builder.wait()
    start = time.monotonic()
    extensions.build_once("thing", build_nothing, what="a thing", timeout_s=60)
    assert time.monotonic() - start < 30


def test_waiting_for_a_living_build_ends_with_an_error(empty_cache):
    folder = extensions.extensions_dir()
    folder.mkdir(parents=True)
    with FileLock(folder / "thing.elas-lock"), pytest.raises(UserError, match="another process"):
        extensions.build_once("thing", pytest.fail, what="a thing", timeout_s=0.5)


@without_cuda
def test_a_failing_compiler_is_reported_and_leaves_no_lock(empty_cache, monkeypatch):
    compiler = empty_cache / "bad-compiler"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(UserError, match=r"failed: .*; see .*build\.log"):
        extensions.prebuild_deepspeed(offload=True)
    assert not list(empty_cache.glob("**/lock"))
    monkeypatch.setenv("CXX", str(empty_cache / "no-compiler"))
    with pytest.raises(UserError, match="no C\\+\\+ compiler"):
        extensions.prebuild_deepspeed(offload=True)


@without_cuda
def test_deepspeed_compiles_nothing_and_needs_no_compiler(empty_cache):
    """In a process without a compiler and with nothing built; its processes groups work."""
    code = """
    import torch
    from torch.utils import cpp_extension
    cpp_extension.load = lambda *a, **k: exit("compiled")
    from elas import accelerator
    accelerator.prepare()
    from elas.extensions import load_deepspeed
    load_deepspeed()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    import deepspeed
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    ones = torch.ones(2)
    deepspeed.comm.all_reduce(ones)
    assert ones.sum() == 2 and deepspeed.comm.comm.cdb.shm_comm_op is None
    """
    environment = {**os.environ, "CXX": "false", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment)
    assert not list(empty_cache.rglob("*.so"))


def test_elas_build_leaves_nothing_to_compile(tmp_path, capfd):
    import json

    from elas import cli

    assert cli.run(["build"]) == 0
    capfd.readouterr()
    assert cli.run(["build", "--json", str(tmp_path / "built.json")]) == 0
    facts = json.loads((tmp_path / "built.json").read_text())
    assert facts["deepspeed_s"] == facts["kernel_s"] == 0
    assert capfd.readouterr().out == f"already built: {facts['folder']}\n"
