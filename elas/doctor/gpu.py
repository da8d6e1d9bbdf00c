"""Findings about GPUs: the driver, what torch sees of them, NCCL, and Triton with its tiles."""

import importlib.metadata
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from elas.doctor.ask import Answer
from elas.doctor.finding import NOT_ON_CPUS, Finding, one_line, unchecked
from elas.doctor.software import install, satisfies, version_of

TRITON = ">=3.6"
GIB = 2**30
_BUILD = "install the CUDA build of torch that fits the driver (docs/install.md)"


def findings(smi: Mapping[str, Any], nodes: int, visible: str | None, torch: Answer, tiles: Answer) -> list[Finding]:
    """Everything about GPUs and the back ends of torch.distributed.

    On a machine with a GPU, what training on it takes is required; elsewhere it is optional.

    Args:
        smi: `gpus` (names), `driver` and `gpu_error`, from `elas.launch.preflight.facts.gpus`.
        nodes: number of `/dev/nvidiaN`.
        visible: `CUDA_VISIBLE_DEVICES`; None if not set.
        torch: answer to worker.py's `torch`.
        tiles: answer to `triton tiles`.
    """
    facts: Mapping[str, Any] = torch.value or {}
    here = max(len(smi["gpus"]), nodes, len(facts.get("gpus", ())))
    hidden = visible is not None and not visible.replace("-1", "").strip()
    required = here > 0 and not hidden
    found = [_driver(smi, here, required)]
    if not torch.finished:
        return [*found, unchecked("GPUs in torch", torch.error, "training on GPUs", required), _triton(required)]
    if torch.value is None:
        fix = "fix torch first; if the driver hangs, nvidia-smi hangs as well: restart the machine"
        why = one_line(torch.error)
        return [*found, Finding("GPUs in torch", False, why, "training on GPUs", fix, required), _triton(required)]
    found += [_build(facts, required), _gpus(facts, here, visible, hidden, required), _nccl(facts, required)]
    gloo = "" if facts["gloo"] else "install a build of torch with gloo, such as those of pytorch.org"
    found.append(Finding("gloo", facts["gloo"], "in torch" if facts["gloo"] else "not in torch",
                         "several ranks", gloo, required=True))  # fmt: skip
    return [*found, _triton(required), _tiles(tiles, bool(facts["gpus"]))]


def _driver(smi: Mapping[str, Any], here: int, required: bool) -> Finding:
    what, needed_for = "NVIDIA driver", "training on GPUs"
    if smi["gpu_error"]:
        fix = "reload or reinstall the driver; in a container, start it with --gpus all"
        return Finding(what, False, f"nvidia-smi: {one_line(smi['gpu_error'])}", needed_for, fix, required)
    if smi["driver"]:
        return Finding(what, True, smi["driver"], needed_for, required=required)
    if here:
        fix = "install nvidia-smi (nvidia-utils) for the driver's version"
        return Finding(what, False, "nvidia-smi is not installed", "GPUs in elas launch check", fix)
    fix = "none needed on CPUs; where there is a GPU, install its driver, or start the container with --gpus all"
    return Finding(what, False, "no NVIDIA GPU", needed_for, fix)


def _build(facts: Mapping[str, Any], required: bool) -> Finding:
    cuda = facts["cuda"]
    found = f"built with CUDA {cuda}" if cuda else f"torch {facts['version']} is built without CUDA"
    fix = "" if cuda else _BUILD if required else NOT_ON_CPUS
    return Finding("CUDA in torch", cuda is not None, found, "training on GPUs", fix, required)


def _gpus(facts: Mapping[str, Any], here: int, visible: str | None, hidden: bool, required: bool) -> Finding:
    what, needed_for, gpus = "GPUs in torch", "training on GPUs", facts["gpus"]
    broken = [f"{number}: {one_line(of['error'])}" for number, of in enumerate(gpus) if of["error"]]
    if broken:
        fix = "end what uses or holds that GPU, and check that torch is built for it: torch.cuda.get_arch_list()"
        return Finding(what, False, f"GPU {broken[0]}", needed_for, fix, required)
    if gpus:
        kinds = Counter(f"{of['name']}, capability {of['capability']}, {of['memory'] / GIB:.0f} GiB" for of in gpus)
        found = "; ".join(f"{count} × {kind}" for kind, count in kinds.items())
        if len(gpus) < here and visible is None:
            fix = "compare nvidia-smi -L; MIG or a container's --gpus may hide some"
            return Finding(what, False, f"{found}; {here} in the machine", needed_for, fix)
        return Finding(what, True, found, needed_for, required=required)
    if hidden and here:
        fix = "unset CUDA_VISIBLE_DEVICES"
        return Finding(what, False, f"none: CUDA_VISIBLE_DEVICES={visible}", needed_for, fix)
    found = f"none: {one_line(facts['warning'])}" if facts["warning"] else "none"
    if not here:
        return Finding(what, False, found, needed_for, NOT_ON_CPUS)
    fix = _BUILD if facts["cuda"] is None or "driver" in found else "check CUDA_VISIBLE_DEVICES and nvidia-smi"
    return Finding(what, False, found, needed_for, fix, required)


def _nccl(facts: Mapping[str, Any], required: bool) -> Finding:
    version = facts["nccl"]
    fix = "" if version else _BUILD if required else NOT_ON_CPUS
    return Finding("NCCL", version is not None, version or "not in torch", "several GPUs", fix, required)


def wanted_triton() -> str | None:
    """The version of Triton that the installed torch requires; None if it names none."""
    try:
        lines = importlib.metadata.requires("torch") or []
    except Exception:  # no torch, or broken metadata
        return None
    found = [match[1] for line in lines if (match := re.match(r"triton\s*\(?==\s*([\w.+]+)", line))]
    return found[0] if found else None


def _triton(gpus: bool) -> Finding:
    version, wanted = version_of("triton"), wanted_triton()
    needed_for = "the fast FFN on GPUs"
    right = f"triton=={wanted}" if wanted else f"triton{TRITON}"
    if version is None:
        fix = install(right) if gpus else NOT_ON_CPUS
        return Finding("Triton", False, "not installed", needed_for, fix)
    if wanted and version.split("+")[0] != wanted:
        return Finding("Triton", False, f"{version}; torch requires {wanted}", needed_for, install(right))
    if not satisfies(version, TRITON):
        return Finding("Triton", False, f"{version}, not {TRITON}", needed_for, install(right))
    return Finding("Triton", True, version, needed_for)


def _tiles(answer: Answer, gpus: bool) -> Finding:
    what, needed_for = "Triton kernels", "the fast FFN on GPUs"
    if not answer.finished:
        return unchecked(what, answer.error, needed_for)
    if answer.value is None:
        fix = "fix what the message names; without them, --sparsity.implementation torch"
        return Finding(what, False, one_line(answer.error), needed_for, fix)
    if not gpus:
        return Finding(what, False, "not for CPUs, which have their own kernel", needed_for, NOT_ON_CPUS)
    bad = {capability: why for capability, why in answer.value.items() if why}
    if bad:
        found = "; ".join(f"capability {capability}: {why}" for capability, why in bad.items())
        missing = version_of("triton") is None
        fix = "install Triton" if missing else "none needed: plain PyTorch is used, which is slower"
        return Finding(what, False, found, needed_for, fix)
    return Finding(what, True, f"tiles for capability {', '.join(answer.value)}", needed_for)
