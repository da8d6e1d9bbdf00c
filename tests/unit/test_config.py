"""Settings: precedence, types, and one line for each mistake."""

import json

import pytest

from elas.command import exit_status
from elas.config import KEYS, Config, load_config, presets, read_yaml, split_overrides
from elas.errors import ConfigError, UserError

RECIPES = {  # suffix of the preset's name: kind of linears, kind of optimizer
    "": ("lowrank", "muon"),
    "-loro": ("lowrank", "loro"),
    "-lowrank": ("lowrank", "adamw"),
    "-cola": ("cola", "adamw"),
    "-full": ("none", "adamw"),
}


def write(tmp_path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_command_line_wins_over_file_wins_over_default(tmp_path):
    source = write(tmp_path, "model:\n  hidden_size: 128\n  num_layers: 3\n")
    config = load_config(source, {"model.num_layers": 5})
    assert (config.model.hidden_size, config.model.num_layers) == (128, 5)
    assert config.model.vocab_size == Config().model.vocab_size


def test_yaml_reads_numbers_as_people_write_them(tmp_path):
    config = load_config(
        write(tmp_path, "sparsity:\n  kind: 2:4\noptimizer:\n  lr: 1e-3\nmodel:\n  ffn_hidden_size: null\n")
    )
    assert config.sparsity.kind == "2:4"  # YAML 1.1 would read 124
    assert config.optimizer.lr == 1e-3  # and this as text
    assert config.model.ffn_hidden_size is None


def test_overrides_take_both_spellings_and_leave_the_rest():
    overrides, rest = split_overrides(
        [
            "--config",
            "x",
            "--train.steps",
            "5",
            "--sparsity.kind=2:4",
            "--data.train",
            "[0.5, a, 0.5, b]",
            "--local_rank=0",
        ]
    )
    assert overrides == {"train.steps": 5, "sparsity.kind": "2:4", "data.train": [0.5, "a", 0.5, "b"]}
    assert rest == ["--config", "x", "--local_rank=0"]


@pytest.mark.parametrize(
    "overrides, named",
    [
        ({"model.hiden_size": 1}, "did you mean model.hidden_size"),
        ({"modle.hidden_size": 1}, "did you mean model.hidden_size"),
        ({"train.lr": 1}, "did you mean optimizer.lr"),
        ({"train.steps": "abc"}, "train.steps='abc'"),
        ({"train.steps": 1.5}, "train.steps=1.5"),
        ({"sparsity.kind": "1:4"}, "give one of 'none', '2:4'"),
        ({"train.dtype": "float16"}, "give one of 'float32', 'bfloat16'"),
        ({"model.tie_embeddings": "maybe"}, "give true or false"),
        ({"train": 3}, "write train.KEY"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(overrides, named):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_files_are_user_errors(tmp_path):
    for source in (str(tmp_path / "none.yaml"), "60n", write(tmp_path, "a: [1"), write(tmp_path, "- 1\n- 2\n")):
        with pytest.raises(UserError):
            read_yaml(source)


def test_every_preset_loads_and_validates():
    from elas.config.rules import validate

    recipes = {f"{size}{recipe}" for size in ("60m", "130m", "350m", "1b") for recipe in RECIPES}
    assert set(presets()) == recipes | {"7b", "quickstart"}
    for name in presets():
        config = load_config(name)
        validate(config, 1)
        sparse = config.model.activation == "relu2" and config.sparsity.kind == "2:4"
        assert sparse == (name.partition("-")[2] in ("", "loro"))


@pytest.mark.parametrize("size", ("60m", "130m", "350m", "1b"))
def test_recipes_of_a_size_share_its_shape_and_tokens(size):
    elas = load_config(size)
    for recipe, (kind, optimizer) in RECIPES.items():
        config = load_config(f"{size}{recipe}")
        assert (config.low_rank.kind, config.optimizer.kind) == (kind, optimizer)
        for key in ("hidden_size", "num_layers", "num_attention_heads", "vocab_size", "seq_length"):
            assert getattr(config.model, key) == getattr(elas.model, key)
        assert (config.train.steps, config.train.global_batch_size) == (elas.train.steps, elas.train.global_batch_size)
        assert config.low_rank.rank == elas.low_rank.rank
        if config.model.activation == "swiglu":  # up + down cost what gate + up + down do
            assert 1.45 < elas.model.ffn_hidden_size / config.model.ffn_hidden_size < 1.55
        assert config.train.run_dir == f"runs/{size}{recipe}"


def test_a_file_can_start_from_another(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "first.yaml").write_text("base: 60m\nmodel: {num_layers: 3}\noptimizer: {lr: 0.5}\n")
    second = tmp_path / "mine" / "second.yaml"
    second.write_text("base: ../first.yaml\noptimizer: {lr: 0.25}\n")
    config = load_config(str(second), {"train.steps": 7})
    assert (config.model.hidden_size, config.model.num_layers, config.optimizer.lr) == (512, 3, 0.25)
    assert config.train.steps == 7
    for text, why in (
        ("base: ../mine/second.yaml", "is circular"),
        ("base: nowhere", "No such file"),
        ("base: [60m]", "is not a file name"),
        ("base: 60m\nmodel: 3", "is a section"),
        ("model: {? [1, 2] : 3}", "is not text"),
        ("data: {split: 99,1,0}", "in quotes"),
    ):
        second.write_text(text)
        with pytest.raises(ConfigError, match=why):
            load_config(str(second))


BASE = "base: 60m\nmodel: {num_layers: 3, ffn_hidden_size: 128}\ndata: {train: [0.5, a, 0.5, b]}\ntrain: {steps: 9}\n"


@pytest.mark.parametrize(
    "text, key, expected",
    [
        ("model:", "model.num_layers", 3),
        ("model:\n  # hidden_size: 64", "model.num_layers", 3),
        ("model: {}", "model.hidden_size", 512),  # of the base's base
        ("model:\nmodel.num_layers: 5", "model.num_layers", 5),
        ("train:\nmodel: {num_layers: 4}", "train.steps", 9),  # a section only in the base
        ("log: {every_steps: 2}", "log.every_steps", 2),  # a section only here
        ("model: {ffn_hidden_size: null}", "model.ffn_hidden_size", None),  # null is a value
        ("data: {train: [c]}", "data.train", ["c"]),  # lists are replaced, not joined
        ("data:", "data.train", ["0.5", "a", "0.5", "b"]),
    ],
)
def test_a_base_keeps_what_is_not_given_anew(tmp_path, text, key, expected):
    (tmp_path / "first.yaml").write_text(BASE)
    (tmp_path / "middle.yaml").write_text("base: first.yaml\nmodel:\ntrain:\n")
    for base in ("first.yaml", "middle.yaml"):
        config = load_config(write(tmp_path, f"base: {base}\n{text}\n"))
        section, name = key.split(".")
        assert getattr(getattr(config, section), name) == expected


@pytest.mark.parametrize(
    "base, text, why",
    [
        ("model: 3", "model: {num_layers: 2}", "model=3: is a section"),  # not hidden by what comes over it
        ("modle: {num_layers: 3}", "model:", "did you mean model"),
        ("", "model: {num_layers: null}", "model.num_layers=None: has no value"),
        ("", "model: {num_layers: 2}\nmodel.num_layers: 3", "model.num_layers=3: is given twice, the other value is 2"),
        ("", "base:", "base is given twice"),
    ],
)
def test_mistakes_in_a_base_or_over_one_are_named(tmp_path, base, text, why):
    (tmp_path / "first.yaml").write_text(base)
    with pytest.raises(ConfigError, match=why):
        load_config(write(tmp_path, f"base: first.yaml\n{text}\n"))
    with pytest.raises(ConfigError, match=r"base=None: in .* is not a file name"):
        load_config(write(tmp_path, "base:\n"))


def test_every_key_is_described():
    import ast
    import inspect

    import elas.config.schema as module

    described = set()
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef):
            for field, text in zip(node.body, node.body[1:]):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    described.add(field.target.id)
    assert {key.split(".")[1] for key in KEYS} <= described


@pytest.mark.parametrize(
    "settings, why",
    [
        (["--model.hidden_size", "100"], "does not split into 8 heads"),
        (["--low_rank.rank", "4096"], "low_rank.rank=4096: larger than"),
        (["--config", "60m-loro", "--low_rank.kind", "none"], "steps on the manifold"),
        (["--parallel.pipeline", "2", "--parallel.zero", "3"], "parallel.zero=3: not supported with"),
        (["--train.global_batch_size", "100"], "not divisible by train.micro_batch_size=32"),
        (["--train.run_dir", "/etc/passwd"], "train.run_dir='/etc/passwd': is a file"),
    ],
)
def test_show_config_refuses_what_training_would(settings, why, capsys):
    from elas import cli

    assert exit_status(cli.run, ["train", "--config", "60m", "--show-config", *settings]) == 2
    shown, error = capsys.readouterr()
    assert why in error and len(error.splitlines()) == 1 and not shown


def test_show_config_does_not_ask_how_many_ranks(capsys):
    from elas import cli

    settings = ["--parallel.tensor", "2", "--parallel.pipeline", "2", "--parallel.sequence", "true"]
    assert exit_status(cli.run, ["train", "--config", "60m", "--show-config", *settings]) == 0
    assert "error" not in capsys.readouterr().err


def test_results_go_through_links_and_into_pipes(tmp_path):
    import os
    import threading

    from elas.files import write_json

    target, link, pipe = tmp_path / "real.json", tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to(target)
    write_json(link, {"a": 1})
    assert link.is_symlink() and json.loads(target.read_text()) == {"a": 1}
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_json(pipe, {"b": 2})
    reader.join(10)
    assert pipe.is_fifo() and json.loads(read[0]) == {"b": 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.json", "pipe", "real.json"]


def test_an_option_is_not_taken_for_the_value_of_the_one_before():
    with pytest.raises(UserError, match=r"^--model\.hidden_size: no value follows; write --model\.hidden_size VALUE"):
        split_overrides(["--model.hidden_size", "--train.steps", "12"])
