"""Code blocks of README and the documentation: commands parse, Python's imports exist, YAML is settings.

A block with `<!-- not run: REASON -->` on the line before is left out. Two sequences run as they stand, on a tiny
corpus.
"""

import ast
import functools
import importlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from support.docs import ROOT, Block, all_blocks, blocks, pages, shell_lines

from elas import cli
from elas.command import exit_status
from elas.config import KEYS, SECTIONS, from_flat, load_config, presets, split_overrides
from elas.errors import UserError

import commands  # isort: skip  docs/site, found by support.docs

MADE_BY_OTHERS = {"pip", "python -m pip", "python3.12 -m pip", "python -m http.server", "cat", "grep", "tee", "."}
"""Commands that are not ours; what they do is no business of these tests."""
SETTINGS_TOO = {"eval"}
"""Commands beside those with a `SettingsParser` that take settings."""


@functools.cache
def parsers() -> dict[tuple[str, ...], dict[str, commands.Command]]:
    """Commands by their words, and by mode."""
    found: dict[tuple[str, ...], dict[str, commands.Command]] = {}
    for command in (one for group in commands.groups() for one in group.commands):
        found.setdefault(command.words, {})[command.mode] = command
    return found


def check_elas(words: list[str]) -> None:
    """Raise for a command, option, value or setting that does not exist."""
    open_ended = "…" in words  # the reader adds more: what is required may be missing
    words = [word for word in words if word != "…"]
    if words[1:] in ([], ["--help"], ["--version"]):
        return
    name = next((tuple(words[:n]) for n in (3, 2) if tuple(words[:n]) in parsers()), None)
    if name is None:
        raise UserError(f"{' '.join(words)}: no such command")
    modes, rest = parsers()[name], words[len(name) :]
    parser = modes[next((mode for mode in modes if mode and mode in rest), "")].parser
    if any(re.match(r"--[a-z_]+\.", word) for word in rest):
        if type(parser).__name__ != "SettingsParser" and name[1] not in SETTINGS_TOO:
            raise UserError(f"{' '.join(name)}: takes no settings")
        overrides, rest = split_overrides(rest)
        from_flat(overrides)
    if "--config" in rest and (given := rest[rest.index("--config") + 1]) not in presets():
        assert given.endswith(".yaml") or given.isupper() or "/" in given, f"--config {given}: no preset, no file"
    required = [action for action in parser._actions if action.required]
    try:
        for action in required:
            action.required = not open_ended
        parser.parse_args(rest)
    finally:
        for action in required:
            action.required = True


def check_line(line: str) -> None:
    """Check one line of a shell."""
    for part in re.split(r"\s(?:&&|\|)\s", line):
        words = shlex.split(part, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if not words:
            continue
        check_words([word.removesuffix("…") if word != "…" else word for word in words])


def check_words(words: list[str]) -> None:
    """Check one command by what it starts."""
    program = words[0].removeprefix(".venv/bin/")
    scripts = [word for word in words if word.endswith(("launch/pretrain.py", "pretrain.sbatch"))]
    if program == "elas":
        check_elas(["elas", *words[1:]])
    elif scripts:
        check_elas(["elas", "train", *words[words.index(scripts[0]) + 1 :]])
    elif "elas.cli" in words:
        check_elas(["elas", *words[words.index("elas.cli") + 1 :]])
    elif any(word.endswith("prep.sbatch") for word in words):
        at = next(i for i, word in enumerate(words) if word.endswith("prep.sbatch"))
        check_elas(["elas", "prep", "tokenize", *words[at + 1 :]])
    elif program == "make":
        targets = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), f"no target {targets}"
    elif program in ("pytest", "python", "torchrun") and any(re.match(r"(docs|tests|launch)/", word) for word in words):
        paths = [word for word in words[1:] if re.match(r"(docs|tests|launch)/", word)]
        assert all((ROOT / path).exists() for path in paths), f"no such file: {words}"
    else:
        known = {program, " ".join(words[:2]), " ".join([program, *words[1:3]])} & MADE_BY_OTHERS
        assert known, f"{' '.join(words)}: neither checked here nor marked `<!-- not run: REASON -->`"


def shown(block: Block) -> str:
    return str(block)


@pytest.mark.parametrize("block", [one for one in all_blocks("bash") if not one.not_run], ids=shown)
def test_commands_parse(block):
    for line in shell_lines(block.text):
        try:
            check_line(line)
        except (UserError, AssertionError, ValueError, SystemExit) as error:
            pytest.fail(f"{block}: {line}\n{error}")


@pytest.mark.parametrize("block", [one for one in all_blocks("") if not one.not_run], ids=shown)
def test_commands_in_plain_blocks_parse(block):
    """Output and tables stand in blocks without a language; `elas` lines in them must parse all the same."""
    for line in shell_lines(block.text):
        if line.startswith("elas "):
            check_line(line)


@pytest.mark.parametrize("block", all_blocks("python"), ids=shown)
def test_python_compiles_and_its_imports_exist(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "elas":
            module = importlib.import_module(node.module or "")
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "elas":
                    importlib.import_module(name.name)


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=shown)
def test_yaml_is_settings(block, tmp_path):
    assert yaml.safe_load(block.text).keys() <= {*SECTIONS, "base"}
    path = tmp_path / "settings.yaml"
    path.write_text(block.text, encoding="utf-8")
    load_config(str(path))


def test_every_language_is_known():
    kinds = {(block.kind, str(block)) for page in pages() for block in blocks(page)}
    assert {kind for kind, _ in kinds} <= {"", "bash", "python", "yaml", "text"}


def test_settings_in_the_text_exist():
    """`section.name` in backticks is a key."""
    wrong = []
    for page in pages():
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for match in re.finditer(rf"`(?:--)?((?:{'|'.join(SECTIONS)})\.[a-z_]+)[`: =]", text):
            if match[1] not in {*KEYS, "log.tensorboard"} and not match[1].endswith((".py", ".md", ".jsonl", ".bin")):
                wrong.append(f"{page.name}: {match[1]}")
    assert not wrong


@pytest.mark.parametrize(
    "line", ["elas trian", "elas train --stepz 3", "elas eval --checkpoint c --modle.x 1", "frobnicate"]
)
def test_a_wrong_command_is_noticed(line):
    with pytest.raises((UserError, AssertionError)):
        check_line(line)


SMALL = (
    "--model.hidden_size 32 --model.num_layers 2 --model.num_attention_heads 2 --model.ffn_hidden_size 64 "
    "--model.vocab_size 400 --model.seq_length 32 --low_rank.rank 8 --train.micro_batch_size 2 "
    "--train.global_batch_size 2 --train.dtype float32 --train.steps 2 --train.eval_batches 1"
)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A folder with some text, as JSON lines and as files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").split("\n\n")
    for n in range(2):
        rows = (f'{{"text": {yaml.safe_dump(one, default_style=chr(34), width=10**6).strip()}}}' for one in text)
        (tmp_path / "corpus" / f"{n}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path


def run(line: str) -> None:
    """Run a line of a page on the small corpus; training in a process of its own."""
    line = line.replace("--input stdlib", "--input corpus/*.jsonl").replace(
        "corpus/*.jsonl", "corpus/0.jsonl corpus/1.jsonl"
    )
    line = re.sub(r"--vocab-size \d+", "--vocab-size 400", line)
    line = re.sub(
        r"--train\.steps \d+|--valid-fraction \S+", lambda m: "--valid-fraction 0.3" if "valid" in m[0] else "", line
    )
    words = shlex.split(line, comments=True)
    assert words[0] == "elas"
    if words[1] != "train":
        assert exit_status(cli.run, words[1:]) == 0, line
        return
    command = [sys.executable, "-m", "elas.cli", *words[1:], *SMALL.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("page, left_out", [("README.md", ()), ("docs/index.md", ("eval", "export"))])
def test_training_on_text_runs_as_it_stands(page, left_out, corpus):
    """`eval` and `export` of the start page have pages of their own, whose tests run them."""
    (block,) = [one for one in blocks(ROOT / page) if "elas prep tokenize " in one.text]
    for line in shell_lines(block.text):
        if line.startswith("elas ") and line.split()[1] not in left_out:
            run(line)
    assert list(corpus.glob("runs/*/checkpoints/step_00000002"))
