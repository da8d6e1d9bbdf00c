"""The child process of `elas doctor`: imports packages and queries torch, and reports each as a line of JSON.

    python -P worker.py < '{"path": [entries of sys.path], "ask": ["import numpy", "torch"]}'

It is started as a file, not as a module, so that it imports nothing of `elas` before `sys.path` is the parent's. An
answer is preceded by a line that names its question: if the process crashes, the parent knows where.
"""

import importlib
import importlib.machinery
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


def import_package(name: str) -> None:
    """Import a module."""
    importlib.import_module(name)


def torch_facts() -> dict[str, Any]:
    """Version, build, back ends of torch.distributed, and the GPUs, each of which adds a few numbers."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import torch
        import torch.distributed as dist
        from torch.cuda import nccl

        available = torch.cuda.is_available()
        facts: dict[str, Any] = {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "gloo": dist.is_available() and dist.is_gloo_available(),
            "nccl": None,
            "gpus": [_gpu(torch, number) for number in range(torch.cuda.device_count())] if available else [],
        }
        if dist.is_available() and dist.is_nccl_available():
            facts["nccl"] = ".".join(map(str, nccl.version()))
    words = [str(one.message) for one in caught if "cuda" in str(one.message).lower()]
    return {**facts, "warning": words[-1] if words else None}


def _gpu(torch: Any, number: int) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": f"GPU {number}", "capability": None, "memory": 0, "error": None}
    try:
        properties = torch.cuda.get_device_properties(number)
        facts |= {"name": properties.name, "memory": properties.total_memory}
        facts["capability"] = f"{properties.major}.{properties.minor}"
        if torch.ones(8, device=f"cuda:{number}").sum().item() != 8:
            facts["error"] = "the sum of eight ones is wrong"
    except Exception as error:  # whatever the driver raises is what the user has to know
        facts["error"] = f"{type(error).__name__}: {error}"
    return facts


def triton_tiles() -> dict[str, str | None]:
    """Why our Triton kernels cannot run in bf16, or None, by compute capability; by `cpu` without a GPU."""
    import torch

    from elas.kernels.relu2_24.triton.fused import obstacle

    if not torch.cuda.is_available():
        return {"cpu": obstacle(torch.device("cpu"), torch.bfloat16)}
    found = {}
    for number in range(torch.cuda.device_count()):
        capability = "{}.{}".format(*torch.cuda.get_device_capability(number))
        found[capability] = obstacle(torch.device("cuda", number), torch.bfloat16)
    return found


def cpu_kernel() -> dict[str, Any]:
    """The folder of compiled extensions, and the file of the CPU kernel if it is built."""
    from elas import extensions
    from elas.kernels.relu2_24 import cpu

    library = extensions.library(cpu._name())
    return {"folder": str(extensions.extensions_dir()), "library": library and str(library)}


def ffn_kernel() -> dict[str, str]:
    """Which implementation `auto` chooses for the preset 60m on this machine, and why; nothing is built for it."""
    from elas.config import load_config
    from elas.model.kernel import chosen

    found, why = chosen(load_config("60m", {}))
    return {"name": f"{found.ffn_memory} {found.name}", "why": why}


def megatron_helpers() -> str:
    """Load Megatron-core's compiled data helpers alone; returns their file."""
    spec = importlib.util.find_spec("megatron")
    folders = [Path(root) / "core" / "datasets" for root in (spec and spec.submodule_search_locations) or ()]
    files = [file for folder in folders for file in sorted(folder.glob("helpers_cpp*"))]
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    right = [file for file in files if file.name.removeprefix("helpers_cpp") in suffixes]
    if not right:
        raise ImportError(f"there is {files[0].name} only" if files else "no helpers_cpp in megatron/core/datasets")
    loader = importlib.util.spec_from_file_location("helpers_cpp", right[0])
    assert loader is not None and loader.loader is not None, right[0]
    loader.loader.exec_module(importlib.util.module_from_spec(loader))
    return right[0].name


QUESTIONS: dict[str, Callable[[], Any]] = {
    "torch": torch_facts,
    "triton tiles": triton_tiles,
    "cpu kernel": cpu_kernel,
    "ffn kernel": ffn_kernel,
    "megatron helpers": megatron_helpers,
}
"""By name; besides these, `import NAME` imports a module."""


def answer(question: str) -> dict[str, Any]:
    """The value of a question, or the error that it raised."""
    try:
        if question.startswith("import "):
            return {"value": import_package(question.removeprefix("import ")), "error": None}
        return {"value": QUESTIONS[question](), "error": None}
    except BaseException as error:  # a broken package may raise anything, SystemExit included
        return {"value": None, "error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answer the questions on standard input; what packages print goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asked = json.load(sys.stdin)
    sys.path[:] = asked["path"]
    for question in asked["ask"]:
        print(json.dumps({"begin": question}), file=out, flush=True)
        print(json.dumps({"question": question, **answer(question)}), file=out, flush=True)
    out.flush()
    os._exit(0)  # without the exit handlers of what was imported


if __name__ == "__main__":
    main()
