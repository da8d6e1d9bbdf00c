"""`elas doctor` in real environments, whole, bare and broken; only what GPUs would answer is given by hand."""

import json
import os
import shlex
import subprocess
import sys
import time
import tomllib
import venv
from pathlib import Path

import pytest

import elas
from elas.doctor import gpu, host, software
from elas.doctor.ask import Answer, ask
from elas.doctor.finding import NOT_ON_CPUS, Finding, report

ROOT = Path(elas.__path__[0]).parent
FIELDS = {"what": str, "ok": bool, "found": str, "needed_for": str, "fix": str, "required": bool, "checked": bool}
HOLDS = "from filelock import FileLock; lock = FileLock('{}.elas-lock'); lock.acquire(); print(flush=True); input()"
NO_SMI = {"gpus": [], "driver": None, "gpu_error": None}


def doctor(folder, *, python=sys.executable, first="", options=(), **environment):
    """Runs `elas doctor` as a user would, with the folder `first` in front of all packages; checks its JSON."""
    path = folder / "findings.json"
    done = subprocess.run(
        [python, "-m", "elas.cli", "doctor", "--json", str(path), *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(first), str(ROOT)])), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Traceback" not in done.stdout + done.stderr
    written = json.loads(path.read_text())
    found = {of["what"]: of for of in written["findings"]}
    assert len(found) == len(written["findings"]) > 30
    for of in written["findings"]:
        assert {name: type(value) for name, value in of.items()} == FIELDS
        assert bool(of["fix"]) != of["ok"] and "\n" not in of["found"] + of["fix"], of
    assert written["ok"] == all(of["ok"] for of in written["findings"] if of["required"])
    assert done.returncode == (0 if written["ok"] else 1)
    bad = any(of["required"] and of["checked"] and not of["ok"] for of in written["findings"])
    verdict = "ready for ELAS" if written["ok"] else "not ready for ELAS: " if bad else "nothing is known to be missing"
    assert done.stdout.splitlines()[-1].startswith(verdict)
    return done.stdout, found


def package(folder, name, code):
    """A package that comes before the real one."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    return folder


def test_this_environment_is_ready(tmp_path):
    out, found = doctor(tmp_path, options=["--timeout", "120"])
    assert {of["what"] for of in found.values() if of["required"] and not of["ok"]} == set()
    assert found["megatron-core"]["found"] == "0.16.1" and found["gloo"]["ok"]
    assert found["megatron-core's compiled helpers"]["found"].startswith("helpers_cpp.")
    assert str(tmp_path) in found["disk"]["found"]
    assert found["FFN kernel, auto"]["ok"] and "fused" in found["FFN kernel, auto"]["found"]
    assert all(name in out for name in found)


def test_the_first_line_is_printed_at_once():
    """Before anything is imported: its own start takes a fraction of a second."""
    start = time.monotonic()
    command = [sys.executable, "-m", "elas.cli", "doctor"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("elas ")
        assert time.monotonic() - start < 5
        process.terminate()


def test_a_bare_python_lacks_everything(tmp_path):
    """No package but the standard library: the command itself imports none."""
    venv.create(tmp_path / "bare", symlinks=True)
    out, found = doctor(tmp_path, python=str(tmp_path / "bare/bin/python"))
    for of in software.REQUIRED:
        assert found[of.name]["found"] == "not installed" and found[of.name]["required"]
    for of in software.OPTIONAL:
        assert not found[of.name]["ok"] and not found[of.name]["required"]
    assert "megatron-core's compiled helpers" not in found
    assert f"{tmp_path}/bare/bin/python -m pip install megatron-core==0.16.1" in out


def test_a_package_that_raises_is_a_finding(tmp_path):
    first = package(tmp_path / "first", "torch", "raise OSError('libcudart.so.13: cannot open\\nshared object file')")
    package(first, "datatrove", "raise SystemExit('no')")
    _, found = doctor(tmp_path, first=first)
    assert "import: OSError: libcudart.so.13: cannot open shared object file" in found["torch"]["found"]
    assert found["deepspeed"]["fix"] == found["megatron-core"]["fix"] == "fix torch first"
    assert found["datatrove"]["found"].endswith("import: SystemExit: no")
    assert found["sentencepiece"]["ok"] and found["megatron-core's compiled helpers"]["ok"]


def test_a_package_that_crashes_or_prints_spoils_no_other_finding(tmp_path):
    crash = "import os, signal\nos.write(2, b'terminate called\\n')\nos.kill(os.getpid(), signal.SIGSEGV)"
    first = package(tmp_path / "first", "sentencepiece", crash)
    package(first, "torch", "print('{\"begin\": \"noise\"}')\nraise ImportError('broken')")
    _, found = doctor(tmp_path, first=first)
    assert found["sentencepiece"]["found"].endswith("the process crashed with signal SIGSEGV: terminate called")
    assert found["protobuf"]["ok"] and found["numpy"]["ok"]


def test_a_package_that_hangs_ends_at_the_timeout(tmp_path):
    first = package(tmp_path / "first", "torch", "import time\ntime.sleep(600)")
    start = time.monotonic()
    out, found = doctor(tmp_path, first=first, options=["--timeout", "2"])
    assert time.monotonic() - start < 30
    assert found["torch"]["found"].startswith("not checked (took longer than 2 s); ") and not found["torch"]["ok"]
    late = {name for name, of in found.items() if not of["checked"]}
    assert {"torch", "transformers", "deepspeed", "CPU kernel", "GPUs in torch"} <= late
    assert found["transformers"]["found"].startswith("not checked (import torch took longer than 2 s); ")
    assert "✗" not in out and "missing or broken:" not in out and "not checked: torch, megatron-core, " in out


def test_packages_in_the_current_folder_are_not_imported(tmp_path):
    """The children have the parent's path: a script's `elas doctor` does not see a folder named as a package."""
    package(tmp_path / "here", "numpy", "raise ImportError('the wrong one')")
    code = "import os, sys; from elas.doctor.ask import ask; os.chdir(sys.argv[1]); print(ask([['import numpy']], 60))"
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "here")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "error=None" in done.stdout


def test_a_mistake_is_one_line(tmp_path):
    command = [sys.executable, "-m", "elas.cli", "doctor", "--timeout", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: --timeout 0: must be above 0 seconds\n" and not done.stdout


def test_every_dependency_of_the_project_is_looked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [of.name + of.wanted for of in software.REQUIRED] == project["dependencies"]
    extras = project["optional-dependencies"]
    assert extras["gpu"] == [f"triton{gpu.TRITON}"]
    for of in software.OPTIONAL:
        assert any(line.startswith(of.name + of.wanted) for line in extras[of.extra])
    low, high = software.PYTHONS
    assert project["requires-python"] == f">={low[0]}.{low[1]},<{high[0]}.{high[1] + 1}"


@pytest.mark.parametrize("version, wanted, right", [
    ("2.11.0+cu130", ">=2.11.0a0", True), ("2.11.0a0+e1f2", ">=2.11.0a0", True), ("2.9.1", ">=2.11.0a0", False),
    ("0.16.1", "==0.16.1", True), ("0.16.10", "==0.16.1", False), ("odd", ">=1", False), ("odd", "", True),
])  # fmt: skip
def test_versions(version, wanted, right):
    assert software.satisfies(version, wanted) == right


def test_an_old_version_is_a_finding(monkeypatch):
    monkeypatch.setattr(software, "version_of", lambda name: "2.9.1")
    found = software.package(software.REQUIRED[0], Answer())
    assert not found.ok and found.found == "2.9.1, not >=2.11.0a0" and "before ELAS" in found.fix


def torch_facts(*gpus, **more):
    facts = {"version": "2.11.0+cu130", "cuda": "13.0", "gloo": True, "nccl": "2.28.9", "warning": None}
    return Answer({**facts, "gpus": list(gpus), **more})


def h100(error=None):
    return {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "memory": 80 * 2**30, "error": error}


def gpu_findings(torch, *, smi=NO_SMI, nodes=0, visible=None, tiles=None):
    found = gpu.findings(smi, nodes, visible, torch, tiles or Answer({"9.0": None}))
    return {of.what: of for of in found}


TWO = {"gpus": ["NVIDIA H100 80GB HBM3"] * 2, "driver": "580.95.05", "gpu_error": None}


def test_gpus_that_work():
    found = gpu_findings(torch_facts(h100(), h100()), smi=TWO, nodes=2)
    assert all(of.ok for name, of in found.items() if name != "Triton"), found
    assert found["GPUs in torch"].found == "2 × NVIDIA H100 80GB HBM3, capability 9.0, 80 GiB"
    assert found["Triton kernels"].found == "tiles for capability 9.0"


@pytest.mark.parametrize("torch, options, what, words", [
    (torch_facts(cuda=None, version="2.13.0+cpu"), {}, "CUDA in torch", "torch 2.13.0+cpu is built without CUDA"),
    (torch_facts(warning="The NVIDIA driver on your system is too old"), {}, "GPUs in torch", "driver on your system"),
    (torch_facts(h100("AcceleratorError: no kernel image")), {}, "GPUs in torch", "GPU 0: AcceleratorError: no kernel"),
    (torch_facts(h100(), nccl=None), {}, "NCCL", "not in torch"),
    (torch_facts(), {"smi": {**NO_SMI, "gpu_error": "Driver/library version mismatch"}}, "NVIDIA driver", "mismatch"),
    (Answer(error="OSError: libcudart.so.13"), {}, "GPUs in torch", "libcudart"),
])  # fmt: skip
def test_what_keeps_a_machine_with_gpus_from_training_on_them_is_required(torch, options, what, words):
    found = gpu_findings(torch, **{"smi": TWO, "nodes": 2, **options})
    assert not found[what].ok and found[what].required and words in found[what].found
    assert found[what].fix and found[what].fix != NOT_ON_CPUS


def test_without_gpus_nothing_of_theirs_is_required():
    found = gpu_findings(torch_facts(cuda=None, nccl=None), tiles=Answer({"cpu": "for GPUs"}))
    assert {name for name, of in found.items() if of.required} == {"gloo"}
    found = gpu_findings(torch_facts(), smi=TWO, visible="")
    assert not found["GPUs in torch"].required and found["GPUs in torch"].fix == "unset CUDA_VISIBLE_DEVICES"


def test_fewer_gpus_than_the_machine_has_are_noted():
    found = gpu_findings(torch_facts(h100()), smi=TWO, nodes=2)["GPUs in torch"]
    assert not found.ok and not found.required and found.found.endswith("; 2 in the machine")
    assert gpu_findings(torch_facts(h100()), smi=TWO, nodes=2, visible="1")["GPUs in torch"].ok


def test_a_gpu_without_tiles_is_optional():
    tiles = Answer({"10.0": "it has tiles for compute capability 8.x, 9.x and 12.x, not 10.0"})
    found = gpu_findings(torch_facts(h100()), nodes=1, tiles=tiles)["Triton kernels"]
    assert not found.ok and not found.required and "not 10.0" in found.found


def test_a_triton_that_torch_was_not_built_with_is_a_finding(monkeypatch):
    monkeypatch.setattr(gpu, "version_of", lambda name: "3.7.1")
    monkeypatch.setattr(gpu.importlib.metadata, "requires", lambda name: ["triton==3.6.0; platform_system == 'Linux'"])
    found = gpu_findings(torch_facts(h100()), nodes=1)["Triton"]
    assert not found.ok and found.found == "3.7.1; torch requires 3.6.0" and "triton==3.6.0" in found.fix


@pytest.mark.parametrize("name, text, limit", [
    ("memory.max", "max", None), ("memory.max", "8589934592\n", 8 * 2**30),
    ("memory/memory.limit_in_bytes", "9223372036854771712", None),
])  # fmt: skip
def test_the_memory_limit_of_a_container(tmp_path, name, text, limit):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert host.memory_limit(tmp_path) == limit


def test_the_compiler_is_the_one_that_builds_use(tmp_path):
    _, found = doctor(tmp_path, first=package(tmp_path / "first", "torch", "raise ImportError"), CXX="no-such-compiler")
    assert not found["C++ compiler"]["ok"] and found["C++ compiler"]["found"] == "no no-such-compiler"
    assert not found["C++ compiler"]["required"]


def test_a_lock_of_a_killed_build_is_a_finding(tmp_path):
    folder = tmp_path / "elas" / "extensions" / "torch-x" / "some_extension"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    first = package(tmp_path / "first", "torch", "raise ImportError")
    _, found = doctor(tmp_path, first=first, XDG_CACHE_HOME=str(tmp_path))
    assert found["build locks"]["found"] == f"1 of killed builds: {folder / 'lock'}" and (folder / "lock").exists()
    assert "elas build removes them" in found["build locks"]["fix"] and not found["FFN kernel, auto"]["ok"]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS.format(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline()  # a build that is running
    _, found = doctor(tmp_path, first=first, XDG_CACHE_HOME=str(tmp_path))
    holder.communicate(b"")
    assert found["build locks"]["ok"]


@pytest.mark.parametrize("command, words", [
    ([], "only loopback"),
    (["ip", "link", "add", "dark0", "type", "veth", "peer", "name", "dark1"], "without an IPv4 address: dark"),
])  # fmt: skip
def test_a_machine_without_an_interface_but_lo(command, words):
    """In a network namespace of its own, which root can make."""
    show = [sys.executable, "-c", "from elas.doctor.host import *; print(interfaces(network.interfaces()))"]
    script = f"{shlex.join(command) or 'true'} && {shlex.join(show)}"
    done = subprocess.run(["unshare", "--net", "sh", "-c", script], capture_output=True, text=True)
    if done.returncode and "unshare" in done.stderr:
        pytest.skip("no network namespace can be made here")
    assert "ok=False" in done.stdout and words in done.stdout, done.stderr


def test_nvidia_smi_that_cannot_start_is_a_finding(tmp_path):
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_bytes(b"\x7fELF")
    program.chmod(0o755)
    first = package(tmp_path / "first", "torch", "raise ImportError")
    _, found = doctor(tmp_path, first=first, PATH=f"{program.parent}:{os.environ['PATH']}")
    assert found["NVIDIA driver"]["found"] == "nvidia-smi: cannot be started (Exec format error)"
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    _, found = doctor(tmp_path, first=first, PATH=f"{program.parent}:{os.environ['PATH']}", LC_ALL="C", PYTHONUTF8="0")
    assert found["NVIDIA driver"]["found"].endswith("Driver/library version mismatch")


def test_a_crash_in_the_last_answer_of_one_process_leaves_the_other(tmp_path, monkeypatch):
    package(tmp_path, "crashing", "import os; os._exit(3)")
    package(tmp_path, "slow", "import time; time.sleep(1)")
    monkeypatch.syspath_prepend(tmp_path)
    found = ask([["import json", "import crashing"], ["import slow"]], 60)
    assert found["import json"] == found["import slow"] == Answer()
    assert found["import crashing"].error == "the process crashed with exit status 3: no message"


def test_answers_come_in_spite_of_a_crash_in_between():
    found = ask([["import json", "import antigravity_missing", "import csv"], ["import math"]], 60)
    assert {name for name, of in found.items() if of.error} == {"import antigravity_missing"}


def test_the_report_lists_fixes_of_what_is_required_first():
    found = [
        Finding("a", True, "1.0", "x"),
        Finding("b", False, "none", "y", "get b"),
        Finding("c", False, "q" * 300, "z", "get c", required=True),
        Finding("d", False, "", "z", NOT_ON_CPUS),
    ]
    lines = report(found, width=80).splitlines()
    assert max(map(len, lines[:6])) <= 80
    assert [line[0] for line in lines[2:6]] == ["✓", "–", "✗", "–"]
    assert lines[7:] == ["missing or broken:", f"✗ c: {'q' * 300}; get c", "", "optional, not available:",
                         "– b: none; get b", "", "not ready for ELAS: c"]  # fmt: skip
