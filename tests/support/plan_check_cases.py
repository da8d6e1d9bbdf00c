"""On a rank: what `elas plan --check` and `--measure` run there; and a hardware file of made-up rates."""


def made_up(scale: float = 1.0) -> dict:
    """A machine of two cores; `scale` multiplies its rates."""
    rates = {"full_rank": 40e9, "factor": {"128": 30e9}, "core": {"128": 30e9}, "scores": 12e9, "head": 35e9,
             "bandwidth": 16e9, "fresh": 3e9, "iteration": 15e9}  # fmt: skip
    rates = {
        name: {rank: one * scale for rank, one in rate.items()} if isinstance(rate, dict) else rate * scale
        for name, rate in rates.items()
    }
    seconds = {"norm_s": 15e-9, "heads_s": 10e-9, "gate_s": 5e-9, "adam_s": 1e-9}
    seconds |= {"host_layer_s": 1e-3, "host_batch_s": 1e-3, "host_step_s": 1e-3}
    both = {
        dtype: {**rates, **{name: one / scale for name, one in seconds.items()}} for dtype in ("float32", "bfloat16")
    }
    links = {kind: {"bytes_per_s": 5e8 * scale, "latency_s": 2e-4 / scale}
             for kind in ("all_reduce", "all_gather", "reduce_scatter", "send")}  # fmt: skip
    return {"name": "made up", "device": "cpu", "ranks": 2, "memory": 1e10, "busy": {"1": both, "2": both},
            "links": links, "about": {"date": "2026-01-01"}}  # fmt: skip


def watched(settings: dict, measured: bool = False) -> dict:
    """The check's steps, with rates measured before and after them."""
    from elas.plan_check.check_rank import on_rank

    facts = {"source": None, "overrides": settings, "steps": 2}
    if measured:
        _hardly_repeat()
        host = {"layer_s": 1e-3, "batch_s": 1e-3, "step_s": 1e-3}
        facts["rates"] = {"preset": "quickstart", "batch": 1, "seq": 32, "dtypes": ["float32"], "host": host}
    return on_rank(facts)


def rates() -> dict:
    """The measurement, hardly repeated."""
    from elas.plan_check import rates_rank

    _hardly_repeat()
    return rates_rank.on_rank({"preset": "quickstart", "batch": 1, "seq": 32, "dtypes": ["float32"]})


def _hardly_repeat() -> None:
    from elas.plan_check import links_rank, rates_rank

    rates_rank.TURN_S = links_rank.TURN_S = 0.0
    rates_rank.LEAST_CALLS = links_rank.LEAST_CALLS = 1


def restored() -> bool:
    """Whether torch's classes are as before after `Clock`, and whether it timed a collective and a message."""
    import torch
    import torch.distributed as dist

    from elas import parallel
    from elas.config import load_config
    from elas.engine.engine import Engine
    from elas.plan_check.watch import Clock
    from support.parity_run import SMALL

    config = load_config(None, {**SMALL, "parallel.zero": 0})
    engine = Engine(config, parallel.initialize(config.parallel, seed=1))
    classes = torch._C._distributed_c10d
    owners = [(classes.Work, "wait"), (classes.ProcessGroup, "send"), (classes.ProcessGroup, "recv")]
    before = [vars(owner)[name] for owner, name in owners]
    rank, x, y = dist.get_rank(), torch.ones(4), torch.zeros(4)
    with Clock(engine) as clock:
        dist.all_reduce(x)
        collectives = dict(clock.seconds)
        request = dist.isend(x, 1) if rank == 0 else dist.irecv(y, 0)
        assert request is not None
        request.wait()
    assert collectives["collectives"] > 0 and collectives["messages"] == 0
    assert clock.seconds["messages"] > 0 and clock.seconds["collectives"] == collectives["collectives"]
    after = [vars(owner)[name] for owner, name in owners]
    return all(one is other for one, other in zip(before, after)) and "_update" not in vars(engine)
