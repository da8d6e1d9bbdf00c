"""The tables of DeepSpeed's knobs know every knob that the installed DeepSpeed reads, and its defaults."""

import json
from typing import ClassVar

import pytest

from elas.config import load_config
from elas.config.deepspeed import read_deepspeed_json
from elas.config.deepspeed_knobs import OFFLOAD_OPTIMIZER, OFFLOAD_PARAM, OURS, TOP_LEVEL, ZERO
from elas.engine.deepspeed import check_deepspeed_json
from elas.errors import ConfigError


def models() -> list:
    from elas import accelerator

    accelerator.prepare()
    from deepspeed.runtime.zero import config, offload_config

    return [
        (config.DeepSpeedZeroConfig, ZERO),
        (offload_config.DeepSpeedZeroOffloadOptimizerConfig, OFFLOAD_OPTIMIZER),
        (offload_config.DeepSpeedZeroOffloadParamConfig, OFFLOAD_PARAM),
    ]


def test_every_field_of_zero_is_in_a_table():
    """A field that a release of DeepSpeed adds must be supported, with a parity test, or refused."""
    for model, table in models():
        assert {field.alias or name for name, field in model.model_fields.items()} == set(table)


def test_the_defaults_are_deepspeeds():
    for model, table in models():
        for name, field in model.model_fields.items():
            default = table[field.alias or name].default
            if default != {}:  # an object that asks for nothing
                assert field.default == default, name


class Asked(dict):
    """Notes which keys it is asked for."""

    keys_asked: ClassVar[set] = set()

    def get(self, key, default=None):
        self.keys_asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.keys_asked.add(key)
        return super().__contains__(key)


def test_every_key_that_deepspeed_reads_is_in_a_table(one_rank):
    from elas import accelerator

    accelerator.prepare()
    from deepspeed.runtime import config

    removed = set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)  # it refuses these itself, and so do we: they are unknown
    Asked.keys_asked.clear()
    config.DeepSpeedConfig(Asked(train_batch_size=1))
    assert Asked.keys_asked > {"zero_optimization", "prescale_gradients"}
    older = {"allgather_size", "legacy_sparse_gradients"}  # of `zero_optimization: true`, which is refused
    assert Asked.keys_asked - removed - older <= set(TOP_LEVEL) | set(OURS)


def refusal(folder, values: dict) -> str:
    """The error's line about a JSON, "" where it is accepted."""
    source = folder / "ds.json"
    source.write_text(json.dumps(values))
    config = load_config(None, {"parallel.deepspeed_config": str(source)})
    try:
        read_deepspeed_json(config)
        check_deepspeed_json(config)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
        return str(error)
    return ""


def test_unsupported_knobs_are_refused_with_their_reason(tmp_path):
    for zero, expected in (
        ({"stage": 3, "zero_quantized_weights": True}, "zero_quantized_weights=True changes the numbers"),
        ({"stage": 3, "zero_hpz_partition_size": 2}, "zero_hpz_partition_size=2 groups neighbouring ranks"),
        ({"stage": 1, "zenflow": {"topk_ratio": 0.1}}, "updates parts of the weights late"),
        ({"stage": 1, "compute_grad_norm": False}, "compute_grad_norm=False must be true"),
        ({"stage": 1, "cpu_offload": True}, 'write "offload_optimizer": {"device": "cpu"}'),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer.ratio=0.5 requires"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, "device is 'nvme'"),
        ({"stage": 3, "offload_param": {"device": "cpu", "max_in_cpu": 5}}, "works only with device nvme"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param has no effect at ZeRO 2"),
        (
            {"stage": 1, "overlap_comm": True},
            "overlap_comm has no effect at ZeRO 1; remove it (it is for ZeRO 2 and 3)",
        ),
        ({"stage": 3, "round_robin_gradients": True}, "round_robin_gradients has no effect at ZeRO 3"),
        ({"stage": 1, "sub_group_size": 1000}, "sub_group_size has no effect at ZeRO 1"),
        ({"stage": 1, "prefetch_bucket_size": 1000}, "stage3_prefetch_bucket_size has no effect at ZeRO 1"),
        ({"stage": 3, "max_live_parameters": 5, "stage3_max_live_parameters": 6}, "under two names"),
        ({"stage": 1, "mics_shard_size": 2}, "zero_optimization.mics_shard_size"),
        ({"stage": 0, "reduce_bucket_size": 5}, "has no effect at ZeRO 0"),
    ):
        assert expected in refusal(tmp_path, {"zero_optimization": zero}), zero
    for values, expected in (
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor=2.0 is for fp16's narrow range"),
        ({"prescale_gradients": True}, "prescale_gradients=True is for fp16's narrow range"),
        ({"gradient_allreduce_op": "sum"}, "must be mean"),
        ({"zero_allow_untested_optimizer": False}, "must be true"),
        ({"sparse_gradients": True}, "was removed from DeepSpeed"),
        ({"flops_profiler": {"enabled": True}}, "is not shown"),
        ({"activation_checkpointing": {"partition_activations": True}}, "none of Megatron's layers"),
        ({"communication_data_type": "fp16"}, "communication_data_type is 'fp16'"),
        ({"steps_per_print": 10}, "set log.every_steps"),
        ({"torch_autocast": {"enabled": True}}, "set train.dtype"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning"),
    ):
        assert expected in refusal(tmp_path, {"zero_optimization": {"stage": 1}} | values), values
    assert "has no effect at ZeRO 0" in refusal(tmp_path, {"communication_data_type": "bf16"})


@pytest.mark.parametrize("stage", range(4))
def test_values_that_ask_for_nothing_are_accepted(tmp_path, stage):
    zero = {name: knob.default for name, knob in ZERO.items() if knob.default is not None} | {"stage": stage}
    zero |= {"overlap_comm": False, "offload_optimizer": {"device": "none"}, "offload_param": None}
    if stage < 3:
        zero["stage3_max_live_parameters"] = "auto"
    values = {name: knob.default for name, knob in TOP_LEVEL.items() if knob.default is not None}
    values |= {"flops_profiler": {"enabled": False}, "communication_data_type": "fp32", "zero_optimization": zero}
    assert refusal(tmp_path, values) == ""
