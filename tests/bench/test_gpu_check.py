"""`elas gpu-check`: a real dry run; parts that are wrong, crash or hang name themselves and give exit status 1."""

import json
import math
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from elas import cli
from elas.command import exit_status
from elas.gpu_check import checkout, hardware, kernel_cases, kernels, nccl, parts, report, speed, training
from elas.gpu_check import cli as gpu_check
from elas.gpu_check.parts import Part
from elas.gpu_check.rows import Row
from elas.gpu_check.setting import Setting
from elas.kernels.relu2_24 import registry

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """A dry run: its process, and its results."""
    folder = tmp_path_factory.mktemp("gpu-check")
    command = [sys.executable, "-m", "elas.cli", "gpu-check", "--dry-run", f"--out={folder}/out"]
    done = subprocess.run([*command, f"--json={folder}/facts.json"], capture_output=True, text=True)
    return done, json.loads((folder / "facts.json").read_text()), folder / "out"


def of_part(facts, name):
    return [row for row in facts["rows"] if row["part"] == name]


def test_dry_run_finds_nothing_wrong(dry):
    done, facts, _ = dry
    assert done.returncode == 0, done.stdout + done.stderr
    assert facts["counts"] == report.count([Row(**{k: v for k, v in r.items() if k != "what"}) for r in facts["rows"]])
    assert facts["counts"]["wrong"] == 0 and facts["counts"]["right"] > 50
    assert all(row["reason"] for row in facts["rows"] if row["result"] == "not run")
    assert {row["part"] for row in facts["rows"]} == {"device", *(part.name for part in parts.PARTS)}
    assert facts["device"] and facts["versions"]["torch"] and facts["dry_run"]


def test_every_implementation_dtype_and_rank_has_a_row(dry):
    _, facts, _ = dry
    whats = [row["what"] for row in of_part(facts, "kernels")]
    for memory in ("fused", "compressed", "eager"):
        for one in registry.implementations(memory):
            for dtype in ("float32", "bfloat16"):
                mine = [what for what in whats if what.startswith(f"{memory} {one.name} {dtype}")]
                ranks = {f"{memory} {one.name} {dtype} rank {rank}" for rank in (64, 128, 256, 512, 1024)}
                assert len(mine) == 1 or ranks <= set(mine)


def test_dry_run_trains_resumes_and_measures(dry):
    _, facts, _ = dry
    trained = {row["group"]: row for row in of_part(facts, "training")}
    assert trained["CPU checkpoint continued on CPU"]["error"] == 0.0
    assert trained["CPU checkpoints saved in the background"]["reason"] == "2 intact"
    assert all(trained[group]["result"] == "not run" for group in training.ON_GPU)
    fused = next(row for row in of_part(facts, "speed") if row["group"].endswith("elas_fused"))
    assert fused["speed"]["ms"] > 0 and fused["speed"]["times_as_fast_as"]["full_swiglu"] > 0
    assert all(int(re.search(r"\d+", row["reason"])[0]) > 50 for row in of_part(facts, "tests"))


def test_report_has_table_logs_and_progress(dry):
    done, facts, out = dry
    text = (out / "report.txt").read_text()
    assert json.loads((out / "report.json").read_text())["rows"] == facts["rows"]
    assert text.splitlines()[:4] == done.stdout.splitlines()[:4] and "figures, reason" in text
    logs = {path.name for path in (out / "logs").iterdir()}
    assert {"device.log", "kernels.log", "training-cpu-float32.log", "speed-ffn-60m.log"} <= logs
    assert re.search(r"^training \(0:\d\d", done.stderr, re.MULTILINE)


def documented(title):
    """Keys in the first column of the table of docs/gpu.md with this title."""
    table = (ROOT / "docs" / "gpu.md").read_text().split(f"| {title} | |\n|---|---|\n")[1].split("\n\n")[0]
    return re.findall(r"^\| `(\w+)`", table, re.MULTILINE)


def test_documented_keys_are_those_written(dry):
    _, facts, _ = dry
    assert set(documented("key")) == facts.keys()
    assert all(row.keys() == set(documented("key of a row")) for row in facts["rows"])
    assert set(documented("key of `speed`")) == {"host_ms", "times_as_fast_as", *report.FORMS}
    assert all(row["speed"].keys() <= set(documented("key of `speed`")) for row in facts["rows"] if row["speed"])


def python(code):
    """The command of a part that runs this code, which has its `setting`."""
    head = "from elas.gpu_check.setting import Setting; from elas.gpu_check.rows import Row; setting = Setting.read()\n"
    return lambda setting: [sys.executable, "-c", head + code, *setting.command()[3:]]


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Runs `elas gpu-check` with other parts, for real; returns exit status and rows of the last part."""
    facts = "setting.add_facts(device='a GPU', cuda=True)\n"
    device = Part("device", 60.0, command=python(facts + "setting.add(Row(part='device', group='d', result='right'))"))

    def run(part, *arguments):
        monkeypatch.setattr(gpu_check, "DEVICE", device)
        good = Part("good", 60.0, 0.0, command=python("setting.add(Row(part='good', group='good', result='right'))"))
        monkeypatch.setattr(gpu_check, "PARTS", [part, good])
        status = exit_status(cli.run, ["gpu-check", "--out", str(tmp_path / "out"), *arguments])
        facts = json.loads((tmp_path / "out" / "report.json").read_text())
        if not arguments:
            assert of_part(facts, "good")[0]["result"] == "right"  # whatever the other did
        return status, of_part(facts, part.name)

    return run


def test_a_wrong_kernel_and_one_that_crashes_are_named(check, capsys, monkeypatch):
    code = "from elas.gpu_check import kernels; kernels.run(setting, 'injected_kernels')"
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{Path(__file__).parent}")
    status, found = check(Part("kernels", 120.0, command=python(code)), "--dry-run")
    results = {row["what"]: row for row in found}
    assert status == 1
    wrong = results["fused wrong float32 rank 64"]
    assert wrong["result"] == "wrong" and wrong["error"] > 0.1 and "du" in wrong["reason"]
    crashed = results["fused crash float32 rank 64"]
    assert crashed["result"] == "wrong" and "SIGSEGV" in crashed["reason"]
    assert results["fused right bfloat16 rank 64"]["result"] == "right"  # comes after the crash
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(
    "code, reason",
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("import time; print('waiting', flush=True); time.sleep(60)", "not complete after 5 s, killed"),
        ("pass", "without a result"),
        ("setting.add(Row(part='bad', group='sum', result='wrong', reason='is 3'))", "is 3"),
    ],
    ids=["killed", "raised", "hung", "silent", "wrong"],
)
def test_a_part_that_fails_is_wrong(check, code, reason):
    status, (row,) = check(Part("bad", 5.0, 0.0, command=python(code)))
    assert status == 1 and row["result"] == "wrong" and reason in row["reason"]


@pytest.mark.parametrize("least", (0.0, 15.0), ids=["cut", "not started"])
def test_what_does_not_fit_is_not_run(check, least):
    code = "setting.add(Row(part='long', group='done', result='right')); import time; time.sleep(60)"
    status, found = check(Part("long", 100.0, least, command=python(code)), "--minutes", "0.05")
    assert status == 0
    assert [row["result"] for row in found] == (["not run"] if least else ["right", "not run"])
    assert found[-1]["reason"].startswith("no time left")


def test_without_cuda_one_line_and_nothing_written(tmp_path, capsys):
    assert exit_status(cli.run, ["gpu-check", "--out", str(tmp_path / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("device (")]
    assert line.startswith("error: elas gpu-check: no CUDA device") and "--dry-run" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--minutes", "0"], "--minutes 0"),
        (["--parts", "kernel"], "'kernel' is unknown"),
        (["--parts", ","], "one or more"),
        (["--out", str(ROOT)], "exists"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, says):
    assert exit_status(cli.run, ["gpu-check", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_nvidia_smi_of_the_gpu_that_is_used(tmp_path, monkeypatch):
    lines = [", ".join(f"{name}-{gpu}" for name in hardware.QUERY) for gpu in ("a", "b")]
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "\n".join(f"echo '{line}'" for line in lines))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.nvidia_smi("uuid-b")["driver_version"] == "driver_version-b"
    assert hardware.nvidia_smi(None)["uuid"] == "uuid-a"
    program.write_text("#!/bin/sh\necho no devices; exit 9")
    assert "no devices" in hardware.nvidia_smi(None)
    program.unlink()
    assert hardware.nvidia_smi(None) == "nvidia-smi is not there"


def test_all_reduce_of_two_processes(tmp_path):
    wrong, figures = nccl.all_reduce(2, "gloo", tmp_path / "store", 60)
    assert wrong == "" and figures["bus_gb_per_s"] > 0


def junit(tmp_path, *outcomes):
    cases = "".join(f'<testcase name="t{n}">{inner}</testcase>' for n, inner in enumerate(outcomes))
    path = tmp_path / "junit.xml"
    path.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    return checkout.read_junit(path)


def test_rows_of_folders(tmp_path):
    bad = junit(tmp_path, "", "<failure/>", "<error/>", "<skipped/>")
    row = checkout.outcome("tests/x", bad, 1, "", "ended with status 1")
    assert row.result == "wrong" and row.reason == "1 passed, 2 failed, 1 skipped: t1, t2"
    good = junit(tmp_path, "", "<skipped/>")
    assert checkout.outcome("tests/x", good, 0, "", "").result == "right"
    assert checkout.outcome("tests/x", good, 2, checkout.NO_TIME, "").result == "not run"
    assert checkout.outcome("tests/x", good, 2, "no end within 300 s", "").result == "wrong"
    assert checkout.outcome("tests/x", junit(tmp_path), checkout.NO_TESTS, "", "").result == "not run"
    assert checkout.outcome("tests/x", None, 3, "", "ended with status 3").result == "wrong"
    assert checkout.why_not(tmp_path) == checkout.NOT_HERE
    assert checkout.folders(ROOT)[:4] == ["gpu", "kernels", "nn", "distributed"]


def test_rows_of_benchmarks():
    key = {"shape": "60m", "dtype": "bfloat16", "bound": 1e-2}
    rows = [
        {**key, "variant": "full_swiglu_compiled", "fwd_ms": 2.0, "bwd_ms": 4.0, "rel_err": 1e-3},
        {**key, "variant": "elas_fused", "fwd_ms": 1.0, "bwd_ms": 1.0, "rel_err": 1e-3, "peak_share": 0.25},
        {**key, "variant": "elas_compressed", "fwd_ms": None, "bwd_ms": None, "rel_err": 0.5},
    ]
    facts = {"rows": rows, "notes": ["60m bfloat16 x: left out: y", "60m: WRONG"]}
    _, fused, compressed, left_out = speed.rows_of(speed.GPU[0], facts)
    assert fused.speed["times_as_fast_as"] == {"full_swiglu_compiled": 3.0}
    assert "25% of peak, 3.00× full_swiglu_compiled" in report.speed_in_words(fused.speed)
    assert compressed.result == "wrong" and compressed.error == 0.5
    assert left_out.result == "not run" and left_out.reason.endswith("left out: y")


def test_rows_of_training_steps():
    key = {"dtype": "bfloat16", "loss": 5.0, "grad_norm": 1.0, "expected_loss": 4.0, "expected_grad_norm": 1.0}
    rows = [
        {**key, "variant": "hf_llama", "step_ms": 8.0, "tokens_per_s": 1e5},
        {**key, "variant": "elas", "step_ms": 4.0, "tokens_per_s": 2e5},
        {**key, "variant": "full_swiglu", "step_ms": None, "tokens_per_s": None},
    ]
    _, ours, wrong = speed.rows_of(speed.GPU[-1], {"rows": rows})
    assert ours.speed == {"ms": 4.0, "tokens_per_s": 2e5, "times_as_fast_as": {"hf_llama": 2.0}}
    assert wrong.result == "wrong" and "loss 5.0" in wrong.reason and "4.0" in wrong.reason


def test_losses_that_differ_or_are_missing():
    want = {step: 2.0 for step in range(1, 13)}
    assert training.difference({**want, 7: 2.002}, want) == pytest.approx(1e-3)
    assert math.isinf(training.difference({**want, 7: math.nan}, want))
    assert math.isinf(training.difference({1: 2.0}, want)) and math.isinf(training.difference({}, want))


def test_the_case_that_runs_can_be_read_at_any_moment(tmp_path):
    setting = Setting("kernels", "cpu", tmp_path / "rows", tmp_path, tmp_path, 60.0)
    kernel_cases._at(setting, 0, "fused cpu float32", "rank 64")
    writer = threading.Thread(
        target=lambda: [kernel_cases._at(setting, n, "fused cpu float32", "") for n in range(2000)]
    )
    writer.start()
    while writer.is_alive():
        assert kernels._builds(setting)
    writer.join()
