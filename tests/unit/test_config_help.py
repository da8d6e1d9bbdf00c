"""What settings mean is said by commands: `elas config`, `--show-config`, `--help`, and hints at mistakes."""

import json
import re
import subprocess
import sys
import typing
from dataclasses import dataclass

import pytest
from support.corpora import write_corpus

from elas import cli
from elas.command import exit_status
from elas.config import KEYS, SECTIONS, Config, from_flat, load_config, presets, schema
from elas.config.catalogue import catalogue
from elas.config.hints import likely_keys
from elas.config.kinds import Range, range_of
from elas.config.writing import to_yaml
from elas.errors import ConfigError


def run(*argv: str) -> int:
    return exit_status(cli.run, list(argv))


@pytest.mark.parametrize("name", [*presets(), None])
def test_a_shown_configuration_reads_back_the_same(name, tmp_path):
    path = tmp_path / "shown.yaml"
    path.write_text(to_yaml(load_config(name)), encoding="utf-8")
    assert load_config(str(path)) == load_config(name)


TEXTS = [
    *(
        "2:4",
        "null",
        "yes",
        "1e-3",
        "0x10",
        " a ",
        "a #b",
        "a: b",
        "it's",
        'a "b"',
        "über/𝄞",
        "~",
        "-",
        "- x",
        "99,1,0",
    ),
    *("%a", "@b", "a\tb", "C:\\x", "2024-01-01", "2024-99-99", "[a, b]", "{a: 1}", "!x", "&y", "*z", "a\nb", "a,b"),
    "x" * 300,
]


def test_any_text_survives_showing_and_reading_back(tmp_path):
    path = tmp_path / "shown.yaml"
    for text in TEXTS:
        config = from_flat({"train.run_dir": text, "data.cache": text, "data.train": ["0.5", text, "0.5", "b"]})
        path.write_text(to_yaml(config), encoding="utf-8")
        assert load_config(str(path)) == config, text


def test_show_config_prints_comments_and_writes_json(tmp_path, capsys):
    target = tmp_path / "config.json"
    assert run("train", "--config", "60m", "--show-config", "--json", str(target)) == 0
    shown = capsys.readouterr().out
    assert "  # Transformer layers. [1 or more]\n  num_layers: 8\n" in shown
    assert json.loads(target.read_text()) == load_config("60m").to_dict()
    assert [key for key in KEYS if f"\n  {key.split('.')[1]}: " not in shown] == []


def test_every_key_has_a_type_a_range_and_a_meaning(tmp_path, capsys):
    target = tmp_path / "keys.json"
    assert run("config", "--json", str(target)) == 0
    keys = json.loads(target.read_text())["keys"]
    shown = capsys.readouterr().out
    assert [one["key"] for one in keys] == list(KEYS)
    for one in keys:
        assert one.keys() == {"key", "type", "default", "range", "help"}
        assert one["type"] and one["range"] and one["help"].endswith("."), one
        assert f"  {one['key'].split('.')[1]}  ({one['type']}; {one['range']}; default " in shown
    by_key = {one["key"]: one for one in keys}
    assert by_key["train.spike_nats"]["range"] == "more than 0"
    assert by_key["parallel.zero"]["type"] == "int | null" and by_key["parallel.zero"]["range"] == "0 | 1 | 2 | 3"
    assert by_key["optimizer.beta1"]["default"] == 0.9


@pytest.mark.parametrize("kind", [int, float | None, list[int], list[float] | str])
def test_a_number_without_a_range_cannot_be_a_key(monkeypatch, kind):
    @dataclass(kw_only=True)
    class Bare:
        """A section."""

        number: kind = None
        """Described."""

    monkeypatch.setitem(schema.SECTIONS, "bare", Bare)
    with pytest.raises(TypeError, match=r"bare\.number is a number without a Range"):
        catalogue.__wrapped__()


def test_every_range_is_enforced_at_its_edges():
    from elas.config.rules import check_ranges

    tried = 0
    for key in KEYS:
        section, name = key.split(".")
        allowed = range_of(SECTIONS[section].__dataclass_fields__[name].type)
        if not isinstance(allowed, Range):
            continue
        for outside in (-1, 0 if not allowed.holds(0) else -0.5, 2**31, float("inf"), float("nan")):
            config = Config()
            setattr(getattr(config, section), name, outside)
            with pytest.raises(ConfigError, match=re.escape(f"{key}=")):
                check_ranges(config)
            tried += 1
    assert tried > 150
    check_ranges(Config())


@pytest.mark.parametrize(
    "words, shown, hidden",
    [
        (["sparsity"], ["dense_steps", "implementation"], ["hidden_size"]),
        (["optimizer.lr"], ["lr", "Peak learning rate"], ["beta1"]),
        (["every_steps"], ["Steps between saves", "Steps between lines"], ["seed"]),
        (["model", "--train.steps"], ["hidden_size", "Total optimizer steps"], ["seed"]),
    ],
)
def test_config_explains_what_is_asked_for(words, shown, hidden, capsys):
    assert run("config", *words) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in shown) and not any(f"  {word}  (" in out for word in hidden)


@pytest.mark.parametrize(
    "word, hint", [("sparsty", "sparsity"), ("learning_rate", "optimizer.lr"), ("xyzzy", "sections are model")]
)
def test_config_of_an_unknown_word_is_one_line(word, hint, capsys):
    assert run("config", word) == 2
    error = capsys.readouterr().err
    assert f"elas config {word}: no such section or key" in error and hint in error and error.count("\n") == 1


def test_config_of_a_preset_says_what_prints_it(capsys):
    assert run("config", "60m") == 2
    assert (
        capsys.readouterr().err == "error: elas config 60m: a preset; elas train --config 60m --show-config prints it\n"
    )


def test_tabs_in_yaml_are_named(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("model:\n\thidden_size: 64\n")
    assert run("train", "--config", str(path), "--show-config") == 2
    error = capsys.readouterr().err
    assert "line 2" in error and "indent with spaces, not tabs" in error and error.count("\n") == 1


def test_help_names_presets_sections_and_elas_config(capsys):
    for command in (["train"], ["launch", "local"], ["launch", "ssh"], ["launch", "slurm"], ["quickstart"]):
        with pytest.raises(SystemExit):
            cli.run([*command, "--help"])
        out = capsys.readouterr().out
        assert "`elas config`" in out and "example:" in out
        assert set(presets()) <= set(out.split()) and set(SECTIONS) <= set(out.split())


@pytest.mark.parametrize(
    "given, hint",
    [
        ("--lr 0.1", "did you mean --optimizer.lr?"),
        ("--lr=0.1", "did you mean --optimizer.lr?"),
        ("--steps 5", "did you mean --train.steps?"),
        ("--seq-length 5", "did you mean --model.seq_length?"),
        ("--learning_rate 1", "did you mean --optimizer.lr?"),
        ("--tensor-model-parallel-size 2", "did you mean --parallel.tensor?"),
        ("--warmup-ratio 0.1", "did you mean --schedule.warmup_steps?"),
        ("--model 60m", "model is a section"),
        ("train.steps=5", "settings start with two dashes: --train.steps"),
        ("-train.steps 5", "settings start with two dashes: --train.steps"),
        ("--kind loro", "--optimizer.kind"),
        ("--optim.lr 1", "did you mean optimizer.lr?"),
        ("--modle.activation relu2", "did you mean model.activation?"),
        ("--foo.bar 1", "sections are model"),
        ("--model.hidden_size=foo", "give a whole number: 1 or more"),
        ("--train.steps 10k", "write 10000"),
        ("--train.steps 1e4", "write 10000"),
        ("--train.steps 10,000", "write 10000"),
        ("--train.steps 1.5M", "write 1500000"),
        ("--train.steps 2.5", "give a whole number: 1 or more"),
        ("--train.timeout_seconds 10m", "write 600"),
        ("--train.timeout_seconds 2min", "write 120"),
        ("--train.stop_after_minutes 2h", "write 120"),
        ("--schedule.min_lr_ratio 10%", "write 0.1"),
        ("--sparsity.dense_steps 20%", "write 0.2"),
        ("--sparsity.dense_steps 1.0", "or a share of train.steps between 0 and 1"),
        ("--train.dtype bf16", "did you mean 'bfloat16'?"),
        ("--train.steps", "--train.steps: no value follows; write --train.steps VALUE"),
        ("--train.spike_nats 0", "train.spike_nats=0.0: out of range; give more than 0"),
    ],
)
def test_a_mistake_comes_with_what_was_meant(given, hint, capsys):
    assert run("train", "--config", "60m", "--show-config", *given.split()) == 2
    error = capsys.readouterr().err
    assert hint in error and error.count("\n") == 1, error


def test_names_of_other_trainers_lead_to_keys_that_exist():
    from elas.config.hints import OTHER_NAMES

    assert set(OTHER_NAMES.values()) <= set(KEYS)
    assert all(likely_keys(name)[0] in KEYS for name in OTHER_NAMES)


def test_a_corpus_named_with_its_ending_is_recognised(tmp_path, capsys):
    prefix = write_corpus(tmp_path / "text")
    for given, hint in (
        (f"{prefix}.bin", f"give the prefix without the extension: {prefix}"),
        (f"{prefix}.idx", f"give the prefix without the extension: {prefix}"),
        (str(tmp_path), f"give the prefix of a pair in that folder: {prefix}"),
        (f"{tmp_path}/other.bin", "see elas prep tokenize"),
    ):
        assert run("train", "--config", "quickstart", "--data.train", given, f"--train.run_dir={tmp_path}/run") == 2
        error = capsys.readouterr().err
        assert hint in error and error.count("\n") == 1, error


def test_kinds_take_annotations_apart():
    from elas.config.kinds import Count, Folder, StepsOrShare, name_of, plain

    assert plain(Count | None) == int | None and plain(Folder | list[str]) == typing.Union[str, list[str]]  # noqa: UP007
    assert name_of(StepsOrShare) == "a whole number or a number" and name_of(Count | None) == "a whole number or null"


def test_output_into_a_closed_pipe_ends_without_a_traceback():
    """As `elas config | head -1` does; Python's own exit status for it is a traceback and 1."""
    command = [sys.executable, "-m", "elas.cli", "config"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # before the first line is written
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141
