"""Mistakes in Muon's settings are one line, before anything starts."""

import json

import pytest

from elas.config import load_config
from elas.config.rules import validate
from elas.errors import UserError

BASE = {"optimizer.kind": "muon", "data.train": "x"}
MISTAKES = [
    ({"optimizer.momentum": 1}, "optimizer.momentum=1.0: out of range"),
    ({"optimizer.momentum": -0.5}, "optimizer.momentum=-0.5: out of range"),
    ({"optimizer.momentum": "nan"}, "optimizer.momentum="),
    ({"optimizer.lr_other": 0}, "optimizer.lr_other=0.0: out of range"),
    ({"optimizer.lr_other": 1e4}, "optimizer.lr_other=10000.0: out of range"),
    ({"optimizer.lr": -1}, "optimizer.lr=-1.0: out of range"),
    ({"optimizer.muon_steps": 0}, "optimizer.muon_steps=0: out of range"),
    ({"optimizer.muon_steps": 21}, "optimizer.muon_steps=21: out of range"),
    ({"optimizer.normalize": "spectral"}, "did you mean 'spectron'"),
    ({"optimizer.kind": "moun"}, "did you mean 'muon'"),
    ({"optimizer.normalize": "spectron", "low_rank.kind": "none"}, "but the model is full rank"),
    ({"optimizer.kind": "adamw", "optimizer.momentum": 0.9}, "is of muon alone, and optimizer.kind is adamw"),
    ({"optimizer.kind": "loro", "optimizer.lr_other": 0.1}, "leave it out, or set it to null"),
    ({"optimizer.exact_every": 7}, "is of loro alone, and optimizer.kind is muon"),
    ({"optimizer.refresh": "none"}, "is of loro alone, and optimizer.kind is muon"),
]


@pytest.mark.parametrize("settings, says", MISTAKES)
def test_a_mistake_is_one_line(settings, says):
    with pytest.raises(UserError) as raised:
        validate(load_config(None, {**BASE, **settings}), None)
    assert says in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "of_deepspeed, says",
    [
        ({"optimizer": {"type": "Muon", "params": {"lr": 0.1}}}, "sets optimizer; remove it there"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, "its state cannot be offloaded"),
    ],
)
def test_deepspeeds_optimizer_and_offloading_are_refused(tmp_path, of_deepspeed, says):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, **of_deepspeed}))
    with pytest.raises(UserError, match=says):
        validate(load_config(None, {**BASE, "parallel.deepspeed_config": str(path)}), 1)
