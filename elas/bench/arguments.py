"""Options that the benchmarks share."""

import os
from difflib import get_close_matches

import torch

from elas.accelerator import has_cuda, processor
from elas.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choices(option: str, text: str, known: list[str]) -> list[str]:
    """A comma-separated option as a list.

    Args:
        option: its name, for the message.
        text: `a,b`.
        known: the allowed entries.

    Raises:
        UserError: an unknown entry, an empty list, or a repeated entry.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            fix = f"did you mean {near[0]!r}?" if near else f"choose from {','.join(known)}"
            raise UserError(f"{option} {text}: {name!r} is unknown; {fix}")
    if not names or len(set(names)) < len(names):
        raise UserError(f"{option} {text!r}: requires one or more different names; choose from {','.join(known)}")
    return names


def counts(option: str, text: str) -> list[int]:
    """A comma-separated option as different whole numbers above 0.

    Raises:
        UserError: anything else.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    found = [int(word) for word in words if word.isdecimal() and int(word) > 0]
    if not found or len(found) < len(words) or len(set(found)) < len(found):
        raise UserError(f"{option} {text!r}: must be different whole numbers above 0, such as 1,8")
    return found


def dtypes(text: str) -> list[str]:
    """`--dtypes` as a list of names in `DTYPES`."""
    return choices("--dtypes", text, list(DTYPES))


def use_device(name: str | None) -> None:
    """Apply `--device`; to be called before anything looks for a GPU.

    Args:
        name: `cpu` hides GPUs from this process, `cuda` requires one, None takes it if there is one.

    Raises:
        UserError: `cuda` without a CUDA device.
    """
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if has_cuda():  # this process has started CUDA before
            raise UserError("--device cpu: this process has used a GPU already; set CUDA_VISIBLE_DEVICES='' before")
    if name == "cuda" and not has_cuda():
        built = (
            f"torch {torch.__version__} is built without CUDA"
            if torch.version.cuda is None
            else ("torch sees no CUDA device; `nvidia-smi` shows whether the driver does")
        )
        raise UserError(f"--device cuda: {built}; `elas doctor` says more")


def at_least(option: str, value: int | None, least: int) -> None:
    """Check a number; None stands for a default, which is not checked.

    Raises:
        UserError: it is smaller than `least`.
    """
    if value is not None and value < least:
        raise UserError(f"{option} {value}: must be at least {least}")


def environment() -> dict[str, object]:
    """The environment of a measurement: torch's version, threads, and the processor or GPU."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": gpu or processor(),
    }
