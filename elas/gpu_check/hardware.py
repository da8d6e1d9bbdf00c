"""The part `device`: the GPU as torch and nvidia-smi show it, and the versions of what computes on it."""

import importlib.metadata
import shutil
import subprocess
from typing import Any

from elas.gpu_check.rows import Row
from elas.gpu_check.setting import Setting

QUERY = ("uuid", "name", "driver_version", "pstate", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem",
         "power.draw", "power.limit", "temperature.gpu", "utilization.gpu", "memory.used",
         "mig.mode.current")  # fmt: skip
PACKAGES = ("triton", "megatron-core", "deepspeed", "transformers", "nvidia-cusparselt-cu12")
REQUIRED = ("megatron-core", "deepspeed")


def run(setting: Setting) -> None:
    """Write the rows of this part, and the facts `device`, `cuda`, `no_cuda`, `gpu`, `nvidia_smi` and `versions`."""
    import torch

    from elas.accelerator import processor

    found = versions()
    missing = [name for name in REQUIRED if found[name] is None]
    gpu = torch_facts()
    setting.add_facts(cuda=gpu is not None, no_cuda=None if gpu else why_no_cuda(), gpu=gpu, versions=found)
    setting.add_facts(device=gpu["name"] if gpu else processor(), processor=processor())
    if gpu is not None:
        text = f"{gpu['count']} × {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']:.0f} GiB"
        setting.add(Row(part="device", group="device", result="right", reason=text))
    else:
        reason = "a dry run is on the CPU" if setting.dry_run else why_no_cuda()
        setting.add(Row(part="device", group="device", result="not run", reason=reason))
    smi = nvidia_smi(gpu["uuid"] if gpu else None)
    setting.add_facts(nvidia_smi=smi if isinstance(smi, dict) else None)
    if isinstance(smi, dict):
        text = f"driver {smi['driver_version']}, SM clock {smi['clocks.sm']} of {smi['clocks.max.sm']}, "
        text += f"{smi['power.draw']} of {smi['power.limit']}, {smi['temperature.gpu']} °C"
        setting.add(Row(part="device", group="nvidia-smi", result="right", reason=text))
    else:
        setting.add(Row(part="device", group="nvidia-smi", result="not run", reason=smi))
    text = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    if missing:
        text = f"{' and '.join(missing)} not installed; {text}"
    setting.add(Row(part="device", group="versions", result="wrong" if missing else "right", reason=text))
    if gpu is not None:
        torch.ones(1, device="cuda").sum().item()  # fails here where the driver or the build is unfit


def why_no_cuda() -> str:
    """Why torch sees no CUDA device."""
    import torch

    if torch.version.cuda is None:
        return f"no CUDA device: torch {torch.__version__} is built without CUDA"
    return f"no CUDA device: torch {torch.__version__} sees none; `nvidia-smi` shows whether its driver does"


def torch_facts() -> dict[str, Any] | None:
    """The first CUDA device as torch shows it; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    shown = torch.cuda.get_device_properties(0)
    return {
        "name": shown.name,
        "count": torch.cuda.device_count(),
        "capability": f"{shown.major}.{shown.minor}",
        "memory_gib": shown.total_memory / 2**30,
        "processors": shown.multi_processor_count,
        "uuid": str(getattr(shown, "uuid", "")),
    }


def versions() -> dict[str, str | None]:
    """Versions by name; None for what is not there."""
    import torch

    from elas import __version__

    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    nccl = None
    if torch.version.cuda is not None and torch.distributed.is_nccl_available():
        from torch.cuda import nccl as library

        nccl = ".".join(map(str, library.version()))
    found = {"elas": __version__, "torch": torch.__version__, "CUDA": torch.version.cuda, "NCCL": nccl}
    found["cuDNN"] = None if cudnn is None else str(cudnn)
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def nvidia_smi(uuid: str | None) -> dict[str, str] | str:
    """Driver, clocks, power and temperature by the names of `QUERY`, of the device with this UUID or the first one.

    Returns:
        The values with their units, or why there are none.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return "nvidia-smi is not there"
    command = [program, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except subprocess.TimeoutExpired:
        return "nvidia-smi did not finish in 15 s"
    except OSError as error:
        return f"nvidia-smi cannot be started ({error.strerror})"
    lines = [line for line in done.stdout.splitlines() if line.count(",") == len(QUERY) - 1]
    if done.returncode or not lines:
        return f"nvidia-smi failed: {(done.stdout + done.stderr).strip().splitlines()[-1:] or 'no output'}"
    line = next((one for one in lines if uuid and uuid in one), lines[0])
    return dict(zip(QUERY, (cell.strip() for cell in line.split(","))))
