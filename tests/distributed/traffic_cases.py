"""On a rank: bytes that a training step sends to others, as collectives that are rings, and what the plan says."""


def sent_and_planned(overrides: dict) -> tuple[float, float]:
    """Bytes sent in the second step, and `elas.plan.traffic` for the rank with most."""
    import torch
    from support.parity_run import SMALL

    from elas import parallel
    from elas.config import load_config
    from elas.config.deepspeed import choose_zero_stage
    from elas.engine.engine import Engine
    from elas.model.activation import set_step
    from elas.plan.traffic import traffic
    from elas.plan_check.watch import CountTraffic

    config = load_config(None, {**SMALL, "sparsity.dense_steps": 0, **overrides})
    layout = parallel.initialize(config.parallel, seed=1)
    engine = Engine(config, layout)
    set_step(engine.chunks, 1)
    ids = torch.randint(256, (config.train.global_batch_size // layout.dp, 33))
    micro = [(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in ids.split(config.train.micro_batch_size)]
    engine.step(iter(micro))
    with CountTraffic() as count:
        engine.step(iter(micro))
    choose_zero_stage(config, layout.world)
    return sum(count.sent.values()), traffic(config, layout.world).total


def of_matrices(overrides: dict) -> tuple[float, float]:
    """Bytes that this rank sends for Muon in a step, and `elas.plan.traffic`'s mean."""
    import torch
    from support.parity_run import SMALL

    from elas import parallel
    from elas.config import load_config
    from elas.config.deepspeed import choose_zero_stage
    from elas.engine.engine import Engine
    from elas.plan.traffic import traffic

    config = load_config(None, {**SMALL, "sparsity.dense_steps": 0, "optimizer.kind": "muon", **overrides})
    layout = parallel.initialize(config.parallel, seed=1)
    engine = Engine(config, layout)
    ids = torch.randint(256, (config.train.global_batch_size // layout.dp, 33))
    micro = [(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in ids.split(config.train.micro_batch_size)]
    engine.step(iter(micro))
    choose_zero_stage(config, layout.world)
    return engine.muon.end(1, 0.0).bytes, traffic(config, layout.world).matrices
