"""ZeRO's own knobs change how state lies in memory and travels, never the model: losses, and checkpoints of any layout.

Tolerances: as in `test_layouts` and `test_loro`; what a checkpoint holds goes from layout to layout to the last digit.
"""

import json

import pytest
import reshard_run
import torch
from support.ranks import run_ranks

from elas.extensions import is_built

pytestmark = pytest.mark.timeout(600)

SMALL_BUCKETS = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
LORO = {"optimizer.kind": "loro", "optimizer.exact_every": 4}
CPU = {"device": "cpu", "pin_memory": False}
CASES = {
    "zero1-round-robin": (LORO, {"stage": 1, "round_robin_gradients": True, "contiguous_gradients": False}),
    "zero1-aligned": (LORO, {"stage": 1, "parameter_alignment": True, "reduce_scatter": False, **SMALL_BUCKETS}),
    "zero2-round-robin-aligned": (
        LORO,
        {"stage": 2, "round_robin_gradients": True, "parameter_alignment": True, "ignore_unused_parameters": False},
    ),
    "zero2-overlapped": (
        {},
        {"stage": 2, "overlap_comm": True, "use_multi_rank_bucket_allreduce": False, **SMALL_BUCKETS},
    ),
    "zero2-plain": ({}, {"stage": 2, "contiguous_gradients": False, "reduce_scatter": False}),
    "zero3-sub-groups": (
        LORO,
        {
            "stage": 3,
            "sub_group_size": 5000,
            "stage3_prefetch_bucket_size": 5000,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 20000,
            "stage3_max_reuse_distance": 0,
            "enable_sanity_checks": True,
            "log_trace_cache_warnings": True,
        },
    ),
    "zero3-plain": (
        {},
        {
            "stage": 3,
            "contiguous_gradients": False,
            "overlap_comm": False,
            "reduce_scatter": False,
            "stage3_use_all_reduce_for_fetch_params": True,
            "stage3_module_granularity_threshold": 1000,
            "stage3_model_persistence_threshold": 5000,
        },
    ),
    "zero3-sequential": ({}, {"stage": 3, "stage3_allgather_sequential": True, "offload_param": CPU}),
    "zero2-offloaded": ({}, {"stage": 2, "round_robin_gradients": True, "offload_optimizer": CPU}),
    "zero3-offloaded": ({}, {"stage": 3, "sub_group_size": 5000, "offload_optimizer": CPU}),
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Loss and tensors of one process, by model."""
    done = {}

    def train(model: dict) -> tuple[float, dict[str, torch.Tensor]]:
        key = json.dumps(model)
        if key not in done:
            folder = str(tmp_path_factory.mktemp("one"))
            done[key] = run_ranks(1, reshard_run.save, {"parallel.zero": 0, **model}, folder)[0]
            done[key] = done[key], reshard_run.tensors(folder)
        return done[key]

    return train


@pytest.mark.parametrize("name", CASES)
def test_a_supported_knob_changes_neither_losses_nor_checkpoints(name, one_process, tmp_path):
    model, zero = CASES[name]
    if "offload_optimizer" in zero and not is_built("cpu_adam", torch_version=torch.__version__):
        pytest.skip("DeepSpeed's CPU Adam is not built; see tests/distributed/test_gradients.py")
    source = tmp_path / "zero.json"
    source.write_text(json.dumps({"zero_optimization": zero, "communication_data_type": "fp32"}))
    settings = {"parallel.deepspeed_config": str(source), **model}
    want, weights = one_process(model)
    first, second, third = (str(tmp_path / name) for name in ("a", "b", "c"))
    loss = run_ranks(2, reshard_run.save, settings, first)[0]
    assert loss == pytest.approx(want, rel=1e-3 if model else 2e-5)
    read = run_ranks(1, reshard_run.load, {"parallel.zero": 0, **model}, first, second)[0]
    again = run_ranks(2, reshard_run.load, settings, second, third)[0]
    assert (read, again) == pytest.approx((loss, loss), rel=1e-6)
    held = reshard_run.tensors(first)
    for other in (reshard_run.tensors(second), reshard_run.tensors(third)):
        assert all(torch.equal(tensor, other[name]) for name, tensor in held.items())
    for name, tensor in weights.items():  # a scrambled checkpoint is off by its own size
        if name.startswith("weight."):
            assert torch.linalg.vector_norm(held[name] - tensor) < 0.05 * torch.linalg.vector_norm(tensor), name
