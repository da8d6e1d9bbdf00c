"""Findings about Python and its packages: versions from their metadata, and whether they import."""

import contextlib
import importlib.metadata
import importlib.util
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import elas
from elas.doctor.ask import Answer
from elas.doctor.finding import Finding, one_line, unchecked

PYTHONS = ((3, 11), (3, 13))
"""Oldest and newest Python that ELAS supports."""


@dataclass(frozen=True)
class Package:
    """A package that ELAS uses.

    Attributes:
        name: on the package index.
        module: its import, or the part of it that ELAS imports.
        needed_for: what requires it.
        wanted: `>=VERSION` or `==VERSION`; empty: any.
        extra: the optional extra of ELAS that installs it; None if ELAS requires it.
    """

    name: str
    module: str
    needed_for: str
    wanted: str = ""
    extra: str | None = None


REQUIRED = (
    Package("torch", "torch", "everything", ">=2.11.0a0"),
    Package("megatron-core", "megatron.core", "model, training", "==0.16.1"),
    Package("deepspeed", "deepspeed", "training", ">=0.19.8"),
    Package("transformers", "transformers", "tokenizers, export, import, generate", ">=5.17"),
    Package("datasets", "datasets", "prep, evaluation"),
    Package("datatrove", "datatrove", "prep"),
    Package("pyarrow", "pyarrow", "prep"),
    Package("sentencepiece", "sentencepiece", "tokenizers"),
    Package("protobuf", "google.protobuf", "tokenizers"),
    Package("jsonargparse", "jsonargparse", "settings", ">=4.40"),
    Package("numpy", "numpy", "data"),
    Package("pyyaml", "yaml", "settings"),
    Package("ninja", "ninja", "compiling the CPU kernel"),
    Package("tensorboard", "tensorboard", "log.trackers [tensorboard]"),
    Package("matplotlib", "matplotlib", "pictures: plan"),
    Package("bokeh", "bokeh", "report", ">=3.9"),
    Package("jinja2", "jinja2", "report"),
    Package("rich", "rich", "training, watch, prep"),
    Package("filelock", "filelock", "compiling the CPU kernel"),
    Package("orjson", "orjson", "training, report"),
)
"""The dependencies of pyproject.toml."""

OPTIONAL = (
    Package("lm_eval", "lm_eval", "elas eval --tasks", ">=0.4.13", "eval"),
    Package("accelerate", "accelerate", "elas eval --tasks", "", "eval"),
    Package("ray", "ray", "elas prep --executor ray", "", "ray"),
    Package("wandb", "wandb", "log.trackers [wandb]", ">=0.31", "wandb"),
    Package("trackio", "trackio", "log.trackers [trackio]", ">=0.43", "trackio"),
)
"""Extras; Triton, which GPUs need, is in gpu.py."""


def python() -> list[Finding]:
    """Python's version, and which ELAS it imports."""
    version, oldest, newest = sys.version_info[:2], *PYTHONS
    words = "{}.{} to {}.{}".format(*oldest, *newest)
    ok = oldest <= version <= newest
    fix = "" if ok else f"make an environment with Python {words}"
    found = f"{platform.python_version()} at {sys.executable}"
    folder = Path(elas.__path__[0])
    ours = f"{elas.__version__} at {folder}"
    return [
        Finding("Python", ok, found, "everything", fix, required=True),
        Finding("elas", True, ours, "everything", required=True),
    ]


def version_of(name: str) -> str | None:
    """The version of an installed package; None if it is not installed, or its metadata is broken."""
    with contextlib.suppress(Exception):  # metadata of a half-removed package raises what it likes
        return importlib.metadata.version(name)
    return None


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 11, 0) of `2.11.0a0+git`."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version is as wanted (`>=VERSION`, `==VERSION`, or empty), by its leading numbers."""
    have, limit = numbers(version), numbers(wanted[2:])
    return not wanted or (have >= limit if wanted.startswith(">=") else have == limit)


def install(what: str) -> str:
    """The command that installs a requirement into this Python's environment."""
    return f"{shlex.quote(sys.executable)} -m pip install {shlex.quote(what)}"


def package(of: Package, answer: Answer | None, torch_error: str | None = None) -> Finding:
    """A package's version, and whether it imports.

    Args:
        of: the package.
        answer: to `import MODULE`; None: not asked, then it is only looked for.
        torch_error: the error of torch's import, which those of other packages repeat.
    """
    version = version_of(of.name)
    required = of.extra is None
    fix = install(f"elas[{of.extra}]" if of.extra else f"{of.name}{of.wanted}")
    if of.name == "torch":
        fix = "install torch before ELAS, the build for this machine's GPU driver (docs/install.md)"
    if version is None and (answer is None or answer.error is not None):
        if answer is not None and not answer.finished:
            return unchecked(of.name, answer.error, of.needed_for, required)
        if answer is None or (answer.error or "").startswith("ModuleNotFoundError"):
            return Finding(of.name, False, "not installed", of.needed_for, fix, required)
        return Finding(of.name, False, f"import: {one_line(answer.error)}", of.needed_for, fix, required)
    found = version or "unknown version"
    if version is not None and not satisfies(version, of.wanted):
        return Finding(of.name, False, f"{found}, not {of.wanted}", of.needed_for, fix, required)
    if answer is not None and not answer.finished:
        return unchecked(of.name, f"{answer.error}; {found}", of.needed_for, required)
    if answer is not None and answer.error is not None:
        again = f"{shlex.quote(sys.executable)} -c 'import {of.module}' shows where; if its files are damaged, {fix}"
        again += "" if of.name == "torch" else " --force-reinstall --no-deps"
        if of.name != "torch" and answer.error == torch_error:
            again = "fix torch first"
        return Finding(of.name, False, f"{found}, import: {one_line(answer.error)}", of.needed_for, again, required)
    return Finding(of.name, True, found, of.needed_for, required=required)


def packages(answers: Mapping[str, Answer]) -> list[Finding]:
    """All packages, and Megatron-core's compiled helpers.

    Args:
        answers: to `import MODULE` for all of `REQUIRED`, and to `megatron helpers`.
    """
    found = []
    for of in REQUIRED:
        found.append(package(of, answers[f"import {of.module}"], answers["import torch"].error))
        if of.name == "megatron-core" and version_of(of.name) is not None:
            found.append(_helpers(answers["megatron helpers"], of.wanted))
    return found + [package(of, None) for of in OPTIONAL]


def _helpers(answer: Answer, wanted: str) -> Finding:
    what, needed_for = "megatron-core's compiled helpers", "batches of tokens"
    if answer.error is None:
        return Finding(what, True, str(answer.value), needed_for, required=True)
    if not answer.finished:
        return unchecked(what, answer.error, needed_for, required=True)
    fix = "install the wheel for this Python: " + install(f"megatron-core{wanted}")
    fix += " --force-reinstall --no-deps --only-binary megatron-core"
    return Finding(what, False, one_line(answer.error), needed_for, fix, required=True)
