"""What a run says before its first step is true, and stands in run.json."""

import json
import re

import torch
from support.corpora import SMALL, write_corpus
from support.training_processes import finish, rows, start

from elas.config import load_config
from elas.kernels.relu2_24 import Relu24Options, select
from elas.plan.counts import parameter_count


def test_a_start_says_what_it_trains_with_what_and_on_what(tmp_path):
    corpus, run_dir = write_corpus(tmp_path / "text"), tmp_path / "run"
    more = {"data.train": corpus, "data.split": "90,10,0", "train.run_dir": run_dir, "train.steps": 4}
    settings = {**SMALL, **more, "log.every_steps": 2, "checkpoint.every_steps": 0}
    lines = finish(start(settings, 1)).splitlines()
    config = load_config(None, {**settings, "train.run_dir": str(run_dir)})
    lines = lines[lines.index("loading Megatron-core and DeepSpeed") :]
    model = next(number for number, line in enumerate(lines) if "M parameters" in line)
    facts = json.loads((run_dir / "run.json").read_text())
    assert lines[model].endswith("float32, 0.1 M parameters; TP 1 × PP 1 × DP 1, ZeRO 0; recompute bottleneck")
    assert facts["parameters"] == parameter_count(config) and facts["first_step"] == 1
    options = Relu24Options.of(config.sparsity, sparse=True)
    assert facts["kernel"] == f"fused {select(options, torch.device('cpu'), torch.float32).name}"
    assert lines[model + 1] == "optimizer: AdamW 0.003, weight decay 0.1"
    assert lines[model + 2] == f"FFN kernel: {facts['kernel']} ({facts['kernel_why']})" and "auto" in lines[model + 2]
    data = "1,024 tokens in 4 steps: 0.143 epochs of 7,168; validation: 256 tokens; memory per rank: about "
    assert lines[model + 3].startswith(data)
    of_step = {line.split("/")[0]: line for line in lines if line.startswith("step ") and "/4  loss" in line}
    assert list(of_step) == ["step 1", "step 2", "step 4"]
    assert "mean of" not in of_step["step 2"] and " (mean of 2: " in of_step["step 4"]
    assert re.search(r"left 0:0\d$", of_step["step 4"])  # the last validation and save are still to come
    first, second, last = rows(run_dir)
    assert (second["loss_steps"], last["loss_steps"]) == (1, 2) and second["loss_mean"] == second["loss"]
    assert first["time"] < second["time"] < last["time"]
    assert 0 < first["elapsed_s"] < second["elapsed_s"] < last["elapsed_s"]
    assert any(line.startswith("step 1 took ") and "; memory per rank: at most " in line for line in lines)
