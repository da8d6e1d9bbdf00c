"""Importing the library changes nothing in the process; `elas.prepare()` does, and only it."""

import json
import os
import subprocess
import sys

import pytest

PROBE = """
import json, os, sys, warnings
import torch
if {first!r}:
    import {first}
def look():
    names = ("current_device", "synchronize", "Stream", "Event", "current_stream", "stream", "get_rng_state")
    return {{
        "environment": dict(os.environ), "filters": [str(f) for f in warnings.filters],
        "modes": len(torch.overrides._get_current_function_mode_stack()),
        "cuda": [id(getattr(torch.cuda, name)) for name in names],
        "dtype": str(torch.get_default_dtype()), "hooks": len(sys.meta_path), "threads": torch.get_num_threads(),
        "seed": torch.random.get_rng_state().sum().item(), "grad": torch.is_grad_enabled(),
    }}
before = look()
{what}
after = look()
print(json.dumps([key for key in before if before[key] != after[key]]))
"""
# What importing Megatron-core itself changes is not ours: it is imported first.
MEGATRON = "megatron.core.models.gpt"
PARTS = "model parallel model.provider model.spec model.activation kernels.relu2_24 accelerator"
IMPORTS = "import " + ", ".join(f"elas.{part}" for part in PARTS.split())


def changes(what: str, first: str) -> list[str]:
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": "/nowhere"}
    env.pop("DS_ACCELERATOR", None)
    code = PROBE.format(what=what, first=first)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(300)
def test_imports_change_nothing():
    assert changes(IMPORTS, MEGATRON) == []


@pytest.mark.timeout(300)
def test_prepare_does():
    import torch

    shims = [] if torch.cuda.is_available() else ["modes", "cuda"]
    assert changes("import elas; elas.prepare()", MEGATRON) == ["environment", "filters", *shims]
