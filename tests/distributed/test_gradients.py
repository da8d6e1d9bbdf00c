"""What gradients owe: accumulation over micro-batches, and offloaded optimizer state."""

from pathlib import Path

import pytest
from support.parity_run import SMALL, curve
from support.ranks import run_ranks

from elas.extensions import library
from elas.launch import pretrain

pytestmark = [pytest.mark.timeout(300), pytest.mark.any_device("processes")]


def run(**overrides) -> list[tuple[float, float]]:
    return run_ranks(1, curve, {**SMALL, **{key.replace("__", "."): value for key, value in overrides.items()}})[0]


def first_gradient(micro_batch_size: int, bf16_sum: bool) -> list[float]:
    """On a rank: the output layer's gradient of one global batch of 64 samples, in bf16, as it goes to DeepSpeed."""
    import torch

    from elas import parallel
    from elas.config import load_config
    from elas.engine.engine import Engine
    from elas.model.activation import set_step

    settings = {**SMALL, "train.dtype": "bfloat16", "train.global_batch_size": 64}
    config = load_config(None, {**settings, "train.micro_batch_size": micro_batch_size})
    engine = Engine(config, parallel.initialize(config.parallel, seed=1))
    set_step(engine.chunks, 1)
    weight = engine.chunks[0].output_layer.weight
    if bf16_sum and engine._accumulation is not None:
        for parameter in engine.chunks[0].parameters():
            parameter._post_accumulate_grad_hooks.clear()
        engine._accumulation = None
    tokens = torch.randint(256, (64, 33), generator=torch.Generator().manual_seed(7))
    parts = tokens.split(micro_batch_size)
    engine._pass_schedule([(part[:, :-1], part[:, 1:]) for part in parts])
    if engine._accumulation is not None:
        engine._accumulation.hand_over()
    return weight.grad.float().flatten().tolist()


def test_micro_batches_add_up_in_fp32():
    """64 bf16 micro-batches differ from one batch by one rounding (2⁻⁹), not by the 64 of a bf16 sum."""
    import torch

    whole, ours, naive = (
        torch.tensor(run_ranks(1, first_gradient, size, bf16_sum)[0])
        for size, bf16_sum in ((64, False), (1, False), (1, True))
    )

    def error(x):
        return float((x - whole).norm() / whole.norm())

    assert error(ours) < 0.5 * error(naive)
    assert error(ours) < 1e-2


def gradient_that_adam_sees(stage: int, micro_batches: int, fp32_sum: bool = True):
    """On a rank: the mean gradient of equal micro-batches in bf16, all parameters' in one flat tensor."""
    import torch

    from elas import parallel
    from elas.checkpoint.state import capture
    from elas.config import load_config
    from elas.engine import engine as engines
    from elas.model.activation import set_step

    settings = {**SMALL, "train.dtype": "bfloat16", "parallel.zero": stage, "optimizer.clip_grad": 0.0}
    batch = {"train.micro_batch_size": 1, "train.global_batch_size": micro_batches, "model.num_layers": 1}
    config = load_config(None, {**settings, **batch})
    made = engines.deepspeed_config

    def in_bf16(*args, **kwargs):
        return {key: value for key, value in made(*args, **kwargs).items() if key != "data_types"}

    engines.deepspeed_config = made if fp32_sum else in_bf16
    try:
        engine = engines.Engine(config, parallel.initialize(config.parallel, seed=1))
    finally:
        engines.deepspeed_config = made
    set_step(engine.chunks, 1)
    tokens = torch.randint(256, (1, 33), generator=torch.Generator().manual_seed(7))
    engine.step((tokens[:, :-1], tokens[:, 1:]) for _ in range(micro_batches))
    held = [tensor for name, tensor in capture(engine).items() if name.startswith("exp_avg.")]
    return torch.cat([part.flatten() for tensor in held for part in tensor.parts.values()])


@pytest.mark.parametrize("stage", (2, 3))
def test_zero_2_and_3_add_up_micro_batches_in_fp32(stage):
    """The mean of 512 equal gradients is that gradient (512 is a power of two)."""
    assert error_of_mean(stage, fp32_sum=True) < 1e-5


def test_a_sum_in_bf16_would_be_noticed():
    """It stops growing before 512."""
    assert error_of_mean(2, fp32_sum=False) > 0.1


def error_of_mean(stage: int, fp32_sum: bool) -> float:
    one, many = (run_ranks(1, gradient_that_adam_sees, stage, n, fp32_sum)[0] for n in (1, 512))
    return float((many - one).norm() / one.norm())


@pytest.mark.skipif(
    library("cpu_adam") is None,
    reason="DeepSpeed's CPU Adam compiles for minutes; first: "
    "python -c 'from elas.extensions import prebuild_deepspeed; prebuild_deepspeed(offload=True)'",
)
def test_offloaded_optimizer_state_trains_the_same_model():
    offload = Path(pretrain.__file__).resolve().parents[1] / "ds_configs" / "zero1_offload.json"
    kept, offloaded = run(), run(parallel__deepspeed_config=str(offload))
    for (loss, norm), (loss_offloaded, norm_offloaded) in zip(kept, offloaded):
        assert loss_offloaded == pytest.approx(loss, rel=2e-5)  # another Adam, the same arithmetic
        assert norm_offloaded == pytest.approx(norm, rel=5e-4)
