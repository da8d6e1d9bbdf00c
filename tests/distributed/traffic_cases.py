"""On a rank: bytes that a training step sends to others, as collectives that are rings, and what the plan says."""

SHARES = {"allreduce_": 2, "_allgather_base_": 1, "allgather_": 1, "_reduce_scatter_base_": 1, "reduce_scatter_": 1}


def sent_and_planned(overrides: dict) -> tuple[float, float]:
    """Bytes sent in the second step, and `elas.plan.traffic` for the rank with most."""
    import torch
    from support.parity_run import SMALL
    from torch.utils._python_dispatch import TorchDispatchMode

    from elas import parallel
    from elas.config import load_config
    from elas.config.deepspeed import choose_zero_stage
    from elas.engine.engine import Engine
    from elas.model.activation import set_step
    from elas.plan.traffic import traffic

    class Count(TorchDispatchMode):
        total = 0.0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            namespace, _, name = func._schema.name.partition("::")
            if namespace == "c10d":
                # The first script object is the process group; a reduction is one, too.
                group = next(one for one in args if isinstance(one, torch.ScriptObject))
                size = torch.distributed.ProcessGroup.unbox(group).size()
                whole = args[1] if "reduce_scatter" in name else args[0]
                bytes_ = sum(tensor.nbytes for tensor in flat(whole))
                if name == "send":
                    self.total += bytes_
                elif name in SHARES:
                    self.total += SHARES[name] * (size - 1) / size * bytes_
                elif name not in ("recv_", "barrier"):
                    raise AssertionError(f"{name} is not counted")
            return func(*args, **(kwargs or {}))

    def flat(tensors) -> list:
        return [tensors] if isinstance(tensors, torch.Tensor) else [t for inner in tensors for t in flat(inner)]

    config = load_config(None, {**SMALL, "sparsity.dense_steps": 0, **overrides})
    layout = parallel.initialize(config.parallel, seed=1)
    engine = Engine(config, layout)
    set_step(engine.chunks, 1)
    ids = torch.randint(256, (config.train.global_batch_size // layout.dp, 33))
    micro = [(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in ids.split(config.train.micro_batch_size)]
    engine.step(iter(micro))
    with Count() as count:
        engine.step(iter(micro))
    choose_zero_stage(config, layout.world)
    return count.total, traffic(config, layout.world).total
