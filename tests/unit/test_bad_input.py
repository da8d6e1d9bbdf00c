"""Each mistake: exit status 2, one line on stderr naming key and fix, before any process group exists."""

import os
import shutil
import subprocess
import sys

import pytest
from support.corpora import SMALL, arguments, write_corpus

from elas import cli
from elas.command import exit_status
from elas.errors import ConfigError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture
def no_groups(monkeypatch):
    """Whoever would make a process group fails the test."""
    import torch.distributed

    def refuse(*_args, **_kwargs):
        raise AssertionError("a process group was made")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)


def zero_json(tmp_path, text='{"zero_optimization": {"stage": 2}}') -> str:
    path = tmp_path / "zero.json"
    path.write_text(text)
    return str(path)


BAD = {
    "unknown key": ({"model.hiden_size": 64}, 1, "did you mean model.hidden_size"),
    "unknown section": ({"modell.hidden_size": 64}, 1, "did you mean model.hidden_size"),
    "d_ff not by 4": ({"model.ffn_hidden_size": 130}, 1, "model.ffn_hidden_size=130: does not split into groups of 4"),
    "d_ff not by 4·tp": ({"model.ffn_hidden_size": 132, "parallel.tensor": 2}, 2, "model.ffn_hidden_size=132"),
    "d_ff not by tp": (
        {"model.ffn_hidden_size": 129, "parallel.tensor": 2, "sparsity.kind": "none"}, 2, "model.ffn_hidden_size=129",
    ),
    "heads not by tp": (
        {"parallel.tensor": 8, "model.ffn_hidden_size": 256}, 8,
        "model.num_attention_heads=4: does not split over parallel.tensor=8",
    ),
    "groups not by tp": ({"parallel.tensor": 2, "model.num_query_groups": 1}, 2, "model.num_query_groups=1"),
    "vocabulary not by tp": ({"parallel.tensor": 2, "model.vocab_size": 513}, 2, "model.vocab_size=513"),
    "layers not by pp": ({"parallel.pipeline": 2, "model.num_layers": 3}, 2, "model.num_layers=3"),
    "layers not by pp·vpp": ({"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}, 2, "model.num_layers=2"),
    "zero 2 with a pipeline": ({"parallel.pipeline": 2, "parallel.zero": 2}, 2, "parallel.zero=2: not supported with"),
    "zero 3 with a pipeline": ({"parallel.pipeline": 2, "parallel.zero": 3}, 2, "parallel.zero=3: not supported with"),
    "rank too large": ({"low_rank.rank": 65}, 1, "low_rank.rank=65: larger than"),
    "no bottleneck at full rank": (
        {"low_rank.kind": "none", "sparsity.kind": "none", "train.recompute": "bottleneck"}, 1,
        "train.recompute='bottleneck': full rank has no bottleneck",
    ),
    "recompute of another name": ({"train.recompute": "full"}, 1, "train.recompute='full'"),
    "missing data": ({"data.train": "nowhere/text"}, 1, "there is no nowhere/text.idx"),
    "no data": ({"data.train": None}, 1, "data.train=None"),
    "no validation share": ({"data.split": "100,0,0"}, 1, "data.split='100,0,0'"),
    "no document to validate on": ({"data.split": "999,1,0"}, 1, "leaves no document of"),
    "no document to train on": ({"data.split": "1,999,0"}, 1, "to train on"),
    "vocabulary too small": ({"model.vocab_size": 256}, 1, "model.vocab_size=256: smaller than the 512 tokens"),
    "global batch": ({"train.global_batch_size": 9}, 1, "train.global_batch_size=9: not divisible"),
    "global batch over ranks": ({"train.global_batch_size": 6}, 2, "train.global_batch_size=6: not divisible"),
    "world before heads": (
        {"parallel.tensor": 3},
        2,
        "parallel.tensor=3: tensor × pipeline = 3 × 1 does not divide the world size 2; start a multiple of 3 ranks",
    ),
    "world before layers": ({"parallel.pipeline": 3}, 2, "1 × 3 does not divide the world size 2"),
    "world before sequence": ({"parallel.tensor": 5, "parallel.sequence": True}, 2, "does not divide the world size 2"),
    "vocabulary, exact": ({"model.vocab_size": 257}, 1, "tokens of the corpus"),
    "vocabulary by tp": ({"model.vocab_size": 400, "parallel.tensor": 2}, 2, "; set it to 512"),
    "tokenizer not there": ({"data.tokenizer": "nowhere"}, 1, "data.tokenizer='nowhere': cannot be opened"),
    "tp·pp not in world": ({"parallel.tensor": 2}, 1, "parallel.tensor=2: tensor × pipeline = 2 × 1 does not divide"),
    "tp·pp not in 3": ({"parallel.pipeline": 2, "train.global_batch_size": 12}, 3, "does not divide the world size 3"),
    "sequence without tensor": ({"parallel.sequence": True}, 1, "parallel.sequence=True"),
    "swiglu with 2:4": ({"model.activation": "swiglu"}, 1, "requires a squared ReLU"),
    "split, fused": ({"sparsity.backward": "split"}, 1, "set sparsity.ffn_memory=eager"),
    "split, ste": (
        {"sparsity.backward": "split", "sparsity.ffn_memory": "eager", "sparsity.gradient": "ste"}, 1,
        "sparsity.backward='split': not supported with sparsity.gradient=ste",
    ),
    "loro at full rank": (
        {"optimizer.kind": "loro", "low_rank.kind": "none"}, 1, "steps on the manifold of low-rank",
    ),
    "loro on cola": (
        {"optimizer.kind": "loro", "low_rank.kind": "cola", "model.activation": "swiglu", "sparsity.kind": "none"}, 1,
        "CoLA has a non-linearity between its factors",
    ),
    "refresh never": ({"optimizer.kind": "loro", "optimizer.exact_every": None}, 1, "optimizer.refresh='with_exact'"),
    "restart never": ({"schedule.kind": "cosine_restart"}, 1, "schedule.kind='cosine_restart': restarts after"),
    "restart without refresh": (
        {"schedule.kind": "cosine_restart", "optimizer.kind": "loro", "optimizer.refresh": "none"}, 1,
        "restarts after refreshes, and there are none",
    ),
    "long restart cycle": (
        {"schedule.kind": "cosine_restart", "optimizer.kind": "loro"}, 1,
        "optimizer.exact_every=500: the restart cycle is longer than the run (train.steps=10)",
    ),
    "unknown kernel": (
        {"sparsity.implementation": "tritn"}, 1,
        "sparsity.implementation='tritn': does not serve sparsity.ffn_memory=fused; use auto | ",
    ),
    "kernel of another device": (
        {"sparsity.implementation": "triton"}, 1,
        "sparsity.implementation='triton': not available: its kernels are for NVIDIA GPUs, not cpu; use auto | ",
    ),
    "no number": ({"optimizer.lr": "nan"}, 1, "optimizer.lr="),
    "zero steps": ({"train.steps": 0}, 1, "train.steps=0: out of range; give 1 or more"),
    "infinite": ({"optimizer.lr": "1e400"}, 1, "optimizer.lr=inf"),
    "enormous": ({"optimizer.lr": 1e30}, 1, "optimizer.lr=1e+30: out of range"),
    "no value": ({"model.hidden_size": None}, 1, "model.hidden_size=None: has no value"),
    "no folder": ({"train.run_dir": None}, 1, "train.run_dir=None: has no value"),
    "empty text": ({"train.run_dir": ""}, 1, "train.run_dir='': is empty"),
    "beta": ({"optimizer.beta2": 1.0}, 1, "optimizer.beta2=1.0: out of range; give 0 or more, and below 1"),
    "eps": ({"optimizer.eps": 0}, 1, "optimizer.eps=0"),
    "norm eps": ({"model.norm_eps": -1e-6}, 1, "model.norm_eps=-1e-06"),
    "init": ({"model.init_std": 0.0}, 1, "model.init_std=0.0"),
    "seed": ({"train.seed": -1}, 1, "train.seed=-1: out of range; give 0 or more"),
    "large seed": ({"train.seed": 2**63}, 1, "too large"),
    "rotary": ({"model.rotary_base": 0}, 1, "model.rotary_base=0"),
    "final rate": ({"schedule.min_lr_ratio": 1.5}, 1, "out of range; give a value from 0 to 1"),
    "no decay": ({"schedule.kind": "wsd", "schedule.decay_steps": 0}, 1, "schedule.decay_steps=0"),
    "long decay": ({"schedule.kind": "wsd", "schedule.decay_steps": 999}, 1, "schedule.decay_steps=999: longer than"),
    "exact": ({"optimizer.exact_every": 0}, 1, "optimizer.exact_every=0"),
    "absurd steps": ({"train.steps": 2_000_000_000}, 1, "train.steps=2000000000: makes 1.6e+10 samples"),
    "blend weight": ({"data.train": "[nan, a, 0.5, b]"}, 1, "is not a blend"),
    "split": ({"data.split": "nan,1,0"}, 1, "is not a split"),
    "nothing to train on": ({"data.split": "0,1,0"}, 1, "data.split='0,1,0'"),
    "folder nowhere": ({"train.run_dir": "/proc/elas"}, 1, "train.run_dir='/proc/elas'"),
    "cache nowhere": ({"data.cache": "/proc/elas"}, 1, "data.cache='/proc/elas'"),
    "resume from nowhere": ({"checkpoint.resume": "nowhere"}, 1, "checkpoint.resume='nowhere'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_status_2(name, corpus, tmp_path, monkeypatch, capsys, no_groups):
    overrides, world, expected = BAD[name]
    for key, value in {"RANK": 0, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(key, str(value))
    settings = {
        **SMALL,
        "data.train": corpus,
        "data.split": "90,10,0",
        "train.run_dir": str(tmp_path / "run"),
        **overrides,
    }
    assert exit_status(cli.run, ["train", *arguments(settings)]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert len([line for line in error.splitlines() if not line.startswith("still loading")]) == 1
    assert not (tmp_path / "run").exists()


def test_empty_and_foreign_token_files_are_refused(corpus, tmp_path, capsys, no_groups):
    empty, foreign, long = tmp_path / "empty", tmp_path / "foreign", tmp_path / "long-bin"
    random, old = tmp_path / "random", tmp_path / "old"
    with open(f"{corpus}.idx", "rb") as file:
        header = file.read(9 + 9)
    empty.with_suffix(".idx").write_bytes(header + (0).to_bytes(8, "little") + (1).to_bytes(8, "little"))
    empty.with_suffix(".bin").write_bytes(b"")
    foreign.with_suffix(".idx").write_bytes(b"PK\x03\x04")
    foreign.with_suffix(".bin").write_bytes(b"hello")
    cut_bin, cut_idx = tmp_path / "cut-bin", tmp_path / "cut-idx"
    for end in (".bin", ".idx"):
        with open(corpus + end, "rb") as file:
            whole = file.read()
        cut_bin.with_suffix(end).write_bytes(whole[:-2] if end == ".bin" else whole)
        cut_idx.with_suffix(end).write_bytes(whole[:-2] if end == ".idx" else whole)
        long.with_suffix(end).write_bytes(whole + b"\0" if end == ".bin" else whole)
        body = bytes((byte * 7 + 3) % 256 for byte in whole[34:])
        random.with_suffix(end).write_bytes(whole[:34] + body if end == ".idx" else whole)
        old.with_suffix(end).write_bytes(whole[:9] + b"\2" + whole[10:] if end == ".idx" else whole)
    for prefix, expected in (
        (empty, "the corpus is empty"),
        (foreign, "not a Megatron index"),
        (cut_bin, "cut-bin.bin is truncated"),
        (cut_idx, "cut-idx.idx is truncated"),
        (long, "long-bin.bin is longer than its index says"),
        (random, "random.idx is damaged"),
        (old, "old.idx has version 2"),
    ):
        settings = {**SMALL, "data.train": str(prefix), "train.run_dir": str(tmp_path / "run")}
        assert exit_status(cli.run, ["train", *arguments(settings)]) == 2
        error = capsys.readouterr().err
        assert expected in error and len(error.splitlines()) == 1


def test_manifests_of_any_kind_are_harmless_large_ids_are_found(corpus, tmp_path, capsys, no_groups):
    for end in (".bin", ".idx"):
        shutil.copy(corpus + end, tmp_path / f"text{end}")
    settings = {**SMALL, "data.train": str(tmp_path / "text"), "data.split": "90,10,0", "model.vocab_size": 256}
    for manifest in (None, b"[]", b"\xff", b'{"vocab_size": "many"}', b"{"):
        if manifest is not None:
            (tmp_path / "text.manifest.json").write_bytes(manifest)
        assert exit_status(cli.run, ["train", *arguments(settings)]) == 2
        assert "model.vocab_size=256: smaller than the 512 tokens" in capsys.readouterr().err


def test_a_split_part_that_makes_no_sample_is_refused(tmp_path, capsys, no_groups):
    prefix = write_corpus(tmp_path / "short", documents=40, length=20)
    settings = {**SMALL, "data.train": prefix, "data.split": "98,2,0", "train.run_dir": str(tmp_path / "run")}
    assert exit_status(cli.run, ["train", *arguments(settings)]) == 2
    assert "leaves 20 tokens of" in capsys.readouterr().err


def test_deepspeed_json_may_not_say_what_the_configuration_says(corpus, tmp_path, capsys, no_groups):
    settings = arguments(
        {**SMALL, "data.train": corpus, "data.split": "90,10,0", "train.run_dir": str(tmp_path / "run")}
    )
    for text, expected in (
        ('{"gradient_clipping": 1.0}', "set optimizer.clip_grad"),
        ("{", "is not JSON"),
        ("[]", "does not hold an object"),
        ('{"zero_optimization": {"stage": 7}}', "ZeRO stage 7"),
        ('{"zero_optimization": 5}', "zero_optimization is not an object"),
        ('{"zero_optimization": {"stage": "two"}}', "zero_optimization.stage is 'two'"),
        ('{"zero_optimization": {"stage": 1, "foo": 3}}', "zero_optimization.foo"),
        ('{"zero_optimization": {"stage": 1, "reduce_bucket_size": "big"}}', "zero_optimization.reduce_bucket_size"),
        ('{"zero_optimization": {"stage": 1, "offload_optimizer": "cpu"}}', "zero_optimization.offload_optimizer"),
        ('{"tensor_parallel": {"autotp_size": 2}}', "set parallel.tensor"),
        ('{"pipeline": {"stages": 2}}', "set parallel.pipeline"),
        ('{"foo": 1}', "sets foo"),
        ('{"wall_clock_breakdown": "maybe"}', "wall_clock_breakdown='maybe' writes to DeepSpeed's log"),
        (
            '{"zero_optimization": {"stage": 1}, "communication_data_type": "zz"}',
            "communication_data_type is 'zz'",
        ),
        ('{"flops_profile": {}}', "did you mean flops_profiler"),
        ('{"wall_clock_breakdown": false, "wall_clock_breakdown": true}', "wall_clock_breakdown is given twice"),
        ('{"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "tpu"}}}', "device is 'tpu'"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', "device is 'nvme'"),
    ):
        source = zero_json(tmp_path, text)
        assert exit_status(cli.run, ["train", *settings, "--deepspeed_config", source]) == 2
        error = capsys.readouterr().err
        assert expected in error and len(error.splitlines()) == 1
    both = [*settings, "--deepspeed_config", zero_json(tmp_path), "--parallel.zero", "1"]
    assert exit_status(cli.run, ["train", *both]) == 2
    assert "sets ZeRO 2" in capsys.readouterr().err


def test_the_real_command_exits_2_without_a_traceback(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-m", "elas.cli", "train", "--config", "quickstart", "--model.hiden_size", "3"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.splitlines() == ["error: model.hiden_size='3': unknown key; did you mean model.hidden_size?"]


def test_unknown_commands_and_options(capsys):
    assert exit_status(cli.run, ["tarin"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err
    assert exit_status(cli.run, ["train", "--confg", "x"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(SystemExit) as stopped:
        cli.run(["train", "--help"])
    assert stopped.value.code == 0 and "example:" in capsys.readouterr().out


def test_an_error_message_is_a_single_line():
    assert "\n" not in str(ConfigError("a.b", "x\ny", "why\nnot", "fix\nit"))


UP_TO_THE_BUILD = """
import sys
from elas.engine import prebuild
from elas.launch import pretrain
def stop(config):
    raise SystemExit(3 if {"megatron", "deepspeed"} & sys.modules.keys() else 0)
prebuild.prebuild = stop
pretrain.main(sys.argv[1:])
raise SystemExit("trained")
"""


def test_checks_before_the_start_import_no_framework(corpus, tmp_path):
    """A mistake is reported within seconds, and Megatron's warnings about what it lacks are not shown."""
    settings = {**SMALL, "data.train": corpus, "data.split": "90,10,0", "train.run_dir": str(tmp_path / "run")}
    done = subprocess.run(
        [sys.executable, "-c", UP_TO_THE_BUILD, *arguments(settings)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [
    "train --config 60m --data.train none/x --train.run_dir none/run",
    "train --dry-run --config 60m --data.train none/x --train.run_dir none/run",
    "launch local --config 60m --data.train none/x --train.run_dir none/run",
    "eval --checkpoint none", "eval --checkpoint . --data none/x", "eval --checkpoint . --tokenizer none",
    "eval --checkpoint . --tasks x --task-dir none",
    "generate --checkpoint none --prompt a", "generate --checkpoint . --file none",
    "export hf --checkpoint none --out x",
    "export hf --checkpoint . --data none/x --out x", "export hf --checkpoint . --out .",
    "import hf --from none --out x", "import hf --from none --out .", "plan --check none.yaml",
    "plan --check 60m --hardware-file none.json", "checkpoint import none --config 60m", "watch none", "report none",
])  # fmt: skip
def test_a_path_that_is_not_there_is_said_before_heavy_imports(command, tmp_path):
    code = "import sys; from elas.command import exit_status; from elas.cli import run; "
    code += "status = exit_status(run, sys.argv[1:]); print(status, {'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code, *command.split()], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "2 set()\n", done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "; " in done.stderr


@pytest.mark.parametrize("command, said", [
    ("eval --checkpoint x --protocol packd",
     "--protocol packd: unknown; give one of packed, papers; did you mean packed?"),
    ("eval --checkpoint x --batch few", "--batch few: cannot be read; give a whole number"),
    ("watch x --every now", "--every now: cannot be read; give a number"),
    ("prep tokenizer --input stdlib --output x --vocab-size 10",
     "--vocab-size=10: too small, since bytes and special ids alone take 262; give 300 or more"),
])  # fmt: skip
def test_a_value_of_an_option_that_is_wrong_has_a_fix(command, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_status(cli.run, command.split()) == 2
    assert capsys.readouterr().err == f"error: {said}\n"
