"""What the tests of the engine's step run on each rank: how often the host waits, and steps that are abandoned."""

import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from support.parity_run import GLOBAL_BATCH, SMALL, tokens
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_SCALARS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.nonzero")
_COPIES = (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy)
_READERS = ("elas", "deepspeed", "megatron")


def _reader() -> str:
    """Module and function that read a tensor: the innermost frame of a package that can be changed or blamed."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] in _READERS and module != "elas.accelerator":
            return f"{module}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "tests"


class Reads:
    """Counts, within its context, reads of tensors by the host: on a GPU each waits for all work before it."""

    def __init__(self):
        self.readers: list[str] = []
        readers = self.readers

        class Scalars(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if str(func).startswith(_SCALARS):
                    readers.append(_reader())
                return func(*args, **(kwargs or {}))

        class Copies(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                if func in _COPIES or (func is torch.Tensor.to and "cpu" in args[1:]):
                    readers.append(_reader())
                return func(*args, **(kwargs or {}))

        self._modes = (Scalars(), Copies())

    def __enter__(self) -> "Reads":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


def _stop():
    """A stop request that hears SIGUSR1 at its look number `hears_at`."""
    from elas.train.signals import StopRequest

    class Stop(StopRequest):
        hears_at: int | None = None
        looks = 0

        def agree_on_signal(self, group) -> bool:
            self.looks += 1
            if self.looks == self.hears_at:
                self.hear(3)
            return super().agree_on_signal(group)

    return Stop(None)


class Run:
    """An engine on this rank and its batches by step; `stop` is never set unless a test does it."""

    def __init__(self, overrides: dict):
        from elas import parallel
        from elas.config import load_config
        from elas.engine.engine import Engine
        from elas.engine.micro_batches import MicroBatches
        from elas.model.activation import set_step

        self.config = load_config(None, {**SMALL, **overrides})
        self.layout = parallel.initialize(self.config.parallel, seed=self.config.train.seed)
        self.stop = _stop()
        self.between = MicroBatches(self.stop)
        self.engine = Engine(self.config, self.layout, self.between)
        self.engine.set_learning_rate(self.config.optimizer.lr)
        set_step(self.engine.chunks, 1)

    def batches(self, step: int) -> Iterator:
        """This rank's micro-batches; documents of several lengths where a sample holds one."""
        samples, size = tokens(step), self.config.train.micro_batch_size
        labels = samples[:, 1:]
        if self.config.data.packing == "document":
            lengths = 1 + torch.arange(GLOBAL_BATCH) * 31 % labels.shape[1]
            labels = torch.where(torch.arange(labels.shape[1]) < lengths[:, None], labels, -1)
        starts = [(m * self.layout.dp + self.layout.dp_rank) * size for m in range(self.engine.micro_batches)]
        return ((samples[s : s + size, :-1], labels[s : s + size]) for s in starts)

    def step(self, step: int) -> tuple[float, float]:
        """One step as the training loop takes it, with its agreement on stopping."""
        self.between.begin(f"step {step}", self.engine.micro_batches, len(self.engine.chunks))
        result = self.engine.step(self.batches(step), lambda: self.stop.flags(False, self.between.seconds))
        self.between.adapt(self.stop.agreed(self.engine.flags).pass_s)
        return result


def reads_of_a_step(overrides: dict) -> list[str]:
    """Who reads a tensor on the host during the third step, and during a validation of one global batch after it."""
    run = Run(overrides)
    for step in range(2):
        run.step(step)
    run.between.adapt(1e-6)  # as if steps were fast: slow ones look at the stop flag between micro-batches
    with Reads() as reads:
        run.step(2)
    run.between.adapt(1e-6)
    run.between.begin("validation", run.engine.micro_batches, len(run.engine.chunks))
    with Reads() as of_evaluation:
        run.engine.evaluate(list(run.batches(3)))
    return [reads.readers, of_evaluation.readers]


def two_steps(overrides: dict) -> list[tuple[float, float]]:
    """Loss and norm of two steps."""
    run = Run(overrides)
    return [run.step(0), run.step(1)]


def abandon(overrides: dict, knows: int) -> tuple[list, list[str], bool]:
    """In the second step, rank `knows` alone hears of a stop before its second micro-batch; then the step is repeated.

    Returns:
        Loss and norm of the first and of the repeated step; why all ranks stop, by the abandoned one; whether weights
        and moments stayed as they were.
    """
    from elas.engine.micro_batches import Abandoned
    from elas.engine.zero import base_state, fragments

    run = Run(overrides)

    def state() -> list[torch.Tensor]:
        held = fragments(run.engine).values()
        moments = [f.moment(base_state(run.engine), name) for f in held for name in ("exp_avg", "exp_avg_sq")]
        weights = [p.detach() for chunk in run.engine.chunks for p in chunk.parameters()]
        return [one.clone() for one in (*(f.master() for f in held), *moments, *weights)]

    results, before, why = [run.step(0)], state(), []
    run.stop.hears_at = 2 if dist.get_rank() == knows else None
    run.stop.looks, run.between.every = 0, 1
    try:
        run.step(1)
    except Abandoned:
        why.append(run.stop.agreed(run.engine.flags).why)
    stayed = all(torch.equal(one, other) for one, other in zip(before, state(), strict=True))
    run.between.adapt(1e-6)  # no look any more, as the request stays
    results.append(run.step(1))
    return results, why, stayed
